"""Figures of merit of a quantized classifier, with intervals over the images.

Every figure is a ratio of two sums over images. Intervals are the 2.5 % and 97.5 % points of
10,000 resamplings of the images; a difference of two rows resamples both alike.
"""

from typing import NamedTuple

import numpy as np

RESAMPLINGS = 10_000


class Outcome(NamedTuple):
    """Per image: top-1 agreement with float, and energy of the logits and of their error."""

    agrees: np.ndarray
    signal: np.ndarray
    noise: np.ndarray


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    @property
    def signed(self) -> str:
        return f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def outcome(logits: np.ndarray, reference: np.ndarray) -> Outcome:
    """What one row did: arrays `[images, classes]`."""
    wide, exact = logits.astype(np.float64), reference.astype(np.float64)
    return Outcome(
        (wide.argmax(1) == exact.argmax(1)).astype(np.float64),
        np.sum(exact**2, axis=1),
        np.sum((wide - exact) ** 2, axis=1),
    )


class Resampled:
    """The same resamplings of the images for all rows, so that differences are paired."""

    def __init__(self, images: int, seed: int = 0) -> None:
        draws = np.random.default_rng(seed).multinomial(
            images, np.full(images, 1 / images), RESAMPLINGS
        )
        self.counts = np.vstack([np.ones(images), draws])  # the first is the sample

    def agreement(self, row: Outcome) -> np.ndarray:
        """Percent, for the sample and every resampling."""
        return 100 * (self.counts @ row.agrees) / self.counts.sum(1)

    def sqnr(self, row: Outcome) -> np.ndarray:
        """dB: 10 log10 of the energy of all logits over that of all errors."""
        noise = np.maximum(self.counts @ row.noise, np.finfo(np.float64).tiny)
        return 10 * np.log10((self.counts @ row.signal) / noise)


def interval(values: np.ndarray) -> Interval:
    """The figure of the sample, and the middle 95 % of those of the resamplings."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))
