"""Layers of many sizes as problems of a few, so that few programs solve all of a network.

Inputs, outputs and groups that are added are zero everywhere: no error comes from them, and
no real weight sees them. Only the mean of the diagonal of the Gram matrix counts them, and
`Problem.damping` makes up for it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmet.transforms.rounding.solvers import (
    Kind,
    Problem,
    RoundingMethod,
    Solution,
    Tick,
)

INPUTS = (256, 768, 1280)  # then multiples of STEP
STEP = 512
WINDOWS = (32, 64)  # inputs of depthwise layers, which have many groups
GROUPS = (256, 1280)
TOGETHER = (
    256  # outputs that are solved side by side; fewer programs where it is one number
)


def parts_of(problem: Problem, kind: Kind) -> list[Problem]:
    """The problem in parts of a few sizes; outputs are independent unless they share scales."""
    groups, ins, outs = problem.weight.shape
    if kind.blocks > 1:
        return [problem]  # blocks have to keep their length
    if groups > 1 and (ins > WINDOWS[-1] or outs > 1):
        return [
            problem
        ]  # whole layers in a loop, or wide groups: padding costs too much
    if groups > 1:
        return [_padded(problem, _class(groups, GROUPS), _class(ins, WINDOWS), 1)]
    rows, width = _class(ins, INPUTS), _together()
    if kind.shared != ():
        return [_padded(problem, 1, rows, -(-outs // width) * width)]
    firsts = range(0, outs, width)
    return [_padded(_outputs(problem, f, f + width), 1, rows, width) for f in firsts]


def joined(problem: Problem, parts: Sequence[Solution]) -> Solution:
    """The solution of the problem, in NumPy, from those of its parts."""
    groups, ins, outs = problem.weight.shape

    def all_of(*pieces: np.ndarray) -> np.ndarray:
        return np.concatenate(pieces, axis=-1)[:groups, ..., :outs]

    first = parts[0]
    weight = all_of(*(p.weight for p in parts))[:, :ins]
    grids = [(p.grid.scale, p.grid.zero_point) for p in parts]
    scale, zero_point = (all_of(*v) for v in zip(*grids, strict=True))
    sums = [(p.shift, p.loss, p.nearest_loss, p.inherited) for p in parts]
    return Solution(
        weight,
        first.grid._replace(scale=scale, zero_point=zero_point),
        *(all_of(*v) for v in zip(*sums, strict=True)),
        curve=first.curve,
    )


def solve(
    problems: Sequence[Problem],
    kind: Kind,
    method: RoundingMethod,
    key: jax.Array,
    tick: Tick,
) -> list[Solution]:
    """Layers of one kind and shape, side by side."""
    if not method.pads:
        return _side_by_side(problems, kind, method, key, tick)
    if jax.default_backend() == "cpu" and len(problems) > 1:
        # Nothing is won side by side, and each number of them would be a program.
        share = lambda part, loss: tick(part / len(problems), loss)
        return [solve([p], kind, method, key, share)[0] for p in problems]
    parts = [parts_of(problem, kind) for problem in problems]
    number = len(parts[0])
    share = lambda part, loss: tick(part / number, loss)
    every = zip(*parts, strict=True)
    found = [_side_by_side(same, kind, method, key, share) for same in every]
    own = zip(*found, strict=True)
    return [joined(*both) for both in zip(problems, own, strict=True)]


def _side_by_side(
    problems: Sequence[Problem],
    kind: Kind,
    method: RoundingMethod,
    key: jax.Array,
    tick: Tick,
) -> list[Solution]:
    stacked = jax.tree.map(lambda *v: np.stack(v), *problems)
    found = jax.tree.map(np.asarray, method.solve(stacked, kind, key, tick))
    return [jax.tree.map(lambda v, i=i: v[i], found) for i in range(len(problems))]


def _together() -> int:
    """An accelerator is idle with few outputs, and a sweep takes as long for many."""
    return TOGETHER if jax.default_backend() == "cpu" else 8 * TOGETHER


def _class(size: int, classes: Sequence[int]) -> int:
    return next((n for n in classes if n >= size), -(-size // STEP) * STEP)


def _outputs(problem: Problem, first: int, end: int) -> Problem:
    """The same with so many of its outputs."""
    cut = lambda v: v[..., first:end]
    grid = problem.grid
    return problem._replace(
        weight=cut(problem.weight),
        bias=cut(problem.bias),
        grid=grid._replace(scale=cut(grid.scale), zero_point=cut(grid.zero_point)),
    )


def _padded(problem: Problem, groups: int, ins: int, outs: int) -> Problem:
    """The problem with zeros up to these sizes."""
    own = problem.weight.shape

    def fill(x: Any, *sizes: int, mode: Any = "constant") -> Any:
        more = [(0, n - m) for n, m in zip(sizes, x.shape, strict=True)]
        return np.pad(x, more, mode=mode) if any(n for _, n in more) else x

    grid, seen = problem.grid, problem.inputs
    size = (groups, 1, outs)
    return problem._replace(
        weight=fill(problem.weight, groups, ins, outs),
        grid=grid._replace(
            scale=fill(grid.scale, *size, mode="edge"),
            zero_point=fill(grid.zero_point, *size, mode="edge"),
        ),
        inputs=seen._replace(
            products=jax.tree.map(lambda x: fill(x, groups, ins, ins), seen.products),
            mean=fill(seen.mean, groups, ins),
            float_mean=fill(seen.float_mean, groups, ins),
        ),
        bias=fill(problem.bias, groups, outs),
        # the same share of the mean over the real inputs
        damping=problem.damping * problem.damping.dtype.type(ins / own[1]),
    )
