"""Compiled programs of a model, kept as long as the model: a second call compiles nothing."""

import hashlib
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from jaxmet.engine.graph.graph import WithArguments
from jaxmet.engine.program.calls import Apply, is_array
from jaxmet.tree.checks import is_concrete

KEPT = 64
"""So many programs of one model are kept, those that were used last."""

_kept: dict[int, tuple[weakref.ref, OrderedDict[Hashable, Callable]]] = {}


def program(
    apply: Apply, key: Hashable, make: Callable[[Apply], Callable], **options: Any
) -> Callable:
    """`jax.jit(make(apply), **options)`: the one from before, for the same model and key.

    The key says all that `make` depends on but the model. Arrays are arguments of what it
    returns, nothing that it closes over. Programs live as long as the model, which they do not
    keep alive. None as the key, or one without a hash: a new program.
    """
    owner, own, weakly = _owner(apply)
    full = (own, key, frozen(options))
    if owner is None or key is None or not _hashable(full):
        return jax.jit(make(apply), **options)
    return _found(owner, full, lambda: jax.jit(make(weakly), **options))


LARGEST = 2**26
"""Bytes of constants in a program that is compared by its text."""


def same_text(apply: Apply, function: Callable) -> Callable:
    """`jax.jit(function)`, compiled once for all functions that trace to the same program.

    For functions that close over a user's own code and data, such as a score: each is traced
    and lowered, and nothing is compiled that was compiled before for the same model.
    """
    owner, plain = _owner(apply)[0], jax.jit(function)
    if owner is None:
        return plain
    compiled: dict[Hashable, Callable] = {}

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        if not all(is_array(x) and is_concrete(x) for x in leaves):
            return plain(*args)
        kind = tree, tuple(map(_kind, leaves))
        if kind not in compiled:
            compiled[kind] = _compiled(owner, kind, plain, args)
        return compiled[kind](*args)

    return run


def _compiled(owner: Any, kind: Hashable, plain: Any, args: tuple) -> Callable:
    traced = plain.trace(*args)
    if sum(getattr(x, "nbytes", 0) for x in traced.jaxpr.consts) > LARGEST:
        return plain
    lowered = traced.lower()
    text = hashlib.sha256(lowered.as_text().encode()).digest()
    return _found(owner, ("text", text, kind), lowered.compile)


def _kind(x: Any) -> Hashable:
    """What a compiled program asks of an array."""
    placed = (x.sharding, x.committed) if isinstance(x, jax.Array) else None
    return x.shape, x.dtype, getattr(x, "weak_type", False), placed


def _found(owner: Any, key: Hashable, make: Callable[[], Callable]) -> Callable:
    """What is kept under a key, or made for it."""
    programs = _programs_of(owner)
    if key not in programs:
        programs[key] = make()
        if len(programs) > KEPT:
            programs.popitem(last=False)
    programs.move_to_end(key)
    return programs[key]


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
    """In place of a value that cannot be told from others."""

    __hash__ = None  # type: ignore[assignment]


def frozen(value: Any) -> Any:
    """A value as a part of a key: 1 and True differ, containers are compared by content."""
    if isinstance(value, Mapping):
        items = [(frozen(k), frozen(v)) for k, v in value.items()]
        return type(value), frozenset(items) if all(map(_hashable, items)) else items
    if isinstance(value, list | tuple):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(value)
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
