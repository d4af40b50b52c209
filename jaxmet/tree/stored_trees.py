"""Trees, quantizers and tables as named arrays and a manifest in JSON, whatever the file."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.numerics.calibrators import calibrator_name
from jaxmet.tree.checks import check_type, is_concrete
from jaxmet.tree.leaves import HELD, Compressed
from jaxmet.tree.named_leaves import flatten, parameter_names, path_parts
from jaxmet.tree.quantizer import QUANTIZER_LEAVES, Quantizer
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers
from jaxmet.tree.table import Table

FORMAT = "jaxmet"
VERSION = 1
STORED = (Compressed, *HELD, Quantizer, Quantizers)
TYPES = {cls.__name__: cls for cls in STORED}
"""Dataclasses that are stored field by field; a new leaf type is one entry more."""
DAMAGE = (
    *(KeyError, IndexError, TypeError, AttributeError, ValueError),
    *(RecursionError, OverflowError, MemoryError),
)


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


def encoded(
    caller: str,
    params: Any,
    quantizers: Quantizers | None,
    table: Table | None,
    *,
    native: Callable[[np.dtype], bool],
) -> tuple[str, dict[str, np.ndarray]]:
    """The manifest, and the arrays by name.

    `native` says which types the file has; of others the bytes are kept, as unsigned integers.
    """
    if params is None and quantizers is None and table is None:
        raise ValueError(
            f"jaxmet.{caller}: there is nothing to save. Give params=, quantizers= or "
            "table=."
        )
    for name, kind in (("quantizers", Quantizers), ("table", Table)):
        if isinstance(params, kind):
            raise ValueError(
                f"jaxmet.{caller}: params is of type {kind.__name__}. Write {name}=…, and "
                "params= for the tree of parameters."
            )
    if quantizers is not None:
        check_are_quantizers(quantizers, caller)
        quantizers = _without_functions(quantizers, caller)
    if table is not None:
        check_type(caller, "table", table, Table, "Give one jm.Table.")
    encoder = _Encoder(caller, native)
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if params is not None:
        manifest["params"] = encoder.tree(params)
    if quantizers is not None:
        manifest["quantizers"] = encoder.value(quantizers, "quantizers")
    if table is not None:
        columns = encoder.value(table.columns, "table")
        manifest["table"] = {"title": table.title, "columns": columns}
    return json.dumps(manifest), encoder.arrays


def decoded(
    caller: str,
    path: Path,
    text: str | bytes,
    arrays: Mapping[str, np.ndarray],
    like: Any = None,
    *,
    writer: str,
) -> Saved:
    """What a manifest and its arrays say; refused where they do not fit."""
    try:
        manifest = json.loads(text)
        found, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"jaxmet.{caller}: {path} has no readable manifest ({error}). Save it again."
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"jaxmet.{caller}: {path} has the format {found!r}. Give a file of {writer}."
        )
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"jaxmet.{caller}: {path} has version {version!r} of the format, and this is "
            f"version {VERSION}. Update jaxmet."
        )
    try:
        params, static = manifest.get("params"), None
        if params is not None:
            leaves = [_decode(leaf, arrays) for leaf in params["leaves"]]
            if like is None:
                params = _decode(params["tree"], leaves)
            else:
                static = _decode(params.get("static"), {})
                params = dict(zip(params["names"], leaves, strict=True))
        quantizers = manifest.get("quantizers")
        quantizers = None if quantizers is None else _decode(quantizers, arrays)
        table = manifest.get("table")
        if table is not None:
            table = Table(_decode(table["columns"], arrays), table["title"])
    except DAMAGE as error:
        raise ValueError(
            f"jaxmet.{caller}: {path} is damaged: {type(error).__name__} {error} while "
            "reading its manifest. Save it again."
        ) from error
    if params is not None and like is not None:
        _check_quantizers(static, like, caller)
        params = _fill(like, params, caller)
    return Saved(params, quantizers, table)


def _without_functions(quantizers: Quantizers, caller: str) -> Quantizers:
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
                    f"jaxmet.{caller}: the range of {name!r} comes from the function "
                    f"{calibrator_name(one.calibrator)}, which a file cannot hold. Make its "
                    "scale a number first, quantizers=quantizers.pin(params), or name a "
                    f"built-in one: quantizers.set({name!r}, calibrator='mse')."
                )
            groups[group][name] = dataclasses.replace(one, calibrator="minmax")
    return dataclasses.replace(quantizers, **groups)


def _fill(like: Any, leaves: Mapping[str, Any], caller: str) -> Any:
    names = parameter_names(like, whole=True)
    if set(names) != set(leaves):
        lost, extra = (sorted(a - b) for a, b in _both_ways(set(names), set(leaves)))
        raise ValueError(
            f"jaxmet.{caller}: the file and like= differ: the file lacks {lost or 'none'} "
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


def _check_quantizers(saved: Any, like: Any, caller: str) -> None:
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
            f"jaxmet.{caller}: at {path!r} the file has {found}, and like= has {expected}. Give "
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


class _Encoder:
    """Values as JSON, and the arrays that it refers to."""

    def __init__(self, caller: str, native: Callable[[np.dtype], bool]) -> None:
        self.caller, self.native = caller, native
        self.arrays: dict[str, np.ndarray] = {}

    def tree(self, params: Any) -> dict[str, Any]:
        """Leaves in order, their names, and the tree with numbers where its leaves are."""
        paths, leaves, treedef = flatten(params, whole=True)
        keys = ["/".join(("params", *path_parts(path))) for path in paths]
        numbered = treedef.unflatten(range(len(leaves)))
        return {
            "names": parameter_names(params, whole=True),
            "leaves": [
                self.value(leaf, key) for key, leaf in zip(keys, leaves, strict=True)
            ],
            "tree": self.containers(numbered, in_dict=False),
            "static": self.value(_static_of(params), ""),
        }

    def containers(self, tree: Any, *, in_dict: bool) -> Any:
        if tree is None:
            return None
        if isinstance(tree, Mapping):
            return {
                "dict": [
                    [self.key(key), self.containers(value, in_dict=True)]
                    for key, value in tree.items()
                ]
            }
        if type(tree) in (list, tuple):
            values = [self.containers(value, in_dict=False) for value in tree]
            return {type(tree).__name__: values}
        if isinstance(tree, int):
            return {"ref": tree}
        if isinstance(tree, Quantizers | Quantizer):
            return self.quantizers(tree)
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
        return self.containers(nested, in_dict=False)

    def quantizers(self, tree: Quantizers | Quantizer) -> Any:
        """Quantizers inside a tree of dicts, lists and tuples: static fields too.

        Their paths hold only arrays, so names alone would lose bits, axes and what follows.
        """
        if isinstance(tree, Quantizers):
            tree = _without_functions(tree, self.caller)
        data = {"weights", "activations", *QUANTIZER_LEAVES}
        fields = {}
        for f in dataclasses.fields(tree):
            value = getattr(tree, f.name)
            inner = f.name in data
            fields[f.name] = (
                self.containers(value, in_dict=True) if inner else self.value(value, "")
            )
        return {"type": type(tree).__name__, "fields": fields}

    def key(self, key: Any) -> str | int:
        if isinstance(key, str | int):
            return key
        raise ValueError(
            f"jaxmet.{self.caller}: the tree has the key {key!r}. Keys must be texts or integers."
        )

    def value(self, value: Any, name: str) -> Any:
        """A value as JSON; arrays are kept under names that begin so, and leave a reference."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Mapping):
            return {
                "dict": [
                    [self.key(k), self.value(v, f"{name}/{k}")]
                    for k, v in value.items()
                ]
            }
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            inner = (self.value(v, f"{name}/{i}") for i, v in enumerate(value))
            return {kind: list(inner)}
        if type(value).__name__ in TYPES:
            fields = {
                # what stands for a weight has its name, and says what its own arrays are
                f.name: self.value(
                    getattr(value, f.name),
                    name if f.name in ("weight", "part") else f"{name}/{f.name}",
                )
                for f in dataclasses.fields(value)
            }
            return {"type": type(value).__name__, "fields": fields}
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            return self.array(value, name)
        raise ValueError(
            f"jaxmet.{self.caller}: a leaf is of type {type(value).__name__}, which has no "
            "place in a file of arrays. Save arrays, numbers and texts."
        )

    def array(self, value: Any, name: str) -> dict[str, Any]:
        node: dict[str, Any] = {"array": _free_name(name, self.arrays)}
        node["numpy"] = not isinstance(value, jax.Array)
        node["scalar"] = isinstance(value, np.generic)
        if not is_concrete(value):
            raise ValueError(
                f"jaxmet.{self.caller}: a leaf is traced. Save outside of jax.jit."
            )
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            node["key"] = str(jax.random.key_impl(value))
            value = jax.random.key_data(value)
        data = np.asarray(jax.device_get(value))
        node["dtype"] = data.dtype.name
        if not self.native(data.dtype):  # the bytes are stored instead
            data = np.ascontiguousarray(data).view(f"u{data.dtype.itemsize}")
        self.arrays[node["array"]] = data.reshape(value.shape)
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
    if not re.fullmatch(r"[a-z]+\d*\w*", node["dtype"]):
        raise TypeError(f"no dtype {node['dtype']!r}")
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
