"""One file for a model: npz with a JSON manifest, no pickle, written atomically."""

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxmet.tree.checks import check_flags
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.stored_trees import DAMAGE, Saved, decoded, encoded
from jaxmet.tree.table import Table
from jaxmet.tree.writing import readable, writable, written

DEFLATE = 1032
"""How many bytes deflate makes of one at the most: a larger claim is a bomb."""


def save(
    path: str | os.PathLike[str],
    *,
    params: Any = None,
    quantizers: Quantizers | None = None,
    table: Table | None = None,
    compress: bool = False,
) -> None:
    """Write parameters, quantizers and a table, or some of them, to one npz file.

    Dicts, lists and tuples, and quantizers in them, are restored exactly by `load`, other
    containers with its `like`. The file appears under its name only when it is complete, and
    replaces one that is there.

    Args:
        path: the npz file to write.
        params: a parameter tree; default None.
        quantizers: the quantizers to save; default None.
        table: a table to save; default None.
        compress: whether arrays are deflated: a tenth smaller for integers, and slower; default
            False.

    Raises:
        ValueError: where there is nothing to save, for quantizers or a table in place of
            `params`, for what is no array, number or text, and for a path that cannot be
            written.

    >>> jm.save("small.npz", params=params, quantizers=quantizers)
    """
    check_flags("save", compress=compress)
    path = writable(path, "save")
    text, arrays = encoded("save", params, quantizers, table, native=_is_native)
    arrays["manifest"] = np.frombuffer(text.encode(), np.uint8)
    # The names of arrays begin with 'params/' and the like, or are 'manifest': none is an option
    write = np.savez_compressed if compress else np.savez
    written(path, lambda f: write(f, **arrays))  # pyright: ignore[reportArgumentType]


def _is_native(dtype: np.dtype) -> bool:
    """Whether a file of NumPy's has the type: it forgets those that NumPy does not define."""
    return dtype.kind in "biufc" and dtype.isbuiltin == 1


def load(path: str | os.PathLike[str], *, like: Any = None) -> Saved:
    """Read what `save` wrote.

    Containers other than dict, list and tuple (an nnx state, an equinox module) come
    back as nested dicts, unless `like` is a tree with the same parameter names, whose
    containers are then used; its values do not matter. Quantizers in both must agree in bits,
    axes and all else that is no array.

    Args:
        path: the npz file that `jm.save` wrote.
        like: a tree whose containers the loaded parameters take; default None: dicts, lists and
            tuples.

    Returns:
        A record with `params`, `quantizers` and `table`; None where the file has none.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for what is no path, for a folder, for a file that `save` did not write, and
            where names, or bits and other static fields of quantizers, differ from `like`.

    >>> saved = jm.load("small.npz")
    >>> params, quantizers = saved.params, saved.quantizers
    """
    path = readable(path, "load")
    arrays = _read(path)
    text = arrays.pop("manifest").tobytes()
    return decoded("load", path, text, arrays, like, writer="jm.save")


_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, SyntaxError),
    *DAMAGE,
)


def _read(path: Path) -> dict[str, np.ndarray]:
    """All arrays, the manifest too, or an error that says what the file is."""

    def refusal(found: str, cure: str) -> ValueError:
        return ValueError(f"jaxmet.load: {path} {found}. {cure}.")

    with open(path, "rb") as file:
        start = file.read(4)
        if not start:
            raise refusal("is empty", "Save it again")
        if start[:2] != b"PK":
            found = f"starts with {start!r}: no npz file"
            raise refusal(found, "Give a file of jm.save")
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                _check_sizes(archive, size)
                members = archive.infolist()
                arrays = {m.filename[:-4]: _member(archive, m) for m in members}
        except _DAMAGE as error:
            found = f"is cut short or damaged ({error})"
            raise refusal(found, "Save it again") from error
    if "manifest" not in arrays:
        raise refusal(
            f"is an npz of {sorted(arrays)[:5]} and has no manifest",
            "Give a file of jm.save",
        )
    return arrays


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse members that are stored twice over, or larger than deflate can make them."""
    members = archive.infolist()
    if len({m.filename for m in members}) < len(members):
        raise ValueError("two arrays have one name")
    if sum(m.compress_size for m in members) > size:
        raise ValueError("its arrays overlap")
    for m in members:
        plain = m.compress_type == zipfile.ZIP_STORED
        if not plain and m.compress_type != zipfile.ZIP_DEFLATED:
            raise ValueError(f"{m.filename!r} is compressed in another way")
        if m.file_size > m.compress_size * (1 if plain else DEFLATE):
            raise ValueError(f"{m.filename!r} claims {m.file_size} bytes")
        if not m.filename.endswith(".npy"):
            raise ValueError(f"{m.filename!r} is no array")


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array, which says itself that it is as large as its member is."""
    with archive.open(member) as file:
        shape, dtype = _header(file)
        if dtype.hasobject or dtype.kind not in "biufc":
            raise ValueError(f"{member.filename!r} is of type {dtype}")
        claim = math.prod(shape) * dtype.itemsize
        if claim != member.file_size - file.tell():
            raise ValueError(f"{member.filename!r} claims {claim} bytes")
    with archive.open(member) as file:
        found = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # the end: the checksum is compared there
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype
