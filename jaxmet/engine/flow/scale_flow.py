"""What a scale of the channels of one product or norm reaches, equation by equation."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.views import VIEW_RULES, follow, numbered
from jaxmet.engine.flow.axis_joins import neutral
from jaxmet.engine.flow.norm_gains import StoredGain
from jaxmet.engine.nodes.activations import HOMOGENEOUS
from jaxmet.engine.nodes.cluster import Cluster, leaf_of
from jaxmet.engine.program.program import PARAM, Equation, Value

STOPS = {
    "add": "an addition",
    "norm": "a norm",
    "concat": "a concatenation",
    "pool": "a pooling",
}

Axes = list[lb.Axis]
Lines = dict[lb.Atom, tuple[int, int]]
"""For an atom the number of its first channel, and by how much each entry is more."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledValue:
    """A value that is scaled: its labels, and what to add to the numbers of its channels."""

    value: Value
    axes: Axes
    base: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelSum:
    """A sum over channels, in which a scale ends."""

    equation: Equation
    cluster: Cluster
    operand: int
    state: ScaledValue


class _StopError(Exception):
    """Why a scale does not pass an equation."""


class ScaleFlow:
    """All that a scale of one cluster's channels reaches."""

    def __init__(
        self,
        cluster: Cluster,
        value: Value,
        features: tuple[int, ...],
        inside: bool,
        gain: StoredGain | None = None,
    ):
        self.cluster, self.inside, self.gain = cluster, inside, gain
        axes: Axes = numbered(value)
        self.first = [axes[i][0] for i in features]
        self.sizes = [value.shape[i] for i in features]
        self.sums: list[ChannelSum] = []
        self.stops: list[tuple[ScaledValue, str]] = []
        self.bias: Axes | None = None
        self.met: dict[Equation, Value] = {}
        self.known: Lines | None = None
        seen, stack = {value}, [ScaledValue(value, axes)]
        while stack:
            state = stack.pop()
            for use in state.value.uses:
                try:
                    after = list(self.step(state, use))
                except _StopError as why:
                    self.stops.append((state, str(why)))
                    continue
                fresh = [s for s in after if s.value not in seen]
                seen.update(s.value for s in fresh)
                stack += fresh
        if self.bias is not None:
            count = np.prod(self.sizes, dtype=np.int64)
            if not np.array_equal(np.sort(self.numbers(self.bias)), np.arange(count)):
                why = "its bias is not one number for each channel"
                self.stops.append((ScaledValue(value, axes), why))

    # One equation

    def step(self, state: ScaledValue, use: Equation | None) -> Iterator[ScaledValue]:
        """The values that an equation hands the scale on to."""
        value = state.value
        if use is None:
            out = "it leaves its loop or branch" if self.inside else "it is an output"
            raise _StopError(out)
        cluster, name = use.node, use.name
        if use.bodies:
            raise _StopError(f"{name} reads it")
        if cluster is not None and cluster is not self.cluster:
            if cluster.kind == "activation":
                yield self.activated(state, cluster)
                return
            if cluster.kind not in ("product", "multiply", "matmul"):
                what = STOPS.get(cluster.kind, cluster.function)
                raise _StopError(f"{cluster.name or name}: {what} reads it")
        other = self.met.setdefault(use, value)
        twice = sum(v is value for v in use.operands) > 1
        if name == "dot_general":
            if twice:
                raise _StopError(f"{name} reads it twice")
            yield from self.dot(state, use, other is not value)
            return
        if twice or other is not value:
            raise _StopError(f"{name} reads it twice")
        one = len(use.operands) == len(use.results) == 1
        if name in VIEW_RULES and name != "rev" and one:
            yield self.viewed(state, use)
        elif name in ("slice", "split"):
            yield from self.cut(state, use)
        elif self.passes(state, use):
            yield ScaledValue(use.results[0], state.axes, state.base)
        else:
            raise _StopError(f"{name} reads it")

    def activated(self, state: ScaledValue, cluster: Cluster) -> ScaledValue:
        homogeneous = cluster.function in HOMOGENEOUS
        if not homogeneous or cluster.entry is not state.value:
            raise _StopError(
                f"{cluster.name or cluster.function}: {cluster.function} is not homogeneous"
            )
        if cluster.exit.shape != state.value.shape:
            raise _StopError(f"{cluster.function} reads it")
        return ScaledValue(cluster.exit, state.axes, state.base)

    def passes(self, state: ScaledValue, use: Equation) -> bool:
        """Whether the one result is s·y where this operand is s·x."""
        name, value, out = use.name, state.value, use.results[0]
        if not use.results or out.shape != value.shape or not out.inexact:
            return False
        if name in ("neg", "mul"):
            return True
        if name == "div":
            return use.operands[0] is value
        if name == "select_n":
            cases = [v for v in use.operands[1:] if v is not value]
            return use.operands[0] is not value and all(map(neutral, cases))
        if name in ("add", "add_any") and use.node is self.cluster:
            return self.with_bias(state, use)
        return False

    def with_bias(self, state: ScaledValue, use: Equation) -> bool:
        """Whether this adds the product's own bias, which is scaled too."""
        bias = self.cluster.weighted.bias
        if self.gain is not None or bias is None or self.bias is not None:
            return False
        if not any(v is bias for v in use.operands) or bias.ndim != state.value.ndim:
            return False
        leaf = leaf_of(bias)
        if leaf is None:  # computed from parameters: refused by the node
            return True
        before = numbered(leaf.value)
        after = follow(before, leaf.views)
        for axis, mine, n, m in zip(
            after, state.axes, bias.shape, state.value.shape, strict=True
        ):
            if n == m:
                lb.unify(axis, mine)
        self.bias, self.known = before[leaf.stacked :], None
        return True

    def viewed(self, state: ScaledValue, use: Equation) -> ScaledValue:
        out = use.results[0]
        axes = VIEW_RULES[use.name](use, tuple(state.axes))
        self.known = None  # a reshape splits atoms, and so do a cut and a bias
        if axes is None or not out.inexact:
            raise _StopError("a reshape that cuts a channel axis")
        return self.kept(state, out, axes)

    def cut(self, state: ScaledValue, use: Equation) -> Iterator[ScaledValue]:
        """Slices: of the channels, or of other axes."""
        value, offset = state.value, 0
        for out in use.results:
            axes: Axes = []
            for i, (axis, n, m) in enumerate(
                zip(state.axes, value.shape, out.shape, strict=True)
            ):
                start = (
                    offset if use.name == "split" else use.params["start_indices"][i]
                )
                steps = use.params.get("strides")
                part: lb.Axis | None = lb.fresh_one(m)
                if n == m:
                    part = axis
                elif self.alive(axis):
                    plain = not steps or steps[i] == 1
                    part = lb.cut(axis, start, start + m) if plain else None
                    self.known = None
                if part is None:
                    raise _StopError("sliced across")
                axes.append(part)
            if use.name == "split":
                offset += int(out.shape[use.params["axis"]])
            yield ScaledValue(out, axes, state.base)

    def kept(
        self, state: ScaledValue, out: Value, axes: Sequence[lb.Axis]
    ) -> ScaledValue:
        """The state of a view; of channels only an axis of size one may be gone."""
        pairs = zip(axes, out.shape, strict=True)
        new = [axis or lb.fresh_one(n) for axis, n in pairs]
        lines, base = self.lines(), state.base
        left = {a for axis in new for a in lb.leaves(axis)}
        for atom in {a for axis in state.axes for a in lb.leaves(axis)} - left:
            if atom in lines and atom.size != 1:
                raise _StopError("a view that drops a channel axis")
            base += lines.get(atom, (0, 0))[0]
        return ScaledValue(out, new, base)

    def dot(
        self, state: ScaledValue, use: Equation, again: bool
    ) -> Iterator[ScaledValue]:
        value, out = state.value, use.results[0]
        left = use.operands[0] is value
        other = use.operands[1 if left else 0]
        sides = use.params["dimension_numbers"]
        summed, batched = (pair[0 if left else 1] for pair in sides)
        others = [*sides[0][1 if left else 0], *sides[1][1 if left else 0]]
        ends = any(self.alive(state.axes[i]) for i in summed)
        cluster = use.node
        if ends:
            if cluster is None or cluster.kind not in ("product", "matmul"):
                raise _StopError("a product with constants reads it")
            if cluster.kind == "product" and (
                use is not cluster.weighted.equation or other.kind != PARAM
            ):
                raise _StopError(f"{cluster.name} reads it")
            operand = next(i for i, v in enumerate(cluster.operands) if v is value)
            outside = [
                i
                for i, axis in enumerate(state.axes)
                if i not in summed and self.alive(axis)
            ]
            if cluster.kind == "product" and outside:
                raise _StopError(f"{cluster.name} sums over some of its axes")
            self.sums.append(ChannelSum(use, cluster, operand, state))
            return
        if cluster is None or cluster.kind != "matmul" or again:
            name = cluster.name if cluster is not None else use.name
            raise _StopError(f"{name}: no dense layer on its channels")
        free = [i for i in range(value.ndim) if i not in (*summed, *batched)]
        beside = [i for i in range(other.ndim) if i not in others]
        axes: Axes = [state.axes[i] for i in batched]
        mine = [state.axes[i] for i in free]
        rest = [lb.fresh_one(other.shape[i]) for i in beside]
        axes += [*mine, *rest] if left else [*rest, *mine]
        yield ScaledValue(out, axes, state.base)

    # Numbers of channels

    def lines(self) -> Lines:
        """The numbers of the channels along each atom, as it is split by now."""
        if self.known is not None:
            return self.known
        found: Lines = {}
        total = 1
        stack: list[tuple[lb.Atom, int, int]] = []
        for atom, n in reversed([*zip(self.first, self.sizes, strict=True)]):
            stack.append((atom, 0, total))
            total *= n
        while stack:
            atom, first, step = stack.pop()
            atom = atom.root()
            if atom.factors is not None:
                stack += self.along(atom.factors, first, step)
            elif atom.parts is None:
                found[atom] = first, step
            else:
                for part in atom.parts:
                    stack += self.along(part, first, step)
                    first += step * lb.size(part)
        self.known = found
        return found

    def along(
        self, axis: lb.Axis, first: int, step: int
    ) -> Iterator[tuple[lb.Atom, int, int]]:
        """The atoms of an axis on which channels follow each other."""
        for i, atom in reversed([*enumerate(axis)]):
            yield atom, first if i == 0 else 0, step
            step *= atom.root().size

    def alive(self, axis: lb.Axis) -> bool:
        """Whether channels run along an axis."""
        lines = self.lines()
        return any(atom in lines for atom in lb.leaves(axis))

    def numbers(self, axes: Sequence[lb.Axis], base: int = 0) -> np.ndarray:
        """The channel of each entry of some axes, (entries,)."""
        lines, total = self.lines(), np.full(1, base)
        for axis in axes:
            total = np.add.outer(total, _numbers(axis, lines)).reshape(-1)
        return total

    def channels(self, state: ScaledValue) -> np.ndarray:
        """The channels of a value."""
        live = [axis for axis in state.axes if self.alive(axis)]
        return np.unique(self.numbers(live, state.base))


def _numbers(axis: lb.Axis, lines: Lines) -> np.ndarray:
    total = np.zeros(1, np.int64)
    for atom in lb.expand(axis):
        if atom.parts is not None:
            own = np.concatenate([_numbers(part, lines) for part in atom.parts])
        else:
            first, step = lines.get(atom, (0, 0))
            own = first + step * np.arange(atom.size)
        total = np.add.outer(total, own).reshape(-1)
    return total
