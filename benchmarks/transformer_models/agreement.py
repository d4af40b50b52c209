"""How far quantized embeddings agree with the float ones."""

from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr


class Agreement(NamedTuple):
    cosine: float
    rank: float
    sqnr: float

    def cells(self) -> list[str]:
        return [f"{self.cosine:.4f}", f"{self.rank:.4f}", f"{self.sqnr:.1f}"]


def agreement(embeddings: np.ndarray, reference: np.ndarray) -> Agreement:
    """Of embeddings `(sentences, width)`, with those of the float model.

    The mean cosine of a sentence's two embeddings; Spearman's correlation of the cosines of all
    pairs of sentences; and 10 log10(sum y^2 / sum (y - y')^2) dB.
    """
    ours, exact = embeddings.astype(np.float64), reference.astype(np.float64)
    cosine = np.sum(unit(ours) * unit(exact), axis=1).mean()
    rank = spearmanr(similarities(ours), similarities(exact)).statistic
    noise = np.sum((ours - exact) ** 2)
    sqnr = 10 * np.log10(np.sum(exact**2) / noise) if noise else np.inf
    return Agreement(float(cosine), float(rank), float(sqnr))


def similarities(embeddings: np.ndarray) -> np.ndarray:
    """The cosine of every pair of rows, each pair once."""
    every = unit(embeddings) @ unit(embeddings).T
    return every[np.triu_indices(len(every), 1)]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)
