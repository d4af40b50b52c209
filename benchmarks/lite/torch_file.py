"""Tensors of a file that `torch.save` wrote before version 1.6, without running anything in it.

The file holds five pickles (a magic number, the protocol, the sizes of types, the tensors as
references to storages, the keys of the storages) and then, for each key, the number of its
elements (int64, little endian) and their bytes. Of the classes a pickle may name only those
that say where a tensor lies are known here; any other name is refused before it is looked up.
"""

import collections
import pickle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {"FloatStorage": np.float32, "LongStorage": np.int64}


class View(NamedTuple):
    """Where in a storage a tensor lies; offset and strides in elements."""

    key: str
    dtype: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Reader(pickle.Unpickler):
    """Reads references to storages and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if module_name == "torch" and global_name in DTYPES:
            return DTYPES[global_name]
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> tuple[str, Any]:
        kind, dtype, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind}")
        return key, dtype


def _view(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> View:
    key, dtype = storage
    return View(key, dtype, offset, tuple(shape), tuple(strides))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name. Raises ValueError, naming the file, for anything but such a file."""
    try:
        with path.open("rb") as file:
            return _read(file)
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, TypeError,
            AttributeError, OverflowError, UnicodeDecodeError, MemoryError) as error:  # fmt: skip
        raise ValueError(
            f"{path}: this is not, or no longer, a file of tensors in torch's legacy format "
            f"({error or type(error).__name__}). Get it again."
        ) from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    if Reader(file).load() != MAGIC:
        raise ValueError("it begins otherwise")
    Reader(file).load()
    if not Reader(file).load()["little_endian"]:
        raise ValueError("its numbers are big-endian")
    views, keys = Reader(file).load(), Reader(file).load()
    dtypes = {view.key: np.dtype(view.dtype) for view in views.values()}
    if set(keys) != set(dtypes):
        raise ValueError("its list of storages does not match its tensors")
    storages = {key: _storage(file, dtypes[key]) for key in keys}
    if file.read(1):
        raise ValueError("there is more after its end")
    return {name: _tensor(view, storages[view.key]) for name, view in views.items()}


def _storage(file: BinaryIO, dtype: np.dtype) -> np.ndarray:
    head = file.read(8)
    number = int.from_bytes(head, "little")
    content = file.read(number * dtype.itemsize) if len(head) == 8 else b""
    if len(head) < 8 or len(content) < number * dtype.itemsize:
        raise ValueError("it is cut short")
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype)


def _tensor(view: View, storage: np.ndarray) -> np.ndarray:
    extent = zip(view.shape, view.strides, strict=True)
    last = view.offset + sum((n - 1) * s for n, s in extent)
    if view.offset < 0 or min(view.strides, default=0) < 0 or last >= storage.size:
        raise ValueError("a tensor lies outside its storage")
    strides = [s * storage.itemsize for s in view.strides]
    return np.lib.stride_tricks.as_strided(
        storage[view.offset :], view.shape, strides, writeable=False
    ).copy()
