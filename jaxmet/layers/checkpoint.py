"""What was found so far, one file per step, so that a run that was killed goes on."""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.program.compat import is_key
from jaxmet.tree.quantizer import Quantizer
from jaxmet.tree.quantizers import Quantizers

ABOUT = "about.json"


class Checkpoint:
    """A folder with a file for each finished step; None keeps nothing."""

    def __init__(self, path: Any, caller: str, depends_on: Iterable[Any]) -> None:
        if not isinstance(path, str | os.PathLike | None):
            raise ValueError(
                f"jaxmet.{caller}: checkpoint is {path!r}. Give the path of a folder."
            )
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        if self.path.is_file():
            raise ValueError(
                f"jaxmet.{caller}: checkpoint {str(self.path)!r} is a file. Name a folder, "
                "which need not exist."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        about, mark = self.path / ABOUT, {"of": fingerprint(depends_on)}
        if about.exists() and _read(about) != mark:
            raise ValueError(
                f"jaxmet.{caller}: the folder {str(self.path)!r} holds a run on another "
                "model, tree, data, key or options. Name another folder, or delete this one."
            )
        write(about, json.dumps(mark).encode())

    def load(self, step: int) -> dict[str, np.ndarray] | None:
        """What a step came to, None if it did not get so far."""
        if self.path is None or not (file := self.path / f"{step:04}.npz").exists():
            return None
        with np.load(file) as found:
            return dict(found)

    def save(self, step: int, arrays: Mapping[str, Any]) -> None:
        """Keep what a step came to; a file is whole or is not there."""
        if self.path is None:
            return
        part = self.path / "part"
        with part.open("wb") as file:
            every: dict[str, Any] = {n: np.asarray(v) for n, v in arrays.items()}
            np.savez(file, **every)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path / f"{step:04}.npz")


def _read(path: Path) -> Any:
    """What a file says, None where it was cut off."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def write(path: Path, content: bytes) -> None:
    """A file that is whole or is not there."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def model_of(graph: Graph) -> list[str]:
    """What a model computes, as far as its graph says it."""
    return [repr(node) for node in graph.nodes]


def static_of(quantizers: Quantizers) -> list[Any]:
    """What is static about quantizers: bits, axes, calibrators … Leaves do not tell it."""
    groups = (quantizers.weights, quantizers.activations)
    every = [(name, one) for group in groups for name, one in group.items()]
    fields = [f.name for f in dataclasses.fields(Quantizer)]
    found: list[Any] = []
    for name, one in every:
        values = {f: getattr(one, f) for f in fields}
        values = {f: v for f, v in values.items() if not hasattr(v, "dtype")}
        found += [name, *(v for v in values.values() if callable(v))]
        found.append(repr({f: v for f, v in values.items() if not callable(v)}))
    return found


PLAIN = (str, bytes, int, float, complex, bool, type(None))


def _said(value: Any) -> str:
    """What a function does, as far as its own code says it, the same in every process.

    Of a `functools.partial` that is its function with the plain values that it fills in, of
    a function that wraps another the one inside, of another object what calling it runs.
    """
    if isinstance(value, functools.partial):
        given = (
            *value.args,
            *(x for item in sorted(value.keywords.items()) for x in item),
        )
        return f"{_said(value.func)} {[x for x in given if isinstance(x, PLAIN)]}"
    value = inspect.unwrap(value) if callable(value) else value
    code = getattr(value, "__code__", value)
    if isinstance(code, types.CodeType):
        parts = [_said(c) for c in code.co_consts]
        return f"{code.co_code.hex()} {code.co_names} {parts}"
    if callable(value):
        call = getattr(type(value).__call__, "__code__", None)
        return f"{type(value).__qualname__} {_said(call)}"
    if isinstance(value, frozenset):  # in an order that changes from process to process
        return repr(sorted(map(_said, value)))
    return (
        f"[{', '.join(map(_said, value))}]" if isinstance(value, tuple) else repr(value)
    )


def fingerprint(depends_on: Iterable[Any]) -> str:
    """A number for arrays and everything else that prints itself."""
    found = hashlib.sha256()
    for one in jax.tree.leaves(list(depends_on)):
        if callable(one) and not isinstance(one, type):
            one = _said(one)
        if isinstance(one, jax.Array) and is_key(one):
            one = jax.random.key_data(one)
        if hasattr(one, "dtype"):
            array = np.asarray(one)
            found.update(f"{array.shape}{array.dtype}".encode())
            found.update(array.tobytes())
        else:
            found.update(repr(one).encode())
    return found.hexdigest()
