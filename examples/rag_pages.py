"""Document pages as pictures, retrieved in another selection and order for each question: every page is computed once.

    python examples/rag_pages.py --model Qwen/Qwen3-VL-2B-Instruct

A retriever returns the same pages again and again, but hardly ever in the same order, so a prefix cache is of little
use. The pages are drawn here; take scans or rendered PDF pages in their place. Without `--model` the small model of
this repository runs, which cannot read: then only the counts say something, not the answers.
"""

from __future__ import annotations

import argparse
import sys

from offline import GRID_MODEL, ask, message, start
from PIL import Image, ImageDraw, ImageFont
from savings import Savings

PAGES = {
    "opening hours": "The market hall opens at seven in the morning. On Sundays it stays closed. In winter, from "
    "November to February, stalls close one hour earlier, at five in the afternoon.",
    "fees": "A stall costs twelve crowns a day, with electricity fifteen. Members of the association pay ten. Fees "
    "are due before the stall is opened and are not returned.",
    "safety": "Gas bottles stand outside. Each stall keeps a fire blanket within reach. The passage between two rows "
    "is two metres wide and must stay free at all times.",
}
# Question -> pages that a retriever finds for it, best first.
FOUND = {
    "When does the hall close in January?": ["opening hours", "fees"],
    "What does a member pay?": ["fees", "opening hours"],
    "Where do gas bottles stand?": ["safety", "fees"],
    "How wide is the passage, and when does the hall open?": ["safety", "opening hours", "fees"],
}


def page(title: str, text: str, width: int = 720, height: int = 960) -> Image.Image:
    """A page of print, width x height pixels."""
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=30)
    lines, line = [title.upper(), ""], ""
    for word in text.split():
        if draw.textlength(f"{line} {word}", font) > width - 120:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    draw.multiline_text((60, 60), "\n".join([*lines, line]), "black", font, spacing=14)
    return image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(GRID_MODEL), help="Qwen2.5-VL or Qwen3-VL, a folder or a name")
    options = parser.parse_args()
    pages = {title: page(title, text) for title, text in PAGES.items()}

    llm = start(options.model)
    for title, picture in pages.items():  # what indexing does: each page alone, one token
        ask(llm, [message(picture, title)])
    savings = Savings()
    for question, titles in FOUND.items():
        messages = [message(*(pages[title] for title in titles), question)]
        plain = ask(llm, messages, mode="off")
        savings.show(f"{question} ({', '.join(titles)})", ask(llm, messages), plain)
    return savings.close()


if __name__ == "__main__":
    sys.exit(main())
