"""Trees and quantizers as safetensors, which other programs read too."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxmet.tree.checks import check_flags
from jaxmet.tree.packages import package
from jaxmet.tree.quantizers import Quantizers
from jaxmet.tree.stored_trees import Saved, decoded, encoded
from jaxmet.tree.table import Table
from jaxmet.tree.writing import check_free, readable, writable, written

WRITER, READER = "export.safetensors", "export.read_safetensors"
KEY = "jaxmet"
"""Where the header's `__metadata__` has the manifest."""
TYPES = frozenset(
    "bool uint8 int8 uint16 int16 float16 bfloat16 uint32 int32 float32 uint64 int64 float64 "
    "complex64".split()
)


def safetensors(
    path: str | os.PathLike[str],
    params: Any = None,
    quantizers: Quantizers | None = None,
    table: Table | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write parameters, quantizers and a table, or some of them, as a safetensors file.

    Tensors have the names of their parameters: the integers of a `jm.quantize` tree are
    'params/stem/kernel/integers', their scales 'params/stem/kernel/scale'. What is no
    array, bits and axes too, is JSON under 'jaxmet' in the header's `__metadata__`. Any
    program reads the tensors; `read_safetensors` gives the tree back to the bit. Types that the
    format lacks, int4 for example, are stored as the unsigned integers of their bytes.

    The [format](https://github.com/huggingface/safetensors). It needs
    `pip install '.[safetensors]'`.

    Args:
        path: the file to write.
        params: a parameter tree; default None.
        quantizers: the quantizers to save; default None.
        table: a table to save; default None.
        overwrite: whether an existing file is replaced; default False.

    Raises:
        ValueError: for a path that exists or cannot be written, where there is nothing to save,
            and for what is no array, number or text; ImportError without the extra.

    >>> jm.export.safetensors("small.safetensors", integers, quantizers)
    """
    check_flags(WRITER, overwrite=overwrite)
    library = _safetensors(WRITER)
    path = writable(path, WRITER)
    check_free(path, overwrite, WRITER)
    text, arrays = encoded(WRITER, params, quantizers, table, native=_is_native)
    # the format has no strides
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    written(path, lambda f: f.write(library.numpy.save(whole, {KEY: text})))


def read_safetensors(path: str | os.PathLike[str], *, like: Any = None) -> Saved:
    """Read what `safetensors` wrote, as `jm.load` reads what `jm.save` wrote.

    Nothing in a file is executed, and it takes no more memory than a small multiple of its size.

    Args:
        path: the safetensors file that `jm.export.safetensors` wrote.
        like: a tree whose containers the loaded parameters take; default None: dicts, lists and
            tuples.

    Returns:
        A record with `params`, `quantizers` and `table`; None where the file has none.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a folder, for a file that is damaged or that `safetensors` did not write,
            and where names, or bits and other static fields of quantizers, differ from `like`;
            ImportError without the extra.

    >>> saved = jm.export.read_safetensors("small.safetensors")
    >>> params, quantizers = saved.params, saved.quantizers
    """
    library = _safetensors(READER)
    path = readable(path, READER, f"jm.{WRITER}")
    damage = (library.SafetensorError, KeyError, ValueError, TypeError, OSError)
    try:
        with library.safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(KEY)
            arrays = {}
            if text is not None:
                arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (*damage, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"jaxmet.{READER}: {path} is cut short, damaged or no safetensors file ({error}). "
            "Save it again."
        ) from error
    if text is None:
        raise ValueError(
            f"jaxmet.{READER}: {path} has no {KEY!r} in its metadata. Give a file of "
            f"jm.{WRITER}, or read the tensors with safetensors.numpy.load_file(path)."
        )
    return decoded(READER, Path(path), text, arrays, like, writer=f"jm.{WRITER}")


def _is_native(dtype: np.dtype) -> bool:
    return dtype.name in TYPES and dtype.isnative


def _safetensors(caller: str) -> Any:
    package("safetensors.numpy", caller, "'.[safetensors]'")
    return package("safetensors", caller, "'.[safetensors]'")
