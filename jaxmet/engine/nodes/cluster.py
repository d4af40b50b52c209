"""Groups of equations: what one is, what it holds, and how far it reaches."""

import dataclasses
from collections.abc import Iterable

from jaxmet.engine.axes.views import CASTS, VIEW_RULES
from jaxmet.engine.nodes.records import Pointwise, Record, Weighted
from jaxmet.engine.program.program import DATA, PARAM, Equation, Region, Value

LAYERS = ("product", "ragged", "lookup")
"""Kinds of nodes that hold a weight."""

PRODUCT_KINDS = ("product", "ragged", "matmul")
"""Kinds of nodes that sum over products: with a weight, or of two activations."""

LINEAR = ("neg", *CASTS)
SCALE = ("mul", "div")
SHIFT = ("add", "sub", "add_any")
VIEWS = tuple(VIEW_RULES)


@dataclasses.dataclass(eq=False, repr=False)
class Cluster:
    """A node before it has a name: what it is, what it computes, what it reads."""

    kind: str
    function: str
    equations: list[Equation]
    exit: Value
    entry: Value | None = None
    record: Record | None = None
    name: str = ""
    operands: list[Value] = dataclasses.field(default_factory=list)

    @property
    def weighted(self) -> Weighted:
        """The weight of a layer and the equation that reads it."""
        assert isinstance(self.record, Weighted)
        return self.record

    @property
    def pointwise(self) -> Pointwise:
        """What is known of an activation; nothing of other nodes."""
        return self.record if isinstance(self.record, Pointwise) else Pointwise()


@dataclasses.dataclass(frozen=True, repr=False)
class Leaf:
    """A parameter and the views through which it is used; None: a loop slices it."""

    value: Value
    views: tuple[Equation | None, ...]

    @property
    def stacked(self) -> bool:
        return None in self.views


def leaf_of(value: Value) -> Leaf | None:
    """The parameter that a value is a view of, followed out of loops and branches."""
    views: list[Equation | None] = []
    while value.name is None:
        producer = value.producer
        if producer is not None and producer.name in VIEWS:
            views.append(producer)
            value = producer.operands[0]
        elif value.source is not None:
            views += [None] * value.sliced
            value = value.source
        else:
            return None
    return Leaf(value, tuple(reversed(views)))


def leaves_under(value: Value) -> list[Value]:
    """Every parameter that a value is computed from, in order of discovery."""
    found: dict[Value, None] = {}
    seen: set[Value] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if value in seen or value.kind != PARAM:
            continue
        seen.add(value)
        if value.name is not None:
            found[value] = None
        elif value.source is not None:
            stack.append(value.source)
        elif value.producer is not None:
            stack += reversed(value.producer.operands)
    return list(found)


def through_views(value: Value, names: Iterable[str] = VIEWS) -> Value:
    """The value that this one is a view of."""
    while value.producer is not None and value.producer.name in names:
        if not value.producer.operands:
            break
        value = value.producer.operands[0]
    return value


def centre(value: Value) -> tuple[Value, Value | None]:
    """The value that is centred and its mean: (x, m) of x − m, else (x, None)."""
    value = through_views(value, ("convert_element_type",))
    if value.producer is not None and value.producer.name == "sub":
        x, mean = value.producer.operands
        same = x.ndim == mean.ndim and x.kind == DATA
        if same and (mean.kind < DATA or varying_axes(mean) != varying_axes(x)):
            x = through_views(x, ("convert_element_type",))
            return x, mean
    return value, None


def varying_axes(value: Value) -> set[int]:
    """Axes along which a value varies: neither of size one nor just broadcast."""
    axes = {i for i, n in enumerate(value.shape) if n != 1}
    producer = value.producer
    if producer is not None and producer.name == "broadcast_in_dim":
        source, where = producer.operands[0], producer.params["broadcast_dimensions"]
        kept = {int(where[i]) for i in varying_axes(source)}
        return axes & kept
    if producer is not None and producer.name in LINEAR:
        return axes & varying_axes(producer.operands[0])
    return axes


def by_channel(value: Value) -> bool:
    """Whether a parameter is one number per channel, which may be laid along several axes."""
    leaf = leaf_of(value)
    one = leaf is not None and leaf.value.ndim - leaf.stacked <= 1
    return one or len(varying_axes(value)) <= 1


def is_free(equation: Equation) -> bool:
    return equation.node is None and not equation.bodies


def only_use(value: Value) -> Equation | None:
    return value.uses[0] if len(value.uses) == 1 else None


def order_of(region: Region) -> dict[Equation, int]:
    return {e: i for i, e in enumerate(region.equations)}


def cone(
    exit: Value, stop: set[Value], region_order: dict[Equation, int]
) -> list[Equation]:
    """What `exit` needs between the values in `stop` and itself, and nothing else needs.

    Equations that read neither data nor parameters made inside come along; an equation
    whose result is used outside stays out, and with it what only it needs.
    """
    found: set[Equation] = set()
    stack = [exit]
    while stack:
        value = stack.pop()
        equation = value.producer
        if (
            value in stop
            or equation is None
            or equation in found
            or not is_free(equation)
        ):
            continue
        if equation not in region_order:
            continue
        found.add(equation)
        stack += equation.operands
    return _shrink(found, exit, region_order)


def _shrink(
    found: set[Equation], exit: Value, order: dict[Equation, int]
) -> list[Equation]:
    last = exit.producer
    while True:
        escaping = {
            e
            for e in found
            if e is not last and any(u not in found for v in e.results for u in v.uses)
        }
        if not escaping:
            return sorted(found, key=order.__getitem__)
        found = found - escaping
