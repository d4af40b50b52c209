"""Encodings of AIMET as grids by the names of tensors."""

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmet.tree.writing import readable

READER = "export.read_encodings"
VERSIONS = ("2.0.0", "1.0.0", "0.6.1")


def read_encodings(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The grids of an encodings file, of jaxmet or AIMET, by the names of tensors.

    Versions 2.0.0, 1.0.0 and 0.6.1 are read, integer grids only. The file is JSON: nothing in it is
    executed, and it takes no more memory than a small multiple of its size.

    Args:
        path: the encodings file.

    Returns:
        For each tensor a dictionary: 'scale' (float64) and 'zero_point' (int64), arrays of one
        shape, 'bits', 'symmetric' (a signed grid), 'axis' and 'block_size', the last two None where
        the file does not say them.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a folder, for a file that is damaged or of another version, and for grids
            that are not of integers.

    >>> grids = jm.export.read_encodings("folder/model.encodings")
    >>> grids["stem/relu"]["bits"]
    8
    """
    path = readable(path, READER, "jm.export.encodings")
    refusal = f"jaxmet.{READER}: {path} "
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{refusal}is no JSON that can be read ({error}). Write it again."
        ) from error
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(version, str) or version not in VERSIONS:
        raise ValueError(
            f"{refusal}has version {version!r:.40}. Give a file of version "
            f"{', '.join(VERSIONS[:2])} or {VERSIONS[2]}."
        )
    found: dict[str, dict[str, Any]] = {}
    name: Any = None
    try:
        for name, entry in _entries(data, version):
            if not isinstance(name, str) or name in found:
                raise ValueError("no name, or the name of another")
            found[name] = _READERS[version](entry)
            _check_grid(found[name])
    except (
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        ValueError,
        OverflowError,
    ) as e:
        raise ValueError(
            f"{refusal}is damaged or has no integer grid at {name!r:.80} "
            f"({type(e).__name__}: {e!s:.80}). Write it again."
        ) from e
    return found


def _entries(data: dict[str, Any], version: str) -> Iterator[tuple[Any, Any]]:
    if version == "2.0.0":
        yield from ((e["name"], e) for e in data["encodings"])
        return
    for key in ("activation_encodings", "param_encodings"):
        if version == "0.6.1":
            yield from data[key].items()
        else:
            yield from ((e["name"], e) for e in data[key])


def _grid(
    scale: Any,
    zero: Any,
    bits: int,
    symmetric: bool,
    axis: Any = None,
    block: Any = None,
) -> dict[str, Any]:
    scale = np.asarray(scale, np.float64)
    zero = np.asarray(zero, np.float64)
    return {
        "scale": scale,
        "zero_point": zero,
        "bits": bits,
        "symmetric": symmetric,
        "axis": axis,
        "block_size": block,
    }


def _check_grid(grid: dict[str, Any]) -> None:
    scale, zero, bits = grid["scale"], grid["zero_point"], grid["bits"]
    if type(bits) is not int or not 1 <= bits <= 32:
        raise ValueError(f"{bits!r:.20} bits")
    if type(grid["symmetric"]) is not bool:
        raise ValueError("no symmetry")
    if not scale.size or not np.all(np.isfinite(scale) & (scale > 0)):
        raise ValueError("scales that are no positive numbers")
    if zero.shape != scale.shape or not np.all(np.abs(zero) <= 2.0**32):
        raise ValueError("zero points that do not fit")
    if np.any(zero != np.rint(zero)):
        raise ValueError("zero points that are no integers")
    for key in ("axis", "block_size"):
        if grid[key] is not None and type(grid[key]) is not int:
            raise ValueError(f"{key} {grid[key]!r:.20}")
    grid["zero_point"] = zero.astype(np.int64)


def _from_2(entry: dict[str, Any]) -> dict[str, Any]:
    kind = entry["output_dtype"]
    signed = kind.startswith("int")
    if not kind.startswith(("int", "uint")) or "per_block_int_scale" in entry:
        raise ValueError(f"type {kind!r:.20}")
    scale = entry["y_scale"]
    zero = entry.get("y_zero_point")
    zero = np.zeros(np.shape(scale)) if zero is None else zero
    bits = int(kind.removeprefix("u").removeprefix("int"))
    return _grid(scale, zero, bits, signed, entry.get("axis"), entry.get("block_size"))


def _from_1(entry: dict[str, Any]) -> dict[str, Any]:
    kind, bits = entry["enc_type"], entry["bw"]
    if entry["dtype"] != "INT" or kind not in ("PER_TENSOR", "PER_CHANNEL"):
        raise ValueError(f"a grid {kind!r:.20} of {entry['dtype']!r:.20}")
    scale, offset = entry["scale"], entry["offset"]
    if kind == "PER_TENSOR":
        (scale,), (offset,) = scale, offset
    return _grid(scale, _zero(offset, bits, entry["is_sym"]), bits, entry["is_sym"])


def _from_0(entries: list[Any]) -> dict[str, Any]:
    first = entries[0]
    if first["dtype"] != "int" or first["is_symmetric"] not in ("True", "False"):
        raise ValueError(f"type {first['dtype']!r:.20}")
    signed, bits = first["is_symmetric"] == "True", first["bitwidth"]
    scale, offset = ([e[key] for e in entries] for key in ("scale", "offset"))
    if len(entries) == 1:
        (scale,), (offset,) = scale, offset
    return _grid(scale, _zero(offset, bits, signed), bits, signed)


def _zero(offset: Any, bits: Any, signed: Any) -> np.ndarray:
    if type(bits) is not int or not 1 <= bits <= 32:
        raise ValueError(f"{bits!r:.20} bits")
    return -np.asarray(offset, np.float64) - (2 ** (bits - 1) if signed else 0)


_READERS = dict(zip(VERSIONS, (_from_2, _from_1, _from_0), strict=True))
