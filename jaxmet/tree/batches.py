"""Batches: one form that every method reads, whatever the user has."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.tree.batched_data import Batched
from jaxmet.tree.checks import check_callable, is_concrete, keys_of, kind_of

CURE = "Give jm.batched(x, batch_size=32), or a list of batches"


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """What is known of a batch besides the model's inputs, after which it comes.

    `mask` says where values count, in the leading axes of the inputs; `number` counts batches.
    """

    mask: Any = None
    number: Any = None


jax.tree_util.register_dataclass(BatchInfo, ["mask", "number"], [])


def inputs_of(batch: Sequence[Any]) -> tuple[tuple[Any, ...], BatchInfo]:
    """The inputs of the model, and what else is known of the batch."""
    if batch and isinstance(batch[-1], BatchInfo):
        return tuple(batch[:-1]), batch[-1]
    return tuple(batch), BatchInfo()


class Batches:
    """Batches made uniform: each is the tuple of the model's inputs, and its `BatchInfo`.

    `BatchInfo` is there where a mask was given. `first` are the inputs of the first batch,
    `first_batch` all of it, `length` their number or None where it is not known,
    `source` what was given. `abstract` says that there are shapes only, and then
    iterating yields nothing. The first pass goes on where looking at `first` stopped,
    so nothing of a generator is lost.
    """

    def __init__(
        self,
        source: Any,
        function: str,
        arguments: Callable[[Any], tuple[Any, ...]],
        first: Any,
        started: Iterator[Any] | None,
        length: int | None,
    ) -> None:
        self.source = source
        self.arguments = arguments
        self.first_batch = arguments(first)
        self.first, info = inputs_of(self.first_batch)
        self.masked = info.mask is not None
        self.length = length
        self.abstract = _is_abstract(self.first)
        self._function = function
        self._started = started

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of batches is not known before they are read")
        return self.length

    def __bool__(self) -> bool:
        return True

    @property
    def one_shot(self) -> bool:
        """Whether the data can be read once only."""
        return _is_one_shot(self.source)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self.abstract:
            return iter(())
        started, self._started = self._started, None
        if started is None and self.one_shot:
            raise ValueError(_one_shot(self._function, "was already read"))
        return map(self.arguments, self.source if started is None else started)


def as_batches(
    batches: Any,
    function: str,
    passes: int = 1,
    *,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    abstract: bool = False,
) -> Batches:
    """What the user gave as batches, checked before any long work.

    `function` is the name for errors and `passes` how often the data will be read. A
    tuple is splatted into the model's inputs; `inputs` picks them from a batch that
    holds more, and `mask` says of it where values count. With `abstract`,
    `jax.ShapeDtypeStruct` may stand for an absent batch.
    """
    check_batch_functions(function, inputs, mask)

    def arguments(batch: Any) -> tuple[Any, ...]:
        picked = batch if inputs is None else inputs(batch)
        picked = picked if isinstance(picked, tuple) else (picked,)
        found = jax.tree_util.tree_map_with_path(
            lambda path, x: _array(x, path, picked, function), picked
        )
        if mask is None or _is_abstract(found):
            return found
        return *found, BatchInfo(mask=_checked_mask(mask(batch), found, function))

    inputs_alone = isinstance(batches, tuple | Mapping | jax.ShapeDtypeStruct)
    if inputs_alone and _is_abstract(batches):
        checked = Batches(batches, function, arguments, batches, None, 0)
    else:
        source = _iterable(batches, function)
        if passes > 1 and _is_one_shot(batches):
            raise ValueError(_one_shot(function, f"is read {passes} times here"))
        iterator = iter(source)
        try:
            first = next(iterator)
        except StopIteration:
            raise ValueError(f"jaxmet.{function}: batches is empty. {CURE}.") from None
        started = itertools.chain([first], iterator)
        length = _length(batches)
        checked = Batches(batches, function, arguments, first, started, length)
    if checked.abstract and not abstract:
        raise ValueError(
            f"jaxmet.{function}: batches holds shapes and no numbers, but this needs "
            f"data. {CURE}."
        )
    _refuse_bad_values(checked.first, function)
    if checked.masked:
        _refuse_empty_mask(checked.first_batch[-1].mask, function)
    return checked


MASK = (
    "mask= is a function that says of a batch where values count, True where they do: "
    "mask=lambda batch: batch['attention_mask'] > 0."
)


INPUTS = (
    "inputs= is a function of a batch that returns what the model takes: "
    "inputs=lambda batch: batch['image']."
)


def check_batch_functions(function: str, inputs: Any, mask: Any) -> None:
    """Raise unless `inputs=` and `mask=` are functions of a batch, whether there is data or not."""
    for name, value, cure in (("inputs", inputs, INPUTS), ("mask", mask, MASK)):
        if value is not None:
            check_callable(function, name, value, cure)


def _checked_mask(mask: Any, inputs: tuple[Any, ...], function: str) -> Any:
    """A boolean array along the leading axes of some input."""
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype"):
        raise ValueError(
            f"jaxmet.{function}: mask= returned {kind_of(mask)}, not an array. {MASK}"
        )
    if mask.dtype != np.bool_:
        raise ValueError(
            f"jaxmet.{function}: mask= returned an array of {mask.dtype}, not of booleans. "
            f"{MASK}"
        )
    shapes = [tuple(x.shape) for x in jax.tree.leaves(inputs)]
    shape = tuple(mask.shape)
    if not shape or all(s[: len(shape)] != shape for s in shapes):
        raise ValueError(
            f"jaxmet.{function}: mask= returned an array of shape {shape}, which are the "
            f"leading axes of none of the inputs, of shapes {', '.join(map(str, shapes))}. "
            "Give one value for each example, or for each of its positions."
        )
    return np.asarray(mask) if not isinstance(mask, jax.Array) else mask


def _refuse_empty_mask(mask: Any, function: str) -> None:
    if not is_concrete(mask):
        return
    with jax.ensure_compile_time_eval():
        some = bool(np.any(mask) if isinstance(mask, np.ndarray) else jnp.any(mask))
    if not some:
        raise ValueError(
            f"jaxmet.{function}: mask= says of the first batch that none of its values "
            f"count. {MASK}"
        )


ONE = "Give one batch: the inputs of the model as an array, or a tuple of arrays"


def one_batch(
    batch: Any, function: str, mask: Callable[[Any], Any] | None = None
) -> tuple[Any, ...]:
    """The inputs that one batch holds, a tuple being all of them, and its mask."""
    if isinstance(batch, Batched):
        raise ValueError(
            f"jaxmet.{function}: batch is all the data, in batches. {ONE}."
        )
    several = isinstance(batch, list) or (
        isinstance(batch, Iterable) and not hasattr(batch, "shape")
    )
    if several and not isinstance(batch, tuple | Mapping):
        raise ValueError(
            f"jaxmet.{function}: batch is {kind_of(batch)}, which could be several. {ONE}."
        )
    if not jax.tree.leaves(batch):
        raise ValueError(f"jaxmet.{function}: batch is empty. {ONE}.")
    return as_batches([batch], function, mask=mask).first_batch


def _iterable(batches: Any, function: str) -> Iterable[Any]:
    """The batches, unless they are something else that can be iterated."""
    if hasattr(batches, "shape"):
        raise ValueError(
            f"jaxmet.{function}: batches is {kind_of(batches)}, which could be one batch "
            f"or all the data. {CURE}."
        )
    if isinstance(batches, tuple):
        raise ValueError(
            f"jaxmet.{function}: batches is a tuple of {len(batches)}, which could be "
            f"the inputs of one batch or several batches. {CURE}."
        )
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise ValueError(f"jaxmet.{function}: batches is {kind_of(batches)}. {CURE}.")
    return batches


def _refuse_bad_values(arguments: tuple[Any, ...], function: str) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(arguments):
        name = f"input {path[0].idx}{jax.tree_util.keystr(path[1:])}"
        if isinstance(x, jax.ShapeDtypeStruct):
            continue
        if math.prod(x.shape) == 0:
            raise ValueError(
                f"jaxmet.{function}: {name} of the first batch is empty, its shape is "
                f"{tuple(x.shape)}. {CURE}."
            )
        if not is_concrete(x) or not jnp.issubdtype(x.dtype, jnp.inexact):
            continue
        with jax.ensure_compile_time_eval():  # under jit the batches may be constants
            fine = _without_bad_values(x)
        if not fine:
            raise ValueError(
                f"jaxmet.{function}: {name} of the first batch has NaN or infinite "
                "values. Clean the data first."
            )


def _without_bad_values(x: Any) -> bool:
    """Whether all is finite or −∞, which may be a mask: who observes values refuses it there."""
    if isinstance(x, jax.Array):
        on_cpu = {d.platform for d in x.devices()} == {"cpu"}
        if not (on_cpu and x.is_fully_addressable):
            return bool(_finite_or_mask(x))
        x = np.asarray(x)  # no copy on CPU, and nothing to compile
    return bool((np.isfinite(x) | (x == -np.inf)).all())


@jax.jit
def _finite_or_mask(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x) | (x == -jnp.inf))


def _one_shot(function: str, what: str) -> str:
    return (
        f"jaxmet.{function}: batches is an iterator that can be read once, and it "
        f"{what}. Give list(batches), jm.batched(x, batch_size=32), or an object that "
        "starts again whenever it is iterated."
    )


def _is_one_shot(batches: Any) -> bool:
    return hasattr(batches, "__next__")  # only then is it its own iterator


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # loaders that have a length but do not know it say so like this
        return None


def _is_abstract(tree: Any) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def _array(x: Any, path: tuple[Any, ...], batch: tuple[Any, ...], function: str) -> Any:
    if isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return x
    if hasattr(x, "__array__") and hasattr(x, "shape"):
        return np.asarray(x)
    cure = inputs_from(batch) if isinstance(batch[0], Mapping) else f"{CURE}."
    raise ValueError(
        f"jaxmet.{function}: a batch holds {kind_of(x)} where an array belongs, in input "
        f"{path[0].idx}{jax.tree_util.keystr(path[1:])}. {cure}"
    )


def inputs_from(batch: tuple[Any, ...]) -> str:
    """How to choose the model's inputs from a batch that it did not accept."""
    if len(batch) == 1 and isinstance(batch[0], Mapping):
        keys = [*batch[0]]
        chosen = f"batch[{keys[0]!r}]" if keys else "…"
        return (
            f"A batch is a {type(batch[0]).__name__} with {keys_of(batch[0])}: choose the "
            f"inputs among them, for example inputs=lambda batch: {chosen}."
        )
    return (
        "If the loader yields more than the inputs, choose them: "
        "inputs=lambda batch: batch[0]."
    )
