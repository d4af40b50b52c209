"""One file for a model: npz with a JSON manifest, no pickle, written atomically."""

import dataclasses
import functools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.calibrators import calibrator_name
from jaxmet.tree.checks import check_flags, check_type, is_concrete
from jaxmet.tree.leaves import HELD, Compressed, flatten
from jaxmet.tree.names import parameter_names
from jaxmet.tree.paths import path_parts
from jaxmet.tree.quantizer import QUANTIZER_LEAVES, Quantizer
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers
from jaxmet.tree.table import Table
from jaxmet.tree.writing import readable, writable, written

FORMAT = "jaxmet"
VERSION = 1
STORED = (Compressed, *HELD, Quantizer, Quantizers)
TYPES = {cls.__name__: cls for cls in STORED}
"""Dataclasses that are stored field by field; a new leaf type is one entry more."""


@dataclasses.dataclass(frozen=True)
class Saved(Mapping[str, Any]):
    """The contents: `saved.params` or `saved['params']`; what it did not is None."""

    params: Any = None
    quantizers: Any = None
    table: Any = None

    def _held(self) -> dict[str, Any]:
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}

    def __getitem__(self, name: str) -> Any:
        return self._held()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())


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
    containers with its `like`. The file appears under its name only when it is complete.

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
    if params is None and quantizers is None and table is None:
        raise ValueError(
            "jaxmet.save: there is nothing to save. Give params=, quantizers= or "
            "table=."
        )
    for name, kind in (("quantizers", Quantizers), ("table", Table)):
        if isinstance(params, kind):
            raise ValueError(
                f"jaxmet.save: params is of type {kind.__name__}. Write {name}=…, and params= "
                "for the tree of parameters."
            )
    if quantizers is not None:
        check_are_quantizers(quantizers, "save")
        quantizers = _without_functions(quantizers)
    if table is not None:
        check_type("save", "table", table, Table, "Give one jm.Table.")
    check_flags("save", compress=compress)
    path = writable(path, "save")
    arrays: dict[str, np.ndarray] = {}
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if params is not None:
        manifest["params"] = _encode_tree(params, arrays)
    if quantizers is not None:
        manifest["quantizers"] = _encode(quantizers, arrays, "quantizers")
    if table is not None:
        columns = _encode(table.columns, arrays, "table")
        manifest["table"] = {"title": table.title, "columns": columns}
    text = json.dumps(manifest).encode()
    arrays["manifest"] = np.frombuffer(text, np.uint8)
    # The names of arrays begin with 'params/' and the like, or are 'manifest': none is an option
    write = np.savez_compressed if compress else np.savez
    written(path, lambda f: write(f, **arrays))  # pyright: ignore[reportArgumentType]


def _without_functions(quantizers: Quantizers) -> Quantizers:
    """The same with no function as a calibrator: a file holds none.

    Where the scale is a number the calibrator has done its work, and is dropped.
    """
    groups = {}
    for group in ("weights", "activations"):
        groups[group] = dict(getattr(quantizers, group))
        for name, one in groups[group].items():
            if not callable(one.calibrator):
                continue
            if one.follows and one.active:
                raise ValueError(
                    f"jaxmet.save: the range of {name!r} comes from the function "
                    f"{calibrator_name(one.calibrator)}, which a file cannot hold. Make its "
                    "scale a number first, quantizers=quantizers.pin(params), or name a "
                    f"built-in one: quantizers.set({name!r}, calibrator='mse')."
                )
            groups[group][name] = dataclasses.replace(one, calibrator="minmax")
    return dataclasses.replace(quantizers, **groups)


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
    manifest, arrays = _read(path)
    try:
        params = manifest.get("params")
        if params is not None:
            leaves = [_decode(leaf, arrays) for leaf in params["leaves"]]
            if like is None:
                params = _decode(params["tree"], leaves)
            else:
                _check_quantizers(_decode(params.get("static"), {}), like)
                params = _fill(like, dict(zip(params["names"], leaves, strict=True)))
        quantizers = manifest.get("quantizers")
        quantizers = None if quantizers is None else _decode(quantizers, arrays)
        table = manifest.get("table")
        if table is not None:
            table = Table(_decode(table["columns"], arrays), table["title"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"jaxmet.load: {path} is damaged: {type(error).__name__} {error} while "
            "reading its manifest. Save it again."
        ) from error
    return Saved(params, quantizers, table)


def _fill(like: Any, leaves: Mapping[str, Any]) -> Any:
    names = parameter_names(like, whole=True)
    if set(names) != set(leaves):
        lost, extra = (sorted(a - b) for a, b in _both_ways(set(names), set(leaves)))
        raise ValueError(
            f"jaxmet.load: the file and like= differ: the file lacks {lost or 'none'} "
            f"and like lacks {extra or 'none'}. Give the tree of the same model."
        )
    _, old, treedef = flatten(like, whole=True)
    pairs = zip(names, old, strict=True)
    return treedef.unflatten([_contained(leaf, leaves[name]) for name, leaf in pairs])


def _static_of(tree: Any) -> dict[str, dict[str, Any]]:
    """By path what is static of each quantizer in a tree, whatever contains it."""
    fields = [f.name for f in dataclasses.fields(Quantizer)]
    static = [name for name in fields if name not in QUANTIZER_LEAVES]
    found = {}
    for kind, names in ((Quantizers, ("shared", "derived")), (Quantizer, static)):
        is_one = functools.partial(lambda kind, x: isinstance(x, kind), kind)
        for path, one in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_one):
            if is_one(one):
                values = {name: getattr(one, name) for name in names}
                if callable(values.get("calibrator")):  # as `_without_functions` has it
                    values["calibrator"] = "minmax"
                found["/".join(path_parts(path)) or "params"] = values
    return found


def _check_quantizers(saved: Any, like: Any) -> None:
    """Refuse quantizers in `like` whose static fields are not those of the file.

    Their names are those of arrays alone, so bits and axes would silently be those of `like`.
    """
    if saved is None:  # written before these fields were
        return
    given = _static_of(like)
    for path in [*saved, *given]:
        ours, theirs = saved.get(path), given.get(path)
        if ours == theirs:
            continue
        if ours is None or theirs is None:
            pair = ("no quantizer", "one") if ours is None else ("a quantizer", "none")
        else:
            other = [name for name in theirs if ours.get(name) != theirs[name]]
            pair = (
                ", ".join(f"{name}={v.get(name)!r}" for name in other)
                for v in (ours, theirs)
            )
        found, expected = pair
        raise ValueError(
            f"jaxmet.load: at {path!r} the file has {found}, and like= has {expected}. Give "
            "the tree that was saved, or load without like=."
        )


def _contained(like: Any, found: Any) -> Any:
    """What a leaf holds, its empty containers as in `like` (optax masks with its own)."""
    if isinstance(found, tuple) and not found and not jax.tree.leaves(like):
        return like
    if not isinstance(found, STORED) or type(found) is not type(like):
        return found
    fields = {
        f.name: _contained(getattr(like, f.name), getattr(found, f.name))
        for f in dataclasses.fields(found)
    }
    return type(found)(**fields)


def _both_ways(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    yield a, b
    yield b, a


def _encode_tree(params: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Leaves in order, their names, and the tree with numbers where its leaves are."""
    paths, leaves, treedef = flatten(params, whole=True)
    keys = ["/".join(("params", *path_parts(path))) for path in paths]
    numbered = treedef.unflatten(range(len(leaves)))
    return {
        "names": parameter_names(params, whole=True),
        "leaves": [
            _encode(leaf, arrays, key) for key, leaf in zip(keys, leaves, strict=True)
        ],
        "tree": _encode_containers(numbered, in_dict=False),
        "static": _encode(_static_of(params), {}, ""),
    }


def _encode_containers(tree: Any, *, in_dict: bool) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {
            "dict": [
                [_key(key), _encode_containers(value, in_dict=True)]
                for key, value in tree.items()
            ]
        }
    if type(tree) in (list, tuple):
        values = [_encode_containers(value, in_dict=False) for value in tree]
        return {type(tree).__name__: values}
    if isinstance(tree, int):
        return {"ref": tree}
    if isinstance(tree, Quantizers | Quantizer):
        return _encode_quantizers(tree)
    # Another container: nested dicts by path, with the names that its leaves have.
    nested: dict[str, Any] = {}
    before = (jax.tree_util.DictKey(""),) if in_dict else ()
    for path, number in jax.tree_util.tree_leaves_with_path(tree):
        parts = path_parts((*before, *path))[len(before) :]
        if not parts:
            return {"ref": number}
        inner = nested
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
        inner[parts[-1]] = number
    return _encode_containers(nested, in_dict=False)


def _encode_quantizers(tree: Quantizers | Quantizer) -> Any:
    """Quantizers inside a tree of dicts, lists and tuples: static fields too.

    Their paths hold only arrays, so names alone would lose bits, axes and what follows.
    """
    if isinstance(tree, Quantizers):
        tree = _without_functions(tree)
    data = {"weights", "activations", *QUANTIZER_LEAVES}
    fields = {}
    for f in dataclasses.fields(tree):
        value = getattr(tree, f.name)
        inner = f.name in data
        fields[f.name] = (
            _encode_containers(value, in_dict=True) if inner else _encode(value, {}, "")
        )
    return {"type": type(tree).__name__, "fields": fields}


def _key(key: Any) -> str | int:
    if isinstance(key, str | int):
        return key
    raise ValueError(
        f"jaxmet.save: the tree has the key {key!r}. Keys must be texts or integers."
    )


def _encode(value: Any, arrays: dict[str, np.ndarray], name: str) -> Any:
    """A value as JSON; arrays go to `arrays`, under names that begin so, and leave a reference."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_key(k), _encode(v, arrays, f"{name}/{k}")] for k, v in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        inner = (_encode(v, arrays, f"{name}/{i}") for i, v in enumerate(value))
        return {kind: list(inner)}
    if type(value).__name__ in TYPES:
        fields = {
            # what stands for a weight has its name, and says what its own arrays are
            f.name: _encode(
                getattr(value, f.name),
                arrays,
                name if f.name in ("weight", "part") else f"{name}/{f.name}",
            )
            for f in dataclasses.fields(value)
        }
        return {"type": type(value).__name__, "fields": fields}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _encode_array(value, arrays, name)
    raise ValueError(
        f"jaxmet.save: a leaf is of type {type(value).__name__}, which has no place in "
        "a file of arrays. Save arrays, numbers and texts."
    )


def _encode_array(
    value: Any, arrays: dict[str, np.ndarray], name: str
) -> dict[str, Any]:
    node: dict[str, Any] = {"array": _free_name(name, arrays)}
    node["numpy"] = not isinstance(value, jax.Array)
    node["scalar"] = isinstance(value, np.generic)
    if not is_concrete(value):
        raise ValueError("jaxmet.save: a leaf is traced. Save outside of jax.jit.")
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        node["key"] = str(jax.random.key_impl(value))
        value = jax.random.key_data(value)
    data = np.asarray(jax.device_get(value))
    node["dtype"] = data.dtype.name
    if data.dtype.kind not in "biufc" or data.dtype.isbuiltin != 1:
        # Numpy forgets types it does not define: their bytes are stored instead.
        data = np.ascontiguousarray(data).view(f"u{data.dtype.itemsize}")
    arrays[node["array"]] = data.reshape(value.shape)
    return node


def _decode(node: Any, arrays: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if "ref" in node:
        return arrays[node["ref"]]
    if "dict" in node:
        return {key: _decode(value, arrays) for key, value in node["dict"]}
    if "list" in node:
        return [_decode(value, arrays) for value in node["list"]]
    if "tuple" in node:
        return tuple(_decode(value, arrays) for value in node["tuple"])
    if "type" in node:
        fields = {k: _decode(v, arrays) for k, v in node["fields"].items()}
        return TYPES[node["type"]](**fields)
    data = arrays[node["array"]]
    dtype = jnp.dtype(node["dtype"])
    data = data if data.dtype == dtype else data.view(dtype)
    if "key" in node:
        return jax.random.wrap_key_data(jnp.asarray(data), impl=node["key"])
    if node["numpy"]:
        return data[()] if node["scalar"] else data
    return jnp.asarray(data)


def _free_name(name: str, arrays: Mapping[str, Any]) -> str:
    """A name for a file in the archive: no path out of it, and not taken."""
    parts = [re.sub(r"[^\w.=@+-]", "_", part) for part in name.split("/")]
    clean = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    return clean if clean not in arrays else f"{clean}@{len(arrays)}"


_DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest and all arrays, or an error that says what the file is."""

    def refusal(found: str, cure: str) -> ValueError:
        return ValueError(f"jaxmet.load: {path} {found}. {cure}.")

    with open(path, "rb") as file:
        start = file.read(4)
        if not start:
            raise refusal("is empty", "Save it again")
        if start[:2] != b"PK":
            found = f"starts with {start!r}: no npz file"
            raise refusal(found, "Give a file of jm.save")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as npz:
                arrays = {name: npz[name] for name in npz.files}
        except _DAMAGE as error:
            found = f"is cut short or damaged ({error})"
            raise refusal(found, "Save it again") from error
    if "manifest" not in arrays:
        raise refusal(
            f"is an npz of {sorted(arrays)[:5]} and has no manifest",
            "Give a file of jm.save",
        )
    try:
        manifest = json.loads(arrays["manifest"].tobytes())
        found, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise refusal(f"has no readable manifest ({error})", "Save it again") from error
    if found != FORMAT:
        raise refusal(f"has the format {found!r}", "Give a file of jm.save")
    if not isinstance(version, int) or version > VERSION:
        raise refusal(
            f"has version {version!r} of the format, and this is version {VERSION}",
            "Update jaxmet",
        )
    return manifest, arrays
