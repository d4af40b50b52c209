"""Folders of pictures as arrays that the network takes."""

import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def read_folder(folder: Path, pixels: int) -> np.ndarray:
    """All pictures of a folder in the order of their names: `[n, pixels, pixels, 3]` float32.

    Raises FileNotFoundError for a folder that is not there or has no pictures, and
    ValueError naming the file for one that cannot be read.
    """
    return np.stack([read_picture(p, pixels) for p in _pictures(folder)])


def read_labelled(folder: Path, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, and the class numbers that end the names of their files."""
    paths = _pictures(folder)
    labels = []
    for path in paths:
        number = re.search(r"(\d+)$", path.stem)
        if number is None:
            raise ValueError(f"{path}: its name does not end with a class number.")
        labels.append(int(number[1]))
    return read_folder(folder, pixels), np.array(labels)


def read_picture(path: Path, pixels: int) -> np.ndarray:
    """The middle square, resized bicubically: (x - 127)/128.

    Grey pictures become RGB; transparent ones are laid on white.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                picture.load()
                image = _rgb(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: it cannot be read as a picture ({error})."
        ) from error
    side = min(image.size)
    left, top = ((n - side) / 2 for n in image.size)
    box = (left, top, left + side, top + side)
    image = image.resize((pixels, pixels), Image.Resampling.BICUBIC, box=box)
    return (np.asarray(image, np.float32) - 127) / 128


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16 bits a pixel
        grey = np.asarray(picture, np.float32) / 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of pictures.")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"{folder}: it holds no pictures ({', '.join(SUFFIXES)})."
        )
    return found
