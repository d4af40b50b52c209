"""Scenes composed of Fashion-MNIST garments, with pixel labels and boxes.

Two to five garments of varying size and tint lie, also over each other, on a coloured
texture. Train, calibration and test scenes are made of disjoint garments. A scene is a
function of its split, its seed and its number.

Fashion-MNIST: Xiao, Rasul and Vollgraf, [a Novel Image Dataset for Benchmarking
Machine Learning Algorithms](https://arxiv.org/abs/1708.07747), 2017.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DATA = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
FILES = {  # of each split: images, labels, and which of them
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", slice(0, 58000)),
    "calibration": (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        slice(58000, 60000),
    ),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", slice(0, 10000)),
}
SIZE = 96
SMALLEST, LARGEST = 24, 48  # pixels: the side of a garment's square
MOST = 5  # garments in a scene
VISIBLE = 0.35  # of a garment's pixels; with fewer it has no box
FLOOR = 0.05  # darker pixels on the rim of a garment's image are not the garment

Array = np.ndarray[Any, Any]


class Scenes(NamedTuple):
    """Images in 0 to 1, a class for every pixel, and `MOST` rows of boxes each.

    Class 0 is the background; a box is x1, y1, x2, y2 in pixels and has class 0 where
    there is none.
    """

    images: Array  # (scenes, SIZE, SIZE, 3) float32
    labels: Array  # (scenes, SIZE, SIZE) uint8
    boxes: Array  # (scenes, MOST, 4) float32
    classes: Array  # (scenes, MOST) int32


def read_idx(path: Path) -> Array:
    """The array of an idx file: two zeros, type, rank, big-endian sizes, bytes."""
    zipped = path.with_name(path.name + ".gz")
    if not (path.is_file() or zipped.is_file()):
        raise ValueError(
            f"dfq.read_idx: there is no {zipped} and no {path}. Install the Debian "
            f"package {PACKAGE} (`apt-get install {PACKAGE}`), or give with --data the "
            "folder that holds the four idx files of Fashion-MNIST."
        )
    raw = path.read_bytes() if path.is_file() else gzip.decompress(zipped.read_bytes())
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"dfq.read_idx: {path} is no idx file of bytes: it begins with {raw[:4]!r}. "
            f"Take the files of the Debian package {PACKAGE}."
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", raw[3], offset=4))
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if values.size != np.prod(shape):
        raise ValueError(
            f"dfq.read_idx: {path} announces the shape {shape} and holds {values.size} "
            f"values. It is cut off; reinstall {PACKAGE}."
        )
    return values.reshape(shape)


def shrink(image: Array, height: int, width: int) -> Array:
    """An image in another size, by bilinear interpolation."""
    return _weights(height, image.shape[0]) @ image @ _weights(width, image.shape[1]).T


def _weights(to: int, size: int) -> Array:
    """A matrix that samples `size` values linearly at `to` places."""
    at = np.clip((np.arange(to) + 0.5) * size / to - 0.5, 0, size - 1)
    distance = np.abs(at[:, None] - np.arange(size)[None])
    return np.maximum(0, 1 - distance).astype(np.float32)


def outline(image: Array) -> Array:
    """The pixels of a garment: inside its rim both along the row and the column."""
    bright = image > FLOOR
    ahead, behind = np.logical_or.accumulate, slice(None, None, -1)
    row = ahead(bright, axis=1) & ahead(bright[:, behind], axis=1)[:, behind]
    column = ahead(bright, axis=0) & ahead(bright[behind], axis=0)[behind]
    return row & column


def texture(rng: np.random.Generator) -> Array:
    """A coloured background: noise of some coarseness and stripes of some direction."""
    cells = int(rng.integers(3, 25))
    noise = shrink(rng.random((cells, cells), np.float32), SIZE, SIZE)
    angle, waves = rng.uniform(0, np.pi), rng.uniform(2, 14)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) / SIZE
    phase = np.float32(2 * np.pi * waves) * (np.cos(angle) * x + np.sin(angle) * y)
    stripes = 0.5 + 0.5 * np.sin(phase.astype(np.float32))
    share = np.float32(rng.random())
    mixed = (share * noise + (1 - share) * stripes)[..., None]
    dark, light = rng.uniform(0, 0.45, 3), rng.uniform(0.1, 0.7, 3)
    return (dark + (light - dark) * mixed).astype(np.float32)


@dataclass(frozen=True)
class Composer:
    """Makes the scenes of one split."""

    split: str
    garments: Array
    kinds: Array

    @classmethod
    def read(cls, split: str, data: Path = DATA) -> "Composer":
        """The garments of 'train', 'calibration' or 'test'."""
        images, labels, part = FILES[split]
        garments = read_idx(data / images)[part].astype(np.float32) / 255
        return cls(split, garments, read_idx(data / labels)[part])

    def scenes(self, numbers: range, seed: int = 0) -> Scenes:
        """The scenes with these numbers."""
        salt = zlib.crc32(self.split.encode())
        made = [self._one(np.random.default_rng([seed, salt, n])) for n in numbers]
        return Scenes(*(np.stack(part) for part in zip(*made, strict=True)))

    def _one(self, rng: np.random.Generator) -> tuple[Array, ...]:
        image, owner = texture(rng), np.zeros((SIZE, SIZE), np.uint8)
        areas, kinds = [], []
        for place in range(1, int(rng.integers(2, MOST + 1)) + 1):
            which = int(rng.integers(len(self.garments)))
            mask = self._paste(rng, which, place, image, owner)
            areas.append(mask)
            kinds.append(int(self.kinds[which]) + 1)
        image += rng.normal(0, 0.02, image.shape).astype(np.float32)
        boxes, classes = np.zeros((MOST, 4), np.float32), np.zeros(MOST, np.int32)
        for place, (area, kind) in enumerate(zip(areas, kinds, strict=True), 1):
            seen = owner == place
            if seen.sum() >= VISIBLE * area:
                boxes[place - 1] = _box(seen)
                classes[place - 1] = kind
        labels = np.array([0, *kinds], np.uint8)[owner]
        return np.clip(image, 0, 1), labels, boxes, classes

    def _paste(
        self,
        rng: np.random.Generator,
        which: int,
        place: int,
        image: Array,
        owner: Array,
    ) -> int:
        """Lay a garment over image and owner, in place; its number of pixels."""
        side = int(rng.integers(SMALLEST, LARGEST + 1))
        garment = shrink(self.garments[which], side, side)
        if rng.random() < 0.5:
            garment = garment[:, ::-1]
        top, left = rng.integers(0, SIZE - side + 1, 2)
        window = (slice(top, top + side), slice(left, left + side))
        mask = outline(garment)
        tint = rng.uniform(0.6, 1.0, 3).astype(np.float32)
        colour = (0.1 + 0.9 * garment)[..., None] * tint
        image[window][mask] = colour[mask]
        owner[window][mask] = place
        return int(mask.sum())


def _box(seen: Array) -> tuple[int, int, int, int]:
    """The smallest box around the pixels: x1, y1, x2, y2."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
