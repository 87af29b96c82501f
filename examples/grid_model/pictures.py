"""Pictures of the grid model: 8 x 8 cells of 32 x 32 pixels, each empty or holding a coloured glyph.

The picture is 256 x 256 pixels; a patch has 8 x 8, a visual token 16 x 16, so that a cell is 2 x 2 of the 256 tokens.
Every glyph has two mirror axes and shows itself in each quarter of its cell.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from grid_model.words import COLOURS, SHAPES

CELLS = 8  # a side
CELL_PIXELS = 32
PATCH = 8
TOKENS = 16  # a side, after merging 2 x 2 patches
NUM_CONTENTS = 1 + len(COLOURS) * len(SHAPES)  # 0 is the empty cell
RGB = {
    "red": (220, 20, 30),
    "green": (20, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (240, 210, 20),
    "purple": (130, 30, 160),
    "orange": (250, 130, 10),
    "black": (10, 10, 10),
    "pink": (250, 150, 200),
}


def content_of(colour: int, shape: int) -> int:
    """The cell content that stands for a coloured glyph; see NUM_CONTENTS."""
    return 1 + colour * len(SHAPES) + shape


def glyph(shape: str) -> np.ndarray:
    """Which of the 32 x 32 pixels of a cell the glyph covers (bool)."""
    y, x = np.abs(np.mgrid[:CELL_PIXELS, :CELL_PIXELS] - (CELL_PIXELS - 1) / 2)
    radius = np.hypot(x, y)
    masks = {
        "disc": radius < 13,
        "ring": (radius < 14.5) & (radius > 9),
        "square": np.maximum(x, y) < 12,
        "frame": (np.maximum(x, y) < 14.5) & (np.maximum(x, y) > 10),
        "diamond": x + y < 15,
        "plus": (np.minimum(x, y) < 3.5) & (np.maximum(x, y) < 14.5),
        "cross": (np.abs(x - y) < 4) & (np.maximum(x, y) < 14),
        "star": np.sqrt(x) + np.sqrt(y) < 4.1,
    }
    mask: np.ndarray = masks[shape]
    return mask


def cell_images() -> np.ndarray:
    """All contents of a cell: (NUM_CONTENTS, 32, 32, 3), uint8."""
    cells = np.full((NUM_CONTENTS, CELL_PIXELS, CELL_PIXELS, 3), 255, np.uint8)
    for c, colour in enumerate(COLOURS):
        for s, shape in enumerate(SHAPES):
            cells[content_of(c, s)][glyph(shape)] = RGB[colour]
    return cells


def draw(contents: np.ndarray) -> Image.Image:
    """The picture of `contents`, (8, 8) cell contents by row and column."""
    pixels = cell_images()[contents]  # row, column, y, x, channel
    side = CELLS * CELL_PIXELS
    return Image.fromarray(pixels.transpose(0, 2, 1, 3, 4).reshape(side, side, 3))


def token_patches() -> np.ndarray:
    """What the image processor makes of each token of a cell: (NUM_CONTENTS, 2, 2, 4, 384), float32.

    Axes: content, row and column of the token in its cell, patch within the token (row-major), and the patch's values
    in the processor's order (channel, frame, y, x); a still picture is two equal frames.
    """
    values = (cell_images().astype(np.float32) - 127.5) / 127.5
    split = values.reshape(NUM_CONTENTS, 2, 2, PATCH, 2, 2, PATCH, 3)  # content, ty, py, y, tx, px, x, channel
    order = split.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(NUM_CONTENTS, 2, 2, 4, 3, 1, PATCH, PATCH)
    return np.repeat(order, 2, axis=5).reshape(NUM_CONTENTS, 2, 2, 4, -1)
