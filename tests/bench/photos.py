"""Photographs that come with scikit-learn and matplotlib, brought to a stated size. Nothing is downloaded.

- china, from scikit-learn: CC BY 2.0, by danielbuechele (flickr.com/photos/danielbuechele).
- flower, from scikit-learn: CC BY 2.0, by vultilion (flickr.com/photos/vultilion). scikit-learn's README links there,
  but repeats the first photographer's name.
- hopper, from matplotlib: portrait of Grace Hopper by the US Navy, public domain.

They are only resized. The originals have about 0.3 megapixels; how sharp a picture is makes no difference here.
"""

from __future__ import annotations

from typing import Literal, get_args

from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_image

Name = Literal["china", "flower", "hopper"]
NAMES: tuple[Name, ...] = get_args(Name)
PIXELS_PER_TOKEN_SIDE = 28  # Qwen2.5-VL: a token stands for 28x28 pixels

CREDITS = {
    "china": "CC BY 2.0, by danielbuechele (Flickr); comes with scikit-learn; resized",
    "flower": "CC BY 2.0, by vultilion (Flickr; scikit-learn names danielbuechele); comes with scikit-learn; resized",
    "hopper": "public domain, US Navy portrait of Grace Hopper; comes with matplotlib; resized",
}


def original(name: Name) -> Image.Image:
    if name == "hopper":
        return Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def of_tokens(name: Name, columns: int, rows: int) -> Image.Image:
    """The photograph stretched to `columns` x `rows` image tokens, so that the processor resizes nothing."""
    size = (columns * PIXELS_PER_TOKEN_SIDE, rows * PIXELS_PER_TOKEN_SIDE)
    return original(name).resize(size, Image.Resampling.LANCZOS)


def of_megapixels(name: Name, megapixels: float) -> Image.Image:
    """The photograph with its own proportions and about `megapixels` million pixels."""
    picture = original(name)
    scale = (megapixels * 1e6 / (picture.width * picture.height)) ** 0.5 / PIXELS_PER_TOKEN_SIDE
    return of_tokens(name, round(picture.width * scale), round(picture.height * scale))
