"""What the finder of each kind of node knows of the group of equations that it found."""

import dataclasses

from jaxmet.engine.program.program import Equation, Value


@dataclasses.dataclass(frozen=True, repr=False)
class Weighted:
    """Of a product, a ragged product or a lookup: its weight, and the equation that reads it.

    `features` are the axes of the result that the weight makes.
    """

    weight: Value
    equation: Equation
    bias: Value | None = None
    features: tuple[int, ...] = ()


@dataclasses.dataclass(eq=False)
class Roles:
    """Which leaf plays which role; `plain` if nothing else is in the equations.

    `weight` is what both statistics are divided (`inverse`) or multiplied by.
    """

    mean: Value | None = None
    variance: Value | None = None
    scale: Value | None = None
    bias: Value | None = None
    epsilon: float = 0.0
    factor: float = 1.0
    weight: Value | None = None
    inverse: bool = False
    plain: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class StoredNorm:
    """Of a norm whose statistics are parameters, or constants.

    `spread` is what its root is taken of.
    """

    spread: Value
    roles: Roles
    constant: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class DataNorm:
    """Of a norm whose statistics are computed from what it normalizes."""

    spread: Value
    scale: Value | None
    bias: Value | None


@dataclasses.dataclass(frozen=True, repr=False)
class Pointwise:
    """Of an activation: whether its form is `known`, and the numbers in it.

    `bounds` are those of a clip, `slope` is that of a leaky ReLU, `factor` the parameter that
    is the slope of a PReLU.
    """

    known: bool = False
    bounds: tuple[float, float] | None = None
    slope: float | None = None
    factor: Value | None = None


Record = Weighted | StoredNorm | DataNorm | Pointwise
