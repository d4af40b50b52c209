"""The program that a factorized or pruned tree stands for.

The model is traced with dense shapes, as it was written. Its equations are then run with the
leaves as they are: a product with factors becomes two products, and what was pruned is not
computed. Traced again, that is an ordinary program over the parts of the leaves, which
grouping, names, hooks and every transform read like any other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxmet.engine.axes.views import CASTS, VIEW_RULES
from jaxmet.engine.nodes.pointwise import POINTWISE
from jaxmet.engine.program import compat
from jaxmet.engine.program.calls import Apply, Call, make_call
from jaxmet.engine.program.program import Equation, Region, Value, flatten
from jaxmet.engine.pruned import part_arithmetic as arithmetic
from jaxmet.engine.pruned import part_moves as moves
from jaxmet.engine.pruned.factor_views import viewed
from jaxmet.engine.pruned.opened_leaves import like, multiply, opened
from jaxmet.engine.pruned.partial import Partial, Rule, Uniform, taken, whole
from jaxmet.tree.leaves import dense, is_structured
from jaxmet.tree.named_leaves import flatten as flatten_tree
from jaxmet.tree.named_leaves import path_parts
from jaxmet.tree.structures import Keep, LowRank, Pruned


def call_of(apply: Apply, params: Any, args: tuple, kwargs: dict[str, Any]) -> Call:
    """A call over the parts of the leaves, of the program that they stand for."""
    if not any(map(is_structured, flatten_tree(params, whole=True)[1])):
        return make_call(apply, params, args, kwargs)
    return make_call(expanded(apply), params, args, kwargs)


ENTRYWISE = (*POINTWISE, *CASTS)
REDUCE = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or")
WINDOW = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
RULES: dict[str, Rule] = {
    **dict.fromkeys((*POINTWISE, "add_any"), arithmetic.elementwise),
    **dict.fromkeys(REDUCE, arithmetic.reduction),
    **dict.fromkeys(WINDOW, arithmetic.window),
    "broadcast_in_dim": moves.broadcast,
    "reshape": moves.reshape,
    "transpose": moves.transpose,
    "squeeze": moves.squeeze,
    "rev": moves.reverse,
    "slice": moves.slices,
    "split": moves.split,
    "concatenate": moves.concatenate,
    "pad": moves.pad,
    "dot_general": arithmetic.dot,
    "conv_general_dilated": arithmetic.conv,
}
"""How each primitive runs on arrays of which only some channels are left."""

Scattered = list[tuple[str, tuple[Keep, ...]]]


def scattered_before(
    apply: Apply, params: Any, inputs: tuple, kwargs: dict[str, Any]
) -> Scattered:
    """The operations that get whole arrays of which a part was left, and what was left."""
    found: Scattered = []
    make_call(expanded(apply, found), params, inputs, kwargs).jaxpr()
    return found


def expanded(apply: Apply, seen: Scattered | None = None) -> Apply:
    """The model on trees with factorized or pruned leaves.

    Equations that got whole arrays are added to `seen`.
    """

    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        call = make_call(apply, params, args, kwargs, whole=True)
        jaxpr, shape = call.jaxpr()
        region = flatten(jaxpr)
        machine = Expansion(seen)
        leaves = [opened(leaf) for leaf in call.leaves]
        environment = dict(zip(region.inputs, (*leaves, *call.inputs), strict=True))
        machine.run(region, environment)
        outputs = [whole(machine.read(environment, v)) for v in region.outputs]
        known = dict(zip(map(id, call.leaves), region.inputs, strict=False))
        for i, leaf in enumerate(updated(params, shape)):
            if leaf is not None and comes_from(region.outputs[i], known[id(leaf)]):
                outputs[i] = like(leaf, outputs[i])
        return jax.tree.structure(shape).unflatten(outputs)

    return run


def updated(params: Any, results: Any) -> list[Any]:
    """For each result the pruned leaf that it may be the new value of, None for the others.

    Such a result has the leaf's path, whatever stands before it, and its shape: statistics
    that a norm returns in training mode.
    """
    paths, leaves, _ = flatten_tree(params, whole=True)
    pruned = {
        tuple(path_parts(path)): leaf
        for path, leaf in zip(paths, leaves, strict=True)
        if isinstance(dense(leaf), Pruned)
    }
    found = []
    for path, result in jax.tree_util.tree_flatten_with_path(results)[0]:
        parts = tuple(path_parts(path))
        ends = (pruned.get(parts[i:]) for i in range(len(parts)))
        met = (leaf for leaf in ends if leaf is not None)
        found.append(next((x for x in met if x.shape == result.shape), None))
    return found


def comes_from(result: Value, source: Value) -> bool:
    """Whether a result is made of a value entry by entry, as a running mean of its old one."""
    stack, seen = [result], set()
    while stack:
        value = stack.pop()
        if value is source:
            return True
        producer = value.producer
        if value in seen or producer is None or producer.name not in ENTRYWISE:
            continue
        seen.add(value)
        stack += [v for v in producer.operands if v.shape == source.shape]
    return False


class Expansion:
    """Runs equations on arrays, parts and factors."""

    def __init__(self, seen: Scattered | None = None):
        self.seen = seen if seen is not None else []

    def read(self, environment: Mapping[Value, Any], value: Value) -> Any:
        return environment[value] if value in environment else value.constant

    def run(self, region: Region, environment: dict[Value, Any]) -> None:
        for equation in region.equations:
            operands = [self.read(environment, v) for v in equation.operands]
            results = self.step(equation, operands)
            environment.update(zip(equation.results, results, strict=True))

    def step(self, equation: Equation, operands: list[Any]) -> Sequence[Any]:
        if not any(isinstance(x, Partial | Uniform | LowRank) for x in operands):
            if equation.name == "broadcast_in_dim" and len(operands) == 1:
                results = RULES["broadcast_in_dim"](equation, operands)
                if results is not None:
                    return results
            return self.plain(equation, operands)
        if equation.name in compat.REMAT:
            return self.remat(equation, operands)
        if any(isinstance(x, LowRank) for x in operands):
            results = self.factors(equation, operands)
            if results is not None:
                return results
            operands = [multiply(x) if isinstance(x, LowRank) else x for x in operands]
            return self.step(equation, operands)
        if equation.name in compat.CUSTOM:
            results = self.custom(equation, operands)
        else:
            rule = RULES.get(equation.name)
            results = rule(equation, operands) if rule is not None else None
        if results is not None:
            return results
        return self.plain(equation, self.wholes(equation, operands))

    def wholes(self, equation: Equation, operands: Sequence[Any]) -> list[Any]:
        """The operands of an equation that has no rule for parts of them."""
        parts = [x for x in operands if isinstance(x, Partial)]
        self.seen += [(equation.name, x.keep) for x in parts]
        return [whole(x) for x in operands]

    def plain(self, equation: Equation, operands: list[Any]) -> Sequence[Any]:
        return compat.bind(equation.primitive, equation.params, operands)

    def factors(self, equation: Equation, operands: list[Any]) -> list[Any] | None:
        """What can be done with factors as they are."""
        if equation.name in CASTS and len(operands) == 1:
            x = operands[0]
            first, second = (
                self.step(equation, [opened(part)])[0] for part in (x.first, x.second)
            )
            return [dataclasses.replace(x, first=first, second=second)]
        if equation.name in VIEW_RULES and len(operands) == 1:
            factors = [opened(part) for part in (operands[0].first, operands[0].second)]
            if any(isinstance(factor, Partial | LowRank) for factor in factors):
                return None
            found = viewed(equation, operands[0], *factors)
            return None if found is None else [found]
        if equation.name == "gather":
            return self.looked_up(equation, operands)
        if equation.name not in ("conv_general_dilated", "dot_general"):
            return None
        if all(isinstance(x, LowRank) for x in operands[:2]):
            return None
        if equation.name == "dot_general":
            return self.two_dots(equation, operands)
        if isinstance(operands[1], LowRank):
            return self.two_convolutions(equation, *operands)
        return None

    def two_convolutions(
        self, equation: Equation, x: Any, kernel: LowRank
    ) -> list[Any] | None:
        p, numbers = equation.params, equation.params["dimension_numbers"]
        out, inside, *space = numbers.rhs_spec
        if (kernel.in_axes, kernel.out_axes) != ((inside,), (out,)):
            return None
        one, two = _between(equation), dict(p)
        # What the first makes is laid out as the second reads it.
        one["dimension_numbers"] = numbers._replace(out_spec=numbers.lhs_spec)
        idle: dict[str, Any] = {
            "window_strides": 1,
            "padding": (0, 0),
            "rhs_dilation": 1,
            "lhs_dilation": 1,
        }
        for n, axis in enumerate(space):
            first = kernel.method == "spatial" and _in_first(kernel, axis, space)
            other = two if first else one
            for key, value in idle.items():
                other[key] = (*other[key][:n], value, *other[key][n + 1 :])
        first, second = opened(kernel.first), opened(kernel.second)
        groups = p["feature_group_count"]
        if (
            groups > 1
            and isinstance(second, Partial)
            and not isinstance(first, Partial)
        ):
            first = _of_groups(first, second, out, groups, kernel.rank)
        x = self.product(equation, one, [x, first])
        return [self.product(equation, two, [x, second])]

    def product(self, equation: Equation, p: dict, operands: list[Any]) -> Any:
        """A product like that of an equation, with other parameters."""
        step = dataclasses.replace(equation, params=p)
        if any(isinstance(x, LowRank) for x in operands):  # a factor in two factors
            results = self.factors(step, operands)
            if results is not None:
                return results[0]
            operands = [multiply(x) if isinstance(x, LowRank) else x for x in operands]
        if any(isinstance(x, Partial) for x in operands):
            results = RULES[equation.name](step, operands)
            if results is not None:
                return results[0]
        return self.plain(step, self.wholes(step, operands))[0]

    def two_dots(self, equation: Equation, operands: list[Any]) -> list[Any] | None:
        at = 1 if isinstance(operands[1], LowRank) else 0
        weight, x = operands[at], operands[1 - at]
        contracted, batched = equation.params["dimension_numbers"]
        own, data = contracted[at], contracted[1 - at]
        free = tuple(i for i in range(len(weight.shape)) if i not in own)
        fits = {*own} == {*weight.in_axes} and {*free} == {*weight.out_axes}
        if any(batched) or not fits:
            return None
        first, second = opened(weight.first), opened(weight.second)
        middle, stay = weight.out_axes[:-1], weight.in_axes[:-1]
        first = self.squeezed(first, middle)
        second = self.squeezed(second, stay)
        shifted = tuple(i - sum(m < i for m in middle) for i in own)
        made = len(x.shape) - len(data) if at else 0  # the axis between the factors
        inner = weight.in_axes[-1] - sum(s < weight.in_axes[-1] for s in stay)
        one, two = _between(equation), dict(equation.params)
        for factor, p, axes in (
            (first, one, (data, shifted)),
            (second, two, ((made,), (inner,))),
        ):
            p["dimension_numbers"] = (axes if at else axes[::-1], ((), ()))
            x = self.product(equation, p, [x, factor] if at else [factor, x])
        return [x]

    def looked_up(self, equation: Equation, operands: list[Any]) -> list[Any] | None:
        """Rows of a table in two factors: those of one factor, times the other."""
        table, p = operands[0], equation.params
        numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
        along = tuple(numbers.collapsed_slice_dims)
        if not isinstance(table, LowRank) or len(table.shape) != 2 or len(along) != 1:
            return None
        (axis,) = along
        first, second = opened(table.first), opened(table.second)
        rows, other = (second, first) if axis in table.out_axes else (first, second)
        last = len(equation.results[0].shape) - 1
        whole_rows = sizes[1 - axis] == table.shape[1 - axis]
        if numbers.start_index_map != along or numbers.offset_dims != (last,):
            return None
        if not whole_rows or any(
            isinstance(x, Partial | LowRank) for x in (rows, other)
        ):
            return None
        sizes = tuple(1 if i == axis else rows.shape[i] for i in range(2))
        step = dataclasses.replace(equation, params=p | {"slice_sizes": sizes})
        (found,) = self.plain(step, [rows, operands[1]])
        contracted = ((last,), (axis,)), ((), ())
        return [lax.dot_general(found, other, contracted)]

    def squeezed(self, x: Any, axes: tuple[int, ...]) -> Any:
        if not axes:
            return x
        x = multiply(x) if isinstance(x, LowRank) else x
        keep = x.keep if isinstance(x, Partial) else ()
        moved = tuple(
            k._replace(axis=k.axis - sum(a < k.axis for a in axes)) for k in keep
        )
        part = lax.squeeze(x.part if isinstance(x, Partial) else x, axes)
        return Partial(part, moved, x.fill) if isinstance(x, Partial) else part

    def remat(self, equation: Equation, operands: list[Any]) -> Sequence[Any]:
        body, p = equation.bodies[0], equation.params

        def inner(*operands: Any) -> list[Any]:
            environment = dict(zip(body.inputs, operands, strict=True))
            self.run(body, environment)
            return [self.read(environment, v) for v in body.outputs]

        again = jax.checkpoint(inner, prevent_cse=p["prevent_cse"], policy=p["policy"])
        return again(*operands)

    def custom(self, equation: Equation, operands: list[Any]) -> list[Any] | None:
        """An elementwise function with a derivative of its own, on a part."""
        if len(operands) != 1 or not isinstance(operands[0], Partial):
            return None
        x = operands[0]
        body = flatten(compat.call_body(equation.params))

        def run(part: Any) -> Any:
            environment = {body.inputs[0]: Partial(part, x.keep, x.fill)}
            self.run(body, environment)
            return self.read(environment, body.outputs[0])

        result = run(x.part)
        if len(body.outputs) != 1 or not isinstance(result, Partial):
            return None
        if result.keep != x.keep:
            return None
        wrapped = jax.custom_jvp(lambda part: run(part).part)

        @wrapped.defjvp
        def rule(primals: Any, tangents: Any) -> Any:
            full = whole(Partial(primals[0], x.keep, x.fill))
            moved = whole(Partial(tangents[0], x.keep))
            _, along = jax.jvp(
                lambda a: self.plain(equation, [a])[0], (full,), (moved,)
            )
            return run(primals[0]).part, taken(along, x.keep)

        return [Partial(wrapped(x.part), x.keep, result.fill)]


def _between(equation: Equation) -> dict[str, Any]:
    """Parameters of the first of two products, which makes what its operands are."""
    p = dict(equation.params)
    if p["preferred_element_type"] is not None:
        dtypes = (v.aval.dtype for v in equation.operands[:2])
        p["preferred_element_type"] = max(dtypes, key=lambda d: d.itemsize)
    return p


def _of_groups(first: Any, second: Partial, out: int, groups: int, rank: int) -> Any:
    """The first factor of a grouped convolution as that of the groups that are left."""
    on = second.on(out)
    if on is None:
        return first
    alive = sorted({i // (on.size // groups) for i in on.indices})
    indices = tuple(g * rank + k for g in alive for k in range(rank))
    return Partial(first, (Keep(out, groups * rank, indices),))


def _in_first(kernel: LowRank, axis: int, window: Sequence[int]) -> bool:
    """Whether the first factor of a spatial pair holds an axis of the window."""
    one, two = (np.shape(dense(part))[axis] for part in (kernel.first, kernel.second))
    return one > 1 or (two == 1 and axis == min(window))
