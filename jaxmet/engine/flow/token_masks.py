"""Where values count, next to the values: masks of the inputs followed through a program."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.engine.flow.token_mask_rules import LostError, Mask, joined, masks_of
from jaxmet.engine.program import compat
from jaxmet.engine.program.program import (
    Equation,
    Region,
    Value,
    body_operands,
    flatten,
)


@dataclasses.dataclass(frozen=True)
class Lost:
    """In place of a mask: it is not known which values count, and why."""

    why: str


Kept = Mask | Lost


def on_input(mask: jax.Array, shape: Sequence[int]) -> Mask:
    """The mask of one input: along its leading axes, or of whole examples where it has others.

    An example counts where any of its positions does.
    """
    rows = mask.shape[:1]
    if tuple(shape[: mask.ndim]) == mask.shape:
        return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
    if tuple(shape[:1]) == rows and mask.ndim:
        whole = jnp.any(mask, axis=tuple(range(1, mask.ndim)))
        return whole.reshape(rows + (1,) * (len(shape) - 1))
    return None


class TokenMasks:
    """The masks of the values of one region, filled in as its equations run."""

    def __init__(self, values: Sequence[Value], masks: Sequence[Kept]) -> None:
        self.known: dict[Value, Kept] = {}
        self.put(values, masks)

    def put(self, values: Sequence[Value], masks: Sequence[Kept]) -> None:
        """Set the masks of some values."""
        for value, mask in zip(values, masks, strict=True):
            if mask is not None:
                self.known[value] = mask

    def of(self, value: Value) -> Kept:
        """The mask of a value; None where all of it counts."""
        return self.known.get(value)

    def follow(self, equation: Equation, environment: Any) -> None:
        """Give the results of an equation their masks."""
        masks = [self.of(v) for v in equation.operands]
        if all(m is None for m in masks):
            return
        if equation.bodies:
            self.put(equation.results, _of_bodies(equation, masks))
            return

        def read(value: Value) -> Any:
            return environment[value] if value in environment else value.constant

        self.put(equation.results, _of_equation(equation, masks, read))


def _of_equation(equation: Equation, masks: list[Kept], read: Any) -> list[Kept]:
    lost = next((m for m in masks if isinstance(m, Lost)), None)
    known: list[Mask] = [None if isinstance(m, Lost) else m for m in masks]
    if lost is not None and all(m is None for m in known):
        return [lost for _ in equation.results]
    if equation.name in compat.CUSTOM:
        body = flatten(compat.call_body(equation.params))
        inputs = known[len(known) - len(body.inputs) :]
        return followed(body, list(inputs))
    try:
        return list(masks_of(equation, known, read))
    except LostError as error:
        return [Lost(str(error)) for _ in equation.results]


def followed(region: Region, masks: Sequence[Kept]) -> list[Kept]:
    """The masks of a region's outputs, from those of its inputs alone."""
    inside = TokenMasks(region.inputs, masks)
    for equation in region.equations:
        inside.follow(equation, {})
    return [inside.of(v) for v in region.outputs]


def _of_bodies(equation: Equation, masks: list[Kept]) -> list[Kept]:
    """Masks after a loop or a branch."""
    if equation.name == "while":
        return [Lost("a while loop") for _ in equation.results]
    if equation.name == "scan":
        return _of_scan(equation, masks)
    every = [
        followed(body, [masks[equation.operands.index(v)] for v in outer])
        for body, outer in zip(equation.bodies, body_operands(equation), strict=True)
    ]
    return [_both(each) for each in zip(*every, strict=True)]


def _both(masks: Sequence[Kept]) -> Kept:
    lost = next((m for m in masks if isinstance(m, Lost)), None)
    return lost or joined([m for m in masks if not isinstance(m, Lost)])


def _of_scan(equation: Equation, masks: list[Kept]) -> list[Kept]:
    plan = ScanMasks(equation, masks)

    def body(carry: Any, slices: Any) -> Any:
        return plan.outside(followed(equation.bodies[0], plan.inside(carry, slices)))

    found = lax.scan(
        body,
        plan.carry,
        plan.slices,
        length=equation.params["length"],
        reverse=equation.params["reverse"],
    )
    return plan.results(*found)


class ScanMasks:
    """The masks of a loop: those of what it carries, and of what it slices.

    A loop over positions, as a recurrent layer is, runs each step at its own position: what it
    carries counts there where the step does. In another loop, as one over layers, what it
    carries has its own mask.
    """

    def __init__(self, equation: Equation, masks: Sequence[Kept]) -> None:
        self.equation = equation
        skip, self.count = compat.scan_arity(equation.params)
        self.constants = list(masks[:skip])
        self.start = list(masks[skip : skip + self.count])
        self.xs = list(masks[skip + self.count :])
        region = equation.bodies[0]
        self.carried = region.inputs[skip : skip + self.count]
        self.sliced = region.inputs[skip + self.count :]
        self.slices = [m for m in self.xs if _varies(m)]
        self.steps = bool(self.slices)
        self.kinds: list[Kept] = list(self.start)
        self.carry: list[jax.Array] = []
        if not self.steps:
            self._settle()
            pairs = zip(self.kinds, self.start, strict=True)
            self.carry = [_as(k, m) for k, m in pairs if isinstance(k, np.ndarray)]
        self.ys: list[Kept] = []

    def _settle(self) -> None:
        """The shapes that the masks of carried values have from round to round."""
        shapes: list[Any] = [_shape(m) for m in self.start]
        first = [m if not _varies(m) else None for m in self.xs]
        for _ in range(8):
            found: list[Kept] = []

            def once(masks: list[Any], found: list[Kept] = found) -> None:
                inputs = [*self.constants, *masks, *map(_slice_of, first)]
                found[:] = followed(self.equation.bodies[0], inputs)[: self.count]
                found[:] = [_shape(m) for m in found]

            given = [
                jnp.ones(s.shape, bool) if isinstance(s, np.ndarray) else s
                for s in shapes
            ]
            jax.eval_shape(lambda once=once, given=given: once(given))
            new = [_larger(a, b) for a, b in zip(shapes, found, strict=True)]
            if [_key(s) for s in new] == [_key(s) for s in shapes]:
                break
            shapes = new
        self.kinds = shapes

    def inside(
        self, carry: Sequence[jax.Array], slices: Sequence[jax.Array]
    ) -> list[Kept]:
        """The masks of the body's inputs, in one round."""
        xs, rest = [], iter(slices)
        for mask in self.xs:
            xs.append(next(rest) if _varies(mask) else _slice_of(mask))
        if not self.steps:
            own = iter(carry)
            held = [next(own) if isinstance(k, np.ndarray) else k for k in self.kinds]
            return [*self.constants, *held, *xs]
        pairs = [
            (value, mask)
            for value, mask, whole in zip(self.sliced, xs, self.xs, strict=True)
            if _varies(whole)
        ]
        held = [
            _both([own, *(_rows(v, m, value) for v, m in pairs)])
            for value, own in zip(self.carried, self.start, strict=True)
        ]
        return [*self.constants, *held, *xs]

    def outside(self, masks: Sequence[Kept]) -> tuple[list[jax.Array], list[jax.Array]]:
        """What a round hands on, and what it leaves for its own results."""
        carry = [
            _as(kind, mask)
            for kind, mask in zip(self.kinds, masks, strict=False)
            if isinstance(kind, np.ndarray) and not self.steps
        ]
        self.ys = list(masks[self.count :])
        return carry, [m for m in self.ys if m is not None and not isinstance(m, Lost)]

    def results(
        self, carry: Sequence[jax.Array], ys: Sequence[jax.Array]
    ) -> list[Kept]:
        """The masks of the loop's results."""
        rest = iter(ys)
        stacked = [
            m if m is None or isinstance(m, Lost) else next(rest) for m in self.ys
        ]
        if not self.steps:
            own = iter(carry)
            last = [next(own) if isinstance(k, np.ndarray) else k for k in self.kinds]
            return [*last, *stacked]
        pairs = [
            (value, jnp.any(m, axis=0))
            for value, m in zip(self.sliced, self.xs, strict=True)
            if m is not None and not isinstance(m, Lost) and _varies(m)
        ]
        last = [
            _both([own, *(_rows(v, m, value) for v, m in pairs)])
            for value, own in zip(self.carried, self.start, strict=True)
        ]
        return [*last, *stacked]


def _varies(mask: Kept) -> bool:
    """Whether a loop that slices a value meets other masks from round to round."""
    return mask is not None and not isinstance(mask, Lost) and mask.shape[0] != 1


def _slice_of(mask: Kept) -> Kept:
    return mask if mask is None or isinstance(mask, Lost) else mask[0]


def _shape(mask: Kept) -> Any:
    """A stand-in of a mask's shape: an empty-handed array, or what is no mask."""
    if mask is None or isinstance(mask, Lost):
        return mask
    return np.broadcast_to(np.True_, mask.shape)


def _larger(one: Any, two: Any) -> Any:
    if isinstance(one, Lost) or isinstance(two, Lost):
        return one if isinstance(one, Lost) else two
    if one is None or two is None:
        return one if two is None else two
    return np.broadcast_to(np.True_, np.broadcast_shapes(one.shape, two.shape))


def _key(kind: Any) -> Any:
    return kind.shape if isinstance(kind, np.ndarray) else type(kind)


def _as(kind: Any, mask: Kept) -> jax.Array:
    if mask is None or isinstance(mask, Lost):
        return jnp.ones(kind.shape, bool)
    return jnp.broadcast_to(mask, kind.shape)


def _rows(value: Value, mask: Kept, carried: Value) -> Mask:
    """Which examples of a carried value count at a step, where it has as many."""
    if mask is None or isinstance(mask, Lost) or not (value.ndim and carried.ndim):
        return None
    if carried.shape[0] != value.shape[0]:
        return None
    rows = jnp.any(mask, axis=tuple(range(1, mask.ndim)))
    return rows.reshape(rows.shape + (1,) * (carried.ndim - 1))
