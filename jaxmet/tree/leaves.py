"""The leaf that says what a plain array cannot.

A transform changes leaves, never the shape of the tree. Where the new value needs more
than an array, for example bounds on the activation that follows, the leaf becomes a
`Compressed`. It reports the shape and dtype of the dense array that it stands for and
refuses to be computed with: `jm.lift(apply)` is what knows how to run it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.core import Tracer

from jaxmet.tree.quantized import Quantized
from jaxmet.tree.structures import (
    STRUCTURES,
    parts_of,
)
from jaxmet.tree.table import Table

OF_INPUTS = ("input_offset", "input_scale", "input_signs")
"""The fields of a leaf that are about what its layer reads."""

HELD = (*STRUCTURES, Quantized)
"""What may stand in place of an array in a leaf."""


class NotAnArrayError(TypeError, AttributeError):
    """A compressed leaf was used as an array.

    It is an `AttributeError` too, so that `hasattr(leaf, 'reshape')` is just false.
    """


def _refusal(use: str) -> NotAnArrayError:
    return NotAnArrayError(
        f"jaxmet.Compressed: {use} needs a plain array, but this leaf is compressed. "
        "Run the model through jm.lift(apply). Plain arrays are jm.rebuild(params), for a "
        "model built anew with fewer channels, and jm.densify(params), for the old one."
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Compressed:
    """One parameter together with what was done to it; fields of `None` say nothing.

    `weight` is the array itself, its integers (`Quantized`), or a structure that stands for
    one: `LowRank` factors, or what `Pruned` left. `lower` and `upper`
    bound, channel by channel, the activation that follows the layer; `input_offset` is
    what the padding before a convolution holds instead of zero, a number an input channel.
    What a dense layer reads is divided by `input_scale`, and its weight was multiplied by it:
    the function is the same, and a quantizer of the input quantizes what was divided. With
    `input_signs` it then goes through a Hadamard transform with these signs, which the weight
    undoes.
    Beside a structure nothing else is stated: its parts are leaves and state their own.
    Nothing is checked on construction, since tree functions put arbitrary objects into
    leaves.

    Args:
        weight: the array, `Quantized` integers, `LowRank` factors, what `Pruned` left, or None.
        lower: lower bounds of the activation that follows, one per output channel; default
            None: the model's own.
        upper: upper bounds, likewise; default None.
        input_offset: what the padding before a convolution holds, one number per input channel;
            default None: zero.
        input_scale: what the input of a dense layer is divided by, a number for each of its
            channels, with the rank of the weight and size 1 along outputs; default None: 1.
        input_signs: the signs, ±1 of the same form, of the Hadamard transform that the input of
            a dense layer goes through; of a loop's layers the same. Default None: no transform.

    >>> params = jm.equalize(params, graph)
    >>> logits = jm.lift(model.apply)(params, images)
    """

    weight: Any = None
    lower: Any = None
    upper: Any = None
    input_offset: Any = None
    input_scale: Any = None
    input_signs: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return tuple(np.shape(self.weight))

    @property
    def dtype(self) -> Any:
        """The dtype of the dense array."""
        return self.weight.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the dense array."""
        return math.prod(self.shape)

    def stated(self) -> dict[str, Any]:
        """The fields that say something, by name."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}

    def replace(self, **fields: Any) -> "Compressed":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **fields)

    def __repr__(self) -> str:
        shown = (f"{name}={_brief(value)}" for name, value in self.stated().items())
        return f"Compressed({', '.join(shown)})"

    def _repr_html_(self) -> str:
        shown = {name: _brief(value) for name, value in self.stated().items()}
        if is_structured(self):
            parts = parts_of(self.weight)
            shown = {name: _brief(part) for name, part in parts.items()}
            shown |= {"stands for": f"{self.dtype}{[*self.shape]}"}
        kind = type(self.weight if is_structured(self) else self).__name__
        columns = {"field": list(shown), "value": list(shown.values())}
        return Table(columns, title=kind)._repr_html_()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(jax.Array, name):
            raise _refusal(f".{name}")
        raise AttributeError(f"Compressed has no attribute {name!r}")

    __array_ufunc__ = None  # numpy then hands its operators to the refusing ones here
    __hash__ = object.__hash__


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Compressed, *operands: Any, **options: Any) -> NoReturn:
        raise _refusal(name)

    refuse.__name__ = name
    return refuse


_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and or xor"
_OTHER = (
    "jax_array array getitem setitem iter len contains bool float int complex index "
    "neg pos abs invert round lt le eq ne gt ge"
)
for _name in (*_BINARY.split(), *(f"r{n}" for n in _BINARY.split()), *_OTHER.split()):
    setattr(Compressed, f"__{_name}__", _refusing(f"__{_name}__"))

jax.tree_util.register_dataclass(
    Compressed,
    data_fields=[f.name for f in dataclasses.fields(Compressed)],
    meta_fields=[],
)


def _brief(value: Any) -> str:
    if isinstance(value, Quantized):
        return f"Quantized({value.bits} bits, {_brief(value.integers)})"
    if isinstance(value, STRUCTURES):
        parts = map(_brief, parts_of(value).values())
        return f"{type(value).__name__}({', '.join(parts)})"
    if is_compressed(value):
        return repr(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return repr(value)


def is_compressed(leaf: Any) -> bool:
    """Whether this is a compressed leaf; `is_leaf=is_compressed` keeps it whole."""
    return isinstance(leaf, Compressed)


def is_quantized(leaf: Any) -> bool:
    """Whether this is a leaf that holds the integers of its weight."""
    return is_compressed(leaf) and isinstance(leaf.weight, Quantized)


def is_structured(leaf: Any) -> bool:
    """Whether this is a compressed leaf whose weight consists of other leaves."""
    return is_compressed(leaf) and isinstance(leaf.weight, STRUCTURES)


def is_stated(leaf: Any) -> bool:
    """Whether this is a compressed leaf that holds its array itself."""
    return is_compressed(leaf) and not is_structured(leaf)


def dense(leaf: Any) -> Any:
    """The array of a leaf, whatever else it states; of integers what they stand for."""
    weight = leaf.weight if is_compressed(leaf) else leaf
    return weight.array if isinstance(weight, Quantized) else weight


def as_before(new: np.ndarray, old: Any) -> jax.Array:
    """A NumPy array as a JAX array, where the old one was put, if anywhere.

    One of another shape is whole on each of the devices that the old one was split over.
    """
    known = isinstance(old, jax.Array) and not isinstance(old, Tracer)
    where = old.sharding if known and getattr(old, "committed", True) else None
    if where is not None and new.shape != old.shape:
        mesh = getattr(where, "mesh", None)
        if mesh is not None:
            where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        elif len(where.device_set) > 1:
            where = None
    return jax.device_put(new, where)


def input_scale_of(leaf: Any) -> Any:
    """What the input of a layer with this weight is divided by, None where it is not."""
    return leaf.input_scale if is_compressed(leaf) else None


def input_signs_of(leaf: Any) -> Any:
    """The signs of the rotation of what this weight reads, None where it is not rotated."""
    return leaf.input_signs if is_compressed(leaf) else None


def with_weight(leaf: Any, array: Any) -> Any:
    """The leaf with another array, everything else it states kept."""
    return leaf.replace(weight=array) if is_compressed(leaf) else array


def to_state(leaf: Any) -> dict[str, Any]:
    """What a leaf states as nested dicts, for serializers that know only those and arrays."""
    if is_compressed(leaf):
        fields = leaf.stated()
    else:
        own = dataclasses.fields(leaf)
        fields = {"type": type(leaf).__name__} | {
            f.name: getattr(leaf, f.name) for f in own
        }
    return {name: _to_plain(value) for name, value in fields.items()}


def _to_plain(value: Any) -> Any:
    if is_compressed(value) or isinstance(value, HELD):
        return to_state(value)
    if isinstance(value, tuple):
        return {str(i): _to_plain(item) for i, item in enumerate(value)}
    return value


def from_state(leaf: Any, state: dict[str, Any]) -> Any:
    """The inverse of `to_state`; what the state does not mention is unstated."""
    del leaf
    known = {field.name for field in dataclasses.fields(Compressed)}
    if unknown := sorted(set(state) - known):
        raise ValueError(
            f"jaxmet.load: a compressed leaf has the unknown fields {unknown}. It was "
            "written by a newer version: update jaxmet."
        )
    return Compressed(**{name: _from_plain(value) for name, value in state.items()})


def _from_plain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "type" in value:
        cls = next(c for c in HELD if c.__name__ == value["type"])
        fields = {k: _from_plain(v) for k, v in value.items() if k != "type"}
        return cls(**fields)
    if "weight" in value:
        return from_state(None, value)
    return tuple(_from_plain(value[str(i)]) for i in range(len(value)))
