"""What is static about one node: the part of a graph that hooks are given."""

import dataclasses

from jaxmet.engine.axes.views import Move
from jaxmet.engine.flow.arrivals import Arrivals
from jaxmet.engine.nodes.cluster import LAYERS
from jaxmet.engine.nodes.scalar_function import Formula


@dataclasses.dataclass(frozen=True)
class Edge:
    """Where one operand comes from: the node before it and the moves in between.

    `node` is None where no single named node makes the value. Moves that add, scale or
    negate give scale · x + shift, which is `affine`: None where their numbers are unknown.
    """

    operand: int
    node: str | None
    moves: tuple[str, ...] = ()
    affine: tuple[float, float] | None = (1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Weight:
    """How a site reads its weight.

    Axes are those of the parameter itself, before the `moves`. `name` is None for a
    weight that is computed from several `parameters`. `stacked`: a loop slices axis 0.
    `shared`: something else reads it too; `tied`: these are lookups, and products that read
    it in the same way, so that it can be changed for all of them.
    """

    name: str | None
    parameters: tuple[str, ...]
    moves: tuple[Move, ...] = ()
    stacked: bool = False
    shared: bool = False
    tied: bool = False
    out_axes: tuple[int, ...] = ()
    in_axes: tuple[int, ...] = ()
    window_axes: tuple[int, ...] = ()
    operand: int = 1

    @property
    def views(self) -> tuple[str, ...]:
        """The names of the moves."""
        return tuple(move.name for move in self.moves)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """What a convolution's equation says apart from its sizes.

    `padding` is that of the traced size. `input_axes` are batch, channels and window of the
    input, `kernel_axes` outputs, inputs and window of the kernel, as the equation reads them.
    """

    groups: int
    strides: tuple[int, ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_axes: tuple[int, ...]
    kernel_axes: tuple[int, ...]
    batch_groups: int = 1

    @property
    def pads(self) -> bool:
        """Whether anything is padded or cut."""
        return any(side for pair in self.padding for side in pair)


@dataclasses.dataclass(frozen=True)
class Dot:
    """The axes of data and weight, as a dot's equation reads them, that meet pairwise.

    Those that are summed over, and those that run along both (one product each).
    """

    summed: tuple[tuple[int, int], ...]
    batched: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Debias:
    """By what a running average from zero is divided: the sum of its weights.

    `formula` gives that sum from the stored `count` of updates; with `multiplies` its
    inverse.
    """

    count: str
    formula: Formula
    multiplies: bool = False


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalization's parameters by role, and what its statistics are.

    `over` is 'stored' (parameters: only then is it an affine map of its input), 'data'
    (each example's own), 'batch' (a batch norm in training) or 'constant'. `plain` says
    that it is (x − mean)·factor·scale/√(variance + epsilon) + bias and nothing else, where
    mean and variance are the stored ones or, with `debias`, these over one number.
    """

    over: str
    mean: str | None = None
    variance: str | None = None
    scale: str | None = None
    bias: str | None = None
    epsilon: float = 0.0
    plain: bool = True
    factor: float = 1.0
    debias: Debias | None = None


@dataclasses.dataclass(frozen=True)
class Node:
    """A group of equations with a name, a kind and a single exit.

    `kind` is one of input, product, ragged (each row meets one of several matrices, as of
    experts), matmul, lookup, norm, activation, add, multiply,
    concat, pool, resize, output; `function` says which. `features` are the axes of the
    result that the weight makes, `in_features` the axes of the first operand that it sums
    over; of a norm, `features` are the axes along which its parameters differ. `batch` are
    the axes of the result that run over examples.
    `only_readers` are the nodes that use the result as it is, None where anything else
    uses it too; `shared` are those of its parameters that something else reads too.
    `bounds` are those of a clip, `carrier` the product whose leaf may hold other
    bounds for it, channel by channel. `region` names the loops and branches around it,
    `layers` is the length of a loop that runs stacked layers. Of an activation,
    `formula` says what it does to a number, and of one that reads a norm `arrivals`
    says where a constant arrives that its channels lose. `masked`: it has entries that stand
    for −∞, or is a sum that only a softmax reads. `selects`: it has no weights in it, and
    decides what a mask hides or an index means. `divides`: something is divided by it.
    """

    name: str
    kind: str
    function: str
    inputs: tuple[Edge, ...] = ()
    parameters: tuple[str, ...] = ()
    weight: Weight | None = None
    bias: str | None = None
    derived_bias: bool = False
    convolution: Convolution | None = None
    dot: Dot | None = None
    norm: Norm | None = None
    features: tuple[int, ...] = ()
    in_features: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    only_readers: tuple[str, ...] | None = None
    shared: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    slope: float | None = None
    factor: str | None = None
    carrier: str | None = None
    region: tuple[str, ...] = ()
    layers: int | None = None
    arrivals: Arrivals | None = None
    formula: Formula | None = None
    masked: bool = False
    selects: bool = False
    divides: bool = False

    @property
    def loops(self) -> tuple[str, ...]:
        """Of `region`, what may run the node another number of times than once."""
        return tuple(r for r in self.region if r in ("scan", "while", "cond"))

    @property
    def kernel(self) -> str:
        """The parameter that the weight of this site is."""
        assert self.weight is not None and self.weight.name is not None
        return self.weight.name

    def why_kept(self, *, stacked: bool = False) -> str | None:
        """Why the weight of this layer may not be changed, None where it may.

        The one wording of what holds for every transform; with `stacked` a weight of which
        a loop takes slices may be changed.
        """
        weight = self.weight
        if self.kind == "ragged":
            return "its rows choose among matrices"
        if self.kind == "lookup" or weight is None:
            return f"a {self.kind} sums nothing"
        if weight.name is None:
            return "its weight is computed from parameters"
        if weight.shared and not weight.tied:
            return f"its weight {weight.name!r} is used elsewhere too"
        return (
            "its weight is stacked by a loop"
            if weight.stacked and not stacked
            else None
        )

    @property
    def is_site(self) -> bool:
        return self.kind in LAYERS
