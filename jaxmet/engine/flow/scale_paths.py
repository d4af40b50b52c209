"""Where a scale of the channels of a product or a norm goes, and what can undo it.

What a product or a norm over the data makes is divided by one number per channel. That passes
through everything linear: views, gates, products with attention weights. It ends where a sum
runs over the channels: there a weight, or another activation, multiplies the numbers back.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jaxmet.engine.flow.norm_gains import stored_gain
from jaxmet.engine.flow.scale_flow import ChannelSum, ScaleFlow
from jaxmet.engine.nodes.cluster import Cluster
from jaxmet.engine.nodes.products import feature_axes
from jaxmet.engine.nodes.records import DataNorm
from jaxmet.engine.program.program import Equation

NO_GAIN = "it is not of the form x·gain + bias with a stored gain of one axis"


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
    What no source can divide the targets may: the scale is `carried` by their weights.
    """

    sources: tuple[ScaleSource, ...]
    targets: tuple[ScaleTarget, ...] = ()
    size: int = 0
    why: str | None = None
    carried: bool = False

    @property
    def pairs(self) -> bool:
        """Whether two activations undo each other's scales."""
        return len(self.sources) == 2 and not self.carried


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
            parts += _parts(flow)
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


def _flow_of(cluster: Cluster, inside: bool) -> "ScaleFlow | str | None":
    """The flow from a cluster, why there is none, or None where nothing is to be said."""
    if cluster.kind == "norm" and isinstance(cluster.record, DataNorm):
        gain = stored_gain(cluster)
        if gain is None:
            return NO_GAIN
        return ScaleFlow(cluster, cluster.exit, (gain.axis,), inside, gain)
    if cluster.kind != "product":
        return None
    equation, weight = cluster.weighted.equation, cluster.weighted.weight
    if equation.name != "dot_general":
        return "a convolution"
    if equation.params["dimension_numbers"][1][0]:
        return "its weight has an axis of separate products"
    features = feature_axes(equation, weight)
    return ScaleFlow(cluster, equation.results[0], features, inside)


def _parts(flow: ScaleFlow) -> "list[_Part]":
    """Channels that reach the same, those of the lowest numbers first."""
    size = int(np.prod(flow.sizes, dtype=np.int64))
    reached: list[ChannelSum | str] = [*flow.sums, *(why for _, why in flow.stops)]
    states = [*(s.state for s in flow.sums), *(s for s, _ in flow.stops)]
    met = np.zeros((len(reached), size), bool)
    for row, state in zip(met, states, strict=True):
        row[flow.channels(state)] = True
    kinds, which = np.unique(met, axis=1, return_inverse=True)
    order = np.unique(which.reshape(-1), return_index=True)[1]
    found = []
    for kind in np.argsort(order):
        some = [r for r, here in zip(reached, kinds[:, kind], strict=True) if here]
        found.append(_Part(flow, np.flatnonzero(which.reshape(-1) == kind), some))
    return found


def _numbered(places: np.ndarray) -> tuple[int, ...]:
    return tuple(places.tolist())  # a graph holds no arrays


class _Part:
    """Some channels of a cluster, all of which reach the same."""

    def __init__(
        self, flow: ScaleFlow, channels: np.ndarray, met: list[ChannelSum | str]
    ):
        self.flow, self.channels = flow, channels
        self.sums = [m for m in met if isinstance(m, ChannelSum)]
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

    def source(self, places: np.ndarray) -> ScaleSource:
        """What makes them, with the place of each channel."""
        flow = self.flow
        bias = None
        if flow.bias is not None:
            bias = _numbered(places[flow.numbers(flow.bias)])
        outputs = _numbered(places)
        if flow.gain is None:
            return ScaleSource(self.name, outputs, bias)
        gain, offset, shift = flow.gain.name, flow.gain.offset, flow.gain.shift
        return ScaleSource(self.name, outputs, None, gain, offset, shift)

    def path(self) -> ScalePath:
        """The path to the products that read these channels."""
        size = self.channels.size
        if self.why is not None:
            return ScalePath((ScaleSource(self.name),), size=size, why=self.why)
        places = self.places(np.arange(size), size)
        source = self.source(places)
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
        sources.append(part.source(places))
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
