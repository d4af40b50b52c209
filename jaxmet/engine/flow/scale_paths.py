"""Where a scale of the channels of a product or a norm goes, and what can undo it.

What a product or a norm over the data makes is divided by one number per channel. That passes
through everything linear: views, gates, products with attention weights. It ends where a sum
runs over the channels: there a weight, or another activation, multiplies the numbers back.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxmet.engine.axes import labels as lb
from jaxmet.engine.axes.views import CASTS, VIEW_RULES, follow, numbered
from jaxmet.engine.flow.axis_joins import neutral
from jaxmet.engine.nodes.activations import HOMOGENEOUS
from jaxmet.engine.nodes.cluster import VIEWS, Cluster, Leaf, leaf_of, through_views
from jaxmet.engine.nodes.products import feature_axes
from jaxmet.engine.nodes.records import DataNorm
from jaxmet.engine.program.program import (
    CONST,
    DATA,
    PARAM,
    Equation,
    Value,
)

NO_GAIN = "it is not of the form x·gain + bias with a stored gain of one axis"
STOPS = {
    "add": "an addition",
    "norm": "a norm",
    "concat": "a concatenation",
    "pool": "a pooling",
}


@dataclasses.dataclass(frozen=True)
class ScaleSource:
    """What makes the channels: the place of each in a vector of scales, whose last one is 1.

    `outputs` are those of the columns of a product's weight or of a norm's gain, `bias` those of
    the entries of the bias, without the axis along which a loop stacks it. A norm multiplies by
    the parameter `gain` plus the number `offset`, and adds the parameter `shift`.
    """

    node: str
    outputs: tuple[int, ...] = ()
    bias: tuple[int, ...] | None = None
    gain: str | None = None
    offset: float = 0.0
    shift: str | None = None


@dataclasses.dataclass(frozen=True)
class ScaleTarget:
    """A sum over the channels: the place of each entry along these axes of an operand."""

    node: str
    operand: int
    axes: tuple[int, ...]
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ScalePath:
    """Channels whose scale is undone downstream, or `why` it is not.

    Of one source the targets are products, whose weights multiply the scale back. Of two, which
    a single product of activations sums over, the first is divided and the second multiplied.
    """

    sources: tuple[ScaleSource, ...]
    targets: tuple[ScaleTarget, ...] = ()
    size: int = 0
    why: str | None = None


def find_scale_paths(
    clusters: Sequence[Cluster], inside: Iterable[Cluster]
) -> tuple[ScalePath, ...]:
    """The paths from all products and norms over the data, in the order in which they run.

    `inside` are the clusters of loops and branches.
    """
    inside, parts = set(inside), []
    for cluster in clusters:
        flow = _flow_of(cluster, cluster in inside)
        if isinstance(flow, str):
            parts.append(ScalePath((ScaleSource(cluster.name),), why=flow))
        elif flow is not None:
            parts += flow.parts()
    sums: dict[Equation, list[_Part]] = {}
    for part in parts:
        if isinstance(part, _Part) and part.sum is not None:
            sums.setdefault(part.sum.equation, []).append(part)
    found = []
    for part in parts:
        if not isinstance(part, _Part):
            found.append(part)
        elif part.sum is None:
            found.append(part.path())
        elif part is sums[part.sum.equation][0]:
            found += _both(sums[part.sum.equation])
    return tuple(found)


def _flow_of(cluster: Cluster, inside: bool) -> "_Flow | str | None":
    """The flow from a cluster, why there is none, or None where nothing is to be said."""
    if cluster.kind == "norm" and isinstance(cluster.record, DataNorm):
        gain = _gain(cluster)
        if gain is None:
            return NO_GAIN
        return _Flow(cluster, cluster.exit, (gain.axis,), inside, gain)
    if cluster.kind != "product":
        return None
    equation, weight = cluster.weighted.equation, cluster.weighted.weight
    if equation.name != "dot_general":
        return "a convolution"
    if equation.params["dimension_numbers"][1][0]:
        return "its weight has an axis of separate products"
    features = feature_axes(equation, weight)
    return _Flow(cluster, equation.results[0], features, inside)


# Norms


@dataclasses.dataclass(frozen=True)
class _Gain:
    """The parameters of a norm that multiplies by `name` plus `offset` along one axis."""

    name: str
    offset: float
    shift: str | None
    axis: int


def _gain(cluster: Cluster) -> _Gain | None:
    """How a norm over the data is scaled at its end, None where that is not known."""
    record, exit = cluster.record, cluster.exit
    assert isinstance(record, DataNorm)
    if record.scale is None:
        return None
    wanted = [v for v in (record.scale, record.bias) if v is not None]
    read = [
        v
        for e in cluster.equations
        if e.kind == DATA
        for v in e.operands
        if v.kind == PARAM
    ]
    if len(read) != len(wanted) or not all(any(v is w for w in wanted) for v in read):
        return None
    value = through_views(exit, CASTS)
    if record.bias is not None:
        last = value.producer
        if last is None or last not in cluster.equations or len(last.operands) != 2:
            return None
        one, two = last.operands
        if two is not record.bias and one is record.bias and last.name != "sub":
            one, two = two, one
        if two is not record.bias or last.name not in ("add", "add_any", "sub"):
            return None
        value = one
    if not _multiplies(value, record.scale, cluster):
        return None
    gain, shift = _offset(record.scale), None
    if record.bias is not None:
        leaf = leaf_of(record.bias)
        if leaf is None or not _is_vector(leaf):
            return None
        shift = leaf.value.name
    axes = [i for i, n in enumerate(record.scale.shape) if n != 1]
    if gain is None or len(axes) != 1 or record.scale.ndim != exit.ndim:
        return None
    name, offset = gain
    return _Gain(name, offset, shift, axes[0])


def _multiplies(value: Value, scale: Value, cluster: Cluster) -> bool:
    """Whether a value is a product one factor of which is the scale."""
    stack = [value]
    while stack:
        value = stack.pop()
        if value is scale:
            return True
        equation = value.producer
        if equation is None or equation.node is not cluster:
            continue
        if equation.name in VIEWS or equation.name == "div":
            stack.append(equation.operands[0])
        elif equation.name == "mul":
            stack += equation.operands
    return False


def _offset(scale: Value) -> tuple[str, float] | None:
    """The parameter of a gain and the number that is added to it."""
    leaf = leaf_of(scale)
    if leaf is not None:
        name = leaf.value.name
        return (name, 0.0) if name is not None and _is_vector(leaf) else None
    equation = through_views(scale).producer
    if equation is None or equation.name != "add":
        return None
    numbers = [v for v in equation.operands if v.kind == CONST]
    others = [v for v in equation.operands if v.kind == PARAM]
    if len(numbers) != 1 or len(others) != 1:
        return None
    number, leaf = through_views(numbers[0]).scalar(), leaf_of(others[0])
    if number is None or leaf is None or not _is_vector(leaf):
        return None
    return None if leaf.value.name is None else (leaf.value.name, number)


def _is_vector(leaf: Leaf) -> bool:
    """Whether a parameter has one axis, beside that of a loop, and is read in its order."""
    reversed_ = any(e is not None and e.name == "rev" for e in leaf.views)
    return leaf.value.ndim - leaf.stacked == 1 and not reversed_


# Following channels


Axes = list[lb.Axis]
Lines = dict[lb.Atom, tuple[int, int]]
"""For an atom the number of its first channel, and by how much each entry is more."""


@dataclasses.dataclass(frozen=True, eq=False)
class _ScaledValue:
    """A value that is scaled: its labels, and what to add to the numbers of its channels."""

    value: Value
    axes: Axes
    base: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class _Sum:
    """A sum over channels, in which a scale ends."""

    equation: Equation
    cluster: Cluster
    operand: int
    state: _ScaledValue


class _StopError(Exception):
    """Why a scale does not pass an equation."""


class _Flow:
    """All that a scale of one cluster's channels reaches."""

    def __init__(
        self,
        cluster: Cluster,
        value: Value,
        features: tuple[int, ...],
        inside: bool,
        gain: _Gain | None = None,
    ):
        self.cluster, self.inside, self.gain = cluster, inside, gain
        axes: Axes = numbered(value)
        self.first = [axes[i][0] for i in features]
        self.sizes = [value.shape[i] for i in features]
        self.sums: list[_Sum] = []
        self.stops: list[tuple[_ScaledValue, str]] = []
        self.bias: Axes | None = None
        self.met: dict[Equation, Value] = {}
        self.known: Lines | None = None
        seen, stack = {value}, [_ScaledValue(value, axes)]
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
                self.stops.append((_ScaledValue(value, axes), why))

    # One equation

    def step(self, state: _ScaledValue, use: Equation | None) -> Iterator[_ScaledValue]:
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
            yield _ScaledValue(use.results[0], state.axes, state.base)
        else:
            raise _StopError(f"{name} reads it")

    def activated(self, state: _ScaledValue, cluster: Cluster) -> _ScaledValue:
        homogeneous = cluster.function in HOMOGENEOUS
        if not homogeneous or cluster.entry is not state.value:
            raise _StopError(
                f"{cluster.name or cluster.function}: {cluster.function} is not homogeneous"
            )
        if cluster.exit.shape != state.value.shape:
            raise _StopError(f"{cluster.function} reads it")
        return _ScaledValue(cluster.exit, state.axes, state.base)

    def passes(self, state: _ScaledValue, use: Equation) -> bool:
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

    def with_bias(self, state: _ScaledValue, use: Equation) -> bool:
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

    def viewed(self, state: _ScaledValue, use: Equation) -> _ScaledValue:
        out = use.results[0]
        axes = VIEW_RULES[use.name](use, tuple(state.axes))
        self.known = None  # a reshape splits atoms, and so do a cut and a bias
        if axes is None or not out.inexact:
            raise _StopError("a reshape that cuts a channel axis")
        return self.kept(state, out, axes)

    def cut(self, state: _ScaledValue, use: Equation) -> Iterator[_ScaledValue]:
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
            yield _ScaledValue(out, axes, state.base)

    def kept(
        self, state: _ScaledValue, out: Value, axes: Sequence[lb.Axis]
    ) -> _ScaledValue:
        """The state of a view; of channels only an axis of size one may be gone."""
        pairs = zip(axes, out.shape, strict=True)
        new = [axis or lb.fresh_one(n) for axis, n in pairs]
        lines, base = self.lines(), state.base
        left = {a for axis in new for a in lb.leaves(axis)}
        for atom in {a for axis in state.axes for a in lb.leaves(axis)} - left:
            if atom in lines and atom.size != 1:
                raise _StopError("a view that drops a channel axis")
            base += lines.get(atom, (0, 0))[0]
        return _ScaledValue(out, new, base)

    def dot(
        self, state: _ScaledValue, use: Equation, again: bool
    ) -> Iterator[_ScaledValue]:
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
            self.sums.append(_Sum(use, cluster, operand, state))
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
        yield _ScaledValue(out, axes, state.base)

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

    def channels(self, state: _ScaledValue) -> np.ndarray:
        """The channels of a value."""
        live = [axis for axis in state.axes if self.alive(axis)]
        return np.unique(self.numbers(live, state.base))

    # Parts

    def parts(self) -> "list[_Part]":
        """Channels that reach the same, those of the lowest numbers first."""
        size = int(np.prod(self.sizes, dtype=np.int64))
        reached: list[_Sum | str] = [*self.sums, *(why for _, why in self.stops)]
        states = [*(s.state for s in self.sums), *(s for s, _ in self.stops)]
        met = np.zeros((len(reached), size), bool)
        for row, state in zip(met, states, strict=True):
            row[self.channels(state)] = True
        kinds, which = np.unique(met, axis=1, return_inverse=True)
        order = np.unique(which.reshape(-1), return_index=True)[1]
        found = []
        for kind in np.argsort(order):
            some = [r for r, here in zip(reached, kinds[:, kind], strict=True) if here]
            found.append(_Part(self, np.flatnonzero(which.reshape(-1) == kind), some))
        return found

    def source(self, places: np.ndarray, node: str) -> ScaleSource:
        """With the place of each channel."""
        bias = None
        if self.bias is not None:
            bias = _numbered(places[self.numbers(self.bias)])
        outputs = _numbered(places)
        if self.gain is None:
            return ScaleSource(node, outputs, bias)
        gain, offset, shift = self.gain.name, self.gain.offset, self.gain.shift
        return ScaleSource(node, outputs, None, gain, offset, shift)


def _numbered(places: np.ndarray) -> tuple[int, ...]:
    return tuple(places.tolist())  # a graph holds no arrays


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


class _Part:
    """Some channels of a cluster, all of which reach the same."""

    def __init__(self, flow: _Flow, channels: np.ndarray, met: list[_Sum | str]):
        self.flow, self.channels = flow, channels
        self.sums = [m for m in met if isinstance(m, _Sum)]
        self.why = next((m for m in met if isinstance(m, str)), None)
        if not met:
            self.why = "no layer reads it"
        kinds = [s.cluster.kind for s in self.sums]
        if self.why is None and "matmul" in kinds and len(kinds) > 1:
            self.why = "several products read it, one of them of two activations"
        self.sum = self.sums[0] if kinds == ["matmul"] and self.why is None else None

    @property
    def name(self) -> str:
        return self.flow.cluster.name

    def places(self, of: np.ndarray, size: int) -> np.ndarray:
        """Of all channels the places, given those of these; the last one is 1."""
        total = int(np.prod(self.flow.sizes, dtype=np.int64))
        places = np.full(total, size)
        places[self.channels] = of
        return places

    def path(self) -> ScalePath:
        """The path to the products that read these channels."""
        size = self.channels.size
        if self.why is not None:
            return ScalePath((ScaleSource(self.name),), size=size, why=self.why)
        places = self.places(np.arange(size), size)
        source = self.flow.source(places, self.name)
        targets = []
        for end in self.sums:
            (lc, rc), _ = end.equation.params["dimension_numbers"]
            first = end.equation.operands[0] is end.state.value
            axes = tuple(lc if first else rc)
            labels = [end.state.axes[i] for i in axes]
            numbers = self.flow.numbers(labels, end.state.base)
            targets.append(
                ScaleTarget(
                    end.cluster.name, end.operand, axes, _numbered(places[numbers])
                )
            )
        return ScalePath((source,), tuple(targets), size)


def _both(parts: list[_Part]) -> list[ScalePath]:
    """The path between two activations that are multiplied, or why they keep their scales."""
    if len(parts) != 2:
        why = "the other side of the product of two activations does not follow"
        if len(parts) > 2:
            why = "a product of two activations sums over several parts of it"
        return [_unpaired(part, why) for part in parts]
    if sorted(map(_side, parts)) != [0, 1]:
        return [_unpaired(p, "it is multiplied by itself") for p in parts]
    assert parts[0].sum is not None
    (sides, batches) = parts[0].sum.equation.params["dimension_numbers"]
    order = [*map(_side, parts)]  # the first to run is the first here
    pairs = [
        (pair[order[0]], pair[order[1]])
        for both in (batches, sides)
        for pair in zip(*both, strict=True)
    ]
    both = _paired_numbers(parts, pairs)
    total = [int(np.prod(part.flow.sizes, dtype=np.int64)) for part in parts]
    known = [
        np.array_equal(np.unique(n), part.channels)
        for n, part in zip(both, parts, strict=True)
    ]
    if not all(known):
        return [_unpaired(part, "its channels do not line up") for part in parts]
    groups, size = _connected(both[0], both[1] + total[0], sum(total))
    own = [groups[: total[0]], groups[total[0] :]]
    sources, targets = [], []
    for part, places in zip(parts, own, strict=True):
        assert part.sum is not None
        end, flow = part.sum, part.flow
        sources.append(flow.source(places, part.name))
        axes = [i for i, a in enumerate(end.state.axes) if flow.alive(a)]
        numbers = flow.numbers([end.state.axes[i] for i in axes], end.state.base)
        target = ScaleTarget(
            end.cluster.name, end.operand, tuple(axes), _numbered(places[numbers])
        )
        targets.append(target)
    return [ScalePath(tuple(sources), tuple(targets), size)]


def _side(part: _Part) -> int:
    assert part.sum is not None
    return int(part.sum.equation.operands[0] is not part.sum.state.value)


def _unpaired(part: _Part, why: str) -> ScalePath:
    assert part.sum is not None
    part.why = f"{part.sum.cluster.name}: {why}"
    return part.path()


def _paired_numbers(
    parts: list[_Part], pairs: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The channels of both sides that meet in a product, each pair once or more often."""
    states, flows = [p.sum.state for p in parts if p.sum], [p.flow for p in parts]
    shared: list[tuple[np.ndarray, np.ndarray]] = []
    for pair in pairs:
        axes = [s.axes[i] for s, i in zip(states, pair, strict=True)]
        if any(f.alive(a) for f, a in zip(flows, axes, strict=True)):
            one, two = (f.numbers([a]) for f, a in zip(flows, axes, strict=True))
            shared.append((one, two))
    found = []
    for side, (flow, state) in enumerate(zip(flows, states, strict=True)):
        total = np.full(1, state.base)
        for numbers in shared:
            total = np.add.outer(total, numbers[side]).reshape(-1)
        met = {pair[side] for pair in pairs}
        free = [a for i, a in enumerate(state.axes) if i not in met and flow.alive(a)]
        found.append((total, flow.numbers(free)))
    (one, own), (two, others) = found
    one, two = one[:, None, None], two[:, None, None]
    one, two = np.broadcast_arrays(
        one + own[None, :, None], two + others[None, None, :]
    )
    return one.reshape(-1), two.reshape(-1)


def _connected(one: np.ndarray, two: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """The number of the group that each of `size` things is in, given pairs that are in one.

    What is in no pair gets the number of groups; that is returned too.
    """
    lowest = np.arange(size)
    while True:  # every round halves the way to the lowest one, or ends
        before = lowest.copy()
        least = np.minimum(lowest[one], lowest[two])
        np.minimum.at(lowest, one, least)
        np.minimum.at(lowest, two, least)
        lowest = lowest[lowest]
        if np.array_equal(lowest, before):
            break
    inside = np.zeros(size, bool)
    inside[one] = inside[two] = True
    roots, numbers = np.unique(lowest[inside], return_inverse=True)
    groups = np.full(size, roots.size)
    groups[inside] = numbers.reshape(-1)
    return groups, int(roots.size)
