"""The vocabulary of the grid model: every word is one token, and answers use the words that questions use."""

from __future__ import annotations

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unknown|>",
]


def words_in(text: str) -> list[str]:
    return text.split()


COLOURS = words_in("red green blue yellow purple orange black pink")
SHAPES = words_in("disc ring square frame diamond plus cross star")
COLUMNS = list("abcdefgh")
ROWS = list("12345678")
NAMES = words_in("""
    dax wug blick toma fep zorn kiva lunt mibo narp ofra pilk quon rasp sulo tevi
    urna vosk wemba xilo yarp zeth bromo clim drev enko flon grat hupi jasko kelm loth
""")
TASK_WORDS = words_in("colour shape at where is how many which has , . 0 9 none")
FILLER = words_in("""
    the a of and to in it was for on with as by from this that not but or be are were can will may we they he she you
    our their one two three old new small large quiet early late long short road river house garden winter summer
    morning evening letter window table paper market harbour engine mountain village story answer reason number walked
    opened carried found kept wrote sold turned waited closed slowly often never again still almost
""")
# One token for a place and one for a coloured shape: a cell is then found in one step. With two tokens each, training
# settles for crossing what is in the row with what is in the column.
PLACES = [c + r for r in ROWS for c in COLUMNS]
THINGS = [f"{c}-{s}" for c in COLOURS for s in SHAPES]
NUMBERED = [f"picture-{i}" for i in range(1, 5)]
SINGLE_WORDS = [*SPECIAL_TOKENS, *COLOURS, *SHAPES, *COLUMNS[1:], *ROWS, *NAMES, *TASK_WORDS, *FILLER]
WORDS = list(dict.fromkeys([*SINGLE_WORDS, *PLACES, *THINGS, *NUMBERED]))
VOCAB_SIZE = 320  # the embedding has a few spare rows
ID = {word: index for index, word in enumerate(WORDS)}
