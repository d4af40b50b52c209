"""What is static about one node: the part of a graph that hooks are given."""

import dataclasses
from typing import Literal, TypeAlias

from jaxmet.engine.axes.views import Move
from jaxmet.engine.flow.bias_targets import BiasTargets
from jaxmet.engine.nodes.cluster import LAYERS, PRODUCT_KINDS
from jaxmet.engine.nodes.scalar_function import Formula

Turn: TypeAlias = Literal["same", "previous", "last", "each"]


@dataclasses.dataclass(frozen=True)
class Edge:
    """Where one operand comes from: the node before it and the moves in between.

    `node` is None where no single named node makes the value. Moves that add, scale or
    negate give scale · x + shift, which is `affine`: None where their numbers are unknown.
    `turn` says which turn of a loop made the value: the 'same' one, or of a node without a loop
    its only one; the 'previous' one, by the loop's carry; the 'last' one, by its result. Of an
    input that a loop takes slices of, 'each' has its own. None where that is not known.
    """

    operand: int
    node: str | None
    moves: tuple[str, ...] = ()
    affine: tuple[float, float] | None = (1.0, 0.0)
    turn: Turn | None = "same"


@dataclasses.dataclass(frozen=True)
class Weight:
    """How a layer reads its weight.

    Axes are those of the parameter itself, before the `moves`. `name` is None for a
    weight that is computed from several `parameters`. `stacked`: a loop slices axis 0.
    `shared`: something else reads it too; `tied`: these are lookups, and products that read
    it in the same way, so that it can be changed for all of them. `rotated`: its leaf says that
    what the layer reads goes through a Hadamard transform first.
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
    rotated: bool = False

    @property
    def why_mixed(self) -> str | None:
        """Why its rows are not those of the channels that the layer reads."""
        return "its inputs are rotated" if self.rotated else None

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

    def why_kept(self) -> str | None:
        """Why it is no affine map that the tree states, None where it is."""
        if self.over != "stored":
            return {
                "data": "a norm over the data",
                "batch": "its statistics come from the batch",
                "constant": "its statistics are constants",
            }[self.over]
        form = "not of the form (x − mean)·scale/√(variance + epsilon) + bias"
        return None if self.plain else form


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What only a product, ragged product or lookup has.

    `bias` is the parameter that it adds, `derived_bias` says that what it adds is computed
    from parameters, `tied_bias` that layers that add it are all that reads it. `in_features`
    are the axes of the first operand that it sums over.
    """

    weight: Weight
    bias: str | None = None
    derived_bias: bool = False
    tied_bias: bool = False
    convolution: Convolution | None = None
    dot: Dot | None = None
    in_features: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Activation:
    """What only an activation has.

    `formula` says what it does to a number. `bounds` are those of a clip, `carrier` is the
    product whose leaf may hold other bounds for it, channel by channel. `slope` is that of a
    leaky ReLU, `factor` the parameter that is the slope of a PReLU. Of one that reads a norm,
    `bias_targets` says which products a constant reaches that its channels lose.
    """

    formula: Formula | None = None
    bounds: tuple[float, float] | None = None
    carrier: str | None = None
    slope: float | None = None
    factor: str | None = None
    bias_targets: BiasTargets | None = None


@dataclasses.dataclass(frozen=True)
class Matmul:
    """What only a product of two activations has: the axes of each operand that it sums over."""

    summed: tuple[tuple[int, ...], ...]


MASKED = "masked: entries stand for −∞, or only a softmax reads this sum"
SELECTS = "a mask or an index: rounding it would change what it selects"
DIVIDES = "a divisor: rounded to zero it would make infinities"


def used_elsewhere(parameter: str) -> str:
    """Why a parameter may not be changed for one node alone."""
    return f"{parameter!r} is used elsewhere too"


@dataclasses.dataclass(frozen=True)
class Node:
    """A group of equations with a name, a kind and a single exit.

    `kind` is one of input, product, ragged (each row meets one of several matrices, as of
    experts), matmul, lookup, norm, activation, add, multiply,
    concat, pool, resize, output; `function` says which. `features` are the axes of the
    result that the weight makes; of a norm, the axes along which its parameters differ.
    `batch` are the axes of the result that run over examples.
    `only_consumers` are the nodes that use the result as it is, None where anything else
    uses it too; `shared` are those of its parameters that something else reads too.
    `region` names the loops and branches around it, `layers` is the length of a loop that
    runs stacked layers, `loop` the number of the outermost `scan` around it, in the order in
    which they run. `in_float` is the reason why no quantizer serves the result, whatever
    the configuration. `details` is what only nodes of its kind have; `layer`, `norm` and
    `activation` are that, or None for a node of another kind.
    """

    name: str
    kind: str
    function: str
    inputs: tuple[Edge, ...] = ()
    parameters: tuple[str, ...] = ()
    features: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    only_consumers: tuple[str, ...] | None = None
    shared: tuple[str, ...] = ()
    region: tuple[str, ...] = ()
    layers: int | None = None
    loop: int | None = None
    in_float: str | None = None
    details: LayerSpec | Norm | Activation | Matmul | None = None

    @property
    def layer(self) -> LayerSpec | None:
        """What only a layer has."""
        return self.details if isinstance(self.details, LayerSpec) else None

    @property
    def norm(self) -> Norm | None:
        """What only a norm has."""
        return self.details if isinstance(self.details, Norm) else None

    @property
    def activation(self) -> Activation | None:
        """What only an activation has."""
        return self.details if isinstance(self.details, Activation) else None

    # What transforms ask of any node: None where its kind has none.

    @property
    def weight(self) -> Weight | None:
        """How a layer reads its weight."""
        return self.layer.weight if self.layer else None

    @property
    def bias(self) -> str | None:
        """The parameter that a layer adds."""
        return self.layer.bias if self.layer else None

    @property
    def derived_bias(self) -> bool:
        """Whether what a layer adds is computed from parameters."""
        return self.layer is not None and self.layer.derived_bias

    @property
    def in_features(self) -> tuple[int, ...]:
        """The axes of the first operand that a layer sums over."""
        return self.layer.in_features if self.layer else ()

    def summed(self, operand: int) -> tuple[int, ...]:
        """The axes of an operand that a product sums over, but for the window of a convolution."""
        if isinstance(self.details, Matmul):
            return self.details.summed[operand]
        return self.in_features if operand == 0 else ()

    @property
    def convolution(self) -> Convolution | None:
        """What the equation of a convolution says apart from its sizes."""
        return self.layer.convolution if self.layer else None

    @property
    def dot(self) -> Dot | None:
        """The axes that meet in a dot."""
        return self.layer.dot if self.layer else None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds of a clip."""
        return self.activation.bounds if self.activation else None

    @property
    def carrier(self) -> str | None:
        """The product whose leaf may hold other bounds for a clip."""
        return self.activation.carrier if self.activation else None

    @property
    def loops(self) -> tuple[str, ...]:
        """Of `region`, what may run the node another number of times than once."""
        return tuple(r for r in self.region if r in ("scan", "while", "cond"))

    @property
    def kernel(self) -> str:
        """The parameter that the weight of this layer is."""
        assert self.weight is not None and self.weight.name is not None
        return self.weight.name

    def why_kept(self, *, stacked: bool = False, shared: bool = False) -> str | None:
        """Why the weight of this layer may not be changed, None where it may.

        The one wording of what holds for every transform; with `stacked` a weight of which
        a loop takes slices may be changed, with `shared` one that is read in several ways,
        by a transform that changes only what the layer adds.
        """
        weight = self.weight
        if self.kind == "ragged":
            return "its rows choose among matrices"
        if self.kind == "lookup" or weight is None:
            return f"a {self.kind} sums nothing"
        if weight.name is None:
            return "its weight is computed from parameters"
        if weight.shared and not weight.tied and not shared:
            return used_elsewhere(weight.name)
        return (
            "its weight is stacked by a loop"
            if weight.stacked and not stacked
            else None
        )

    @property
    def is_layer(self) -> bool:
        return self.kind in LAYERS

    @property
    def is_product(self) -> bool:
        """Whether it multiplies what it reads by a weight, or two activations by each other."""
        return self.kind in PRODUCT_KINDS
