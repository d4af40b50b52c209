"""Leaves as equations meet them: arrays, parts of arrays, or two factors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxmet.engine.pruned.partial import Partial, taken, whole
from jaxmet.tree.leaves import Compressed, dense
from jaxmet.tree.structures import Keep, LowRank, Pruned, multiplied


def like(leaf: Any, array: Any) -> Any:
    """The array as the leaf would hold it: what is left of it of what was pruned."""
    weight = dense(leaf)
    if not isinstance(weight, Pruned):
        return array
    part = like(weight.part, taken(array, weight.keep))
    return leaf.replace(weight=dataclasses.replace(weight, part=part))


def opened(leaf: Any) -> Any:
    """A leaf as the equations meet it: an array, a part of one, or two factors.

    What is open already stays unchanged.
    """
    weight = dense(leaf)
    if not isinstance(weight, Pruned):
        return weight
    if not weight.keep:
        return opened(weight.part)
    part = opened(weight.part)
    if isinstance(part, Partial):  # pruned twice: places of places
        return Partial(part.part, composed(weight.keep, part.keep))
    if not isinstance(part, LowRank):
        return Partial(part, weight.keep)
    ins = tuple(k for k in weight.keep if k.axis in part.in_axes)
    outs = tuple(k for k in weight.keep if k.axis in part.out_axes)
    first, second = (
        Compressed(Pruned(factor, keep))
        for factor, keep in ((part.first, ins), (part.second, outs))
    )
    return dataclasses.replace(part, first=first, second=second, shape=weight.shape)


def composed(outer: Sequence[Keep], inner: Sequence[Keep]) -> tuple[Keep, ...]:
    """What is kept of a whole array where the kept part of it was cut again."""
    found = {k.axis: k for k in outer}
    for axis, size, indices in inner:
        if axis in found:
            before = found[axis]
            indices = tuple(before.indices[i] for i in indices)
            size = before.size
        found[axis] = Keep(axis, size, indices)
    return tuple(found[axis] for axis in sorted(found))


def multiply(x: LowRank) -> Any:
    """The weight that two factors stand for."""
    return multiplied(x, *(whole(opened(part)) for part in (x.first, x.second)))
