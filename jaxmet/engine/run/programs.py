"""Compiled programs of a model, kept as long as the model: a second call compiles nothing."""

import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmet.engine.program import compat
from jaxmet.engine.program.bound_model import WithArguments
from jaxmet.engine.program.calls import Apply, is_array
from jaxmet.tree.checks import is_concrete

KEPT = 64
"""So many programs of one model are kept, those that were used last."""

_kept: dict[int, tuple[weakref.ref, OrderedDict[Hashable, Callable]]] = {}


def program(
    apply: Apply, key: Hashable, make: Callable[[Apply], Callable], **options: Any
) -> Callable:
    """`jax.jit(make(apply), **options)`: the one from before, for the same model and key.

    The key says all that `make` depends on but the model; containers and random keys in it are
    compared by content. Other arrays are arguments of what it returns, nothing that it closes
    over. Programs live as long as the model, which they do not keep alive. None as the key, or
    one without a hash: a new program.
    """
    owner, own, weakly = _owner(apply)
    full = (own, frozen(key), frozen(options))
    if owner is None or key is None or not _hashable(full):
        return jax.jit(make(apply), **options)
    programs = _programs_of(owner)
    if full not in programs:
        programs[full] = jax.jit(make(weakly), **options)
        if len(programs) > KEPT:
            programs.popitem(last=False)
    programs.move_to_end(full)
    return programs[full]


def _programs_of(owner: Any) -> OrderedDict[Hashable, Callable]:
    """By identity: equal models, as linen's, may close over other things."""
    at = id(owner)
    if at not in _kept:
        gone = weakref.ref(owner, lambda _: _kept.pop(at, None))
        _kept[at] = gone, OrderedDict()
    return _kept[at][1]


def _owner(apply: Apply) -> tuple[Any, Hashable, Apply]:
    """The object that a model lives as long as, what else it is, and a call that is no owner."""
    if isinstance(apply, WithArguments):
        owner, own, weakly = _owner(apply.model)
        static = frozen(apply.static)
        return owner, (own, static), WithArguments(weakly, apply.static)
    if isinstance(apply, types.MethodType):  # made anew at each `model.apply`
        owner, function = apply.__self__, apply.__func__
        call = lambda it: types.MethodType(function, it)
    else:
        owner, function, call = apply, None, lambda it: it
    try:
        held = weakref.ref(owner)
    except TypeError:
        return None, None, apply

    def weakly(*args: Any, **kwargs: Any) -> Any:
        return call(held())(*args, **kwargs)

    return owner, function, weakly


class _Unhashable:
    """In place of a value that cannot be compared with others."""

    __hash__ = None  # type: ignore[assignment]


def frozen(value: Any) -> Any:
    """A value as a part of a key: 1 and True differ.

    Containers and random keys are compared by content.
    """
    if isinstance(value, Mapping):
        items = [(frozen(k), frozen(v)) for k, v in value.items()]
        return type(value), frozenset(items) if all(map(_hashable, items)) else items
    if isinstance(value, list | tuple):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(value)
    if isinstance(value, jax.Array) and compat.is_key(value) and is_concrete(value):
        numbers = np.asarray(jax.random.key_data(value))
        return str(value.dtype), numbers.shape, numbers.tobytes()
    return (type(value), value) if _hashable(value) else _Unhashable()


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def split_keywords(
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments that are arrays throughout, as data of a program, and the others."""
    arrays = {k: v for k, v in kwargs.items() if _is_data(v)}
    return arrays, {k: v for k, v in kwargs.items() if k not in arrays}


def _is_data(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(map(is_array, leaves))
