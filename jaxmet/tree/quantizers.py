"""Quantizers: the tree beside `params` that says which tensor is quantized."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.numerics.fake_quant import fake_quant
from jaxmet.numerics.precision import wide
from jaxmet.numerics.ranges import SCALE_FLOOR
from jaxmet.tree.bias_scales import INT32_ENDS, along_bias, bias_scale
from jaxmet.tree.bias_scales import along_scale as along_scale
from jaxmet.tree.checks import kind_of
from jaxmet.tree.globs import select, suggestion
from jaxmet.tree.host_rounding import (
    grid_of,
    on_host,
    round_on_host,
    rounded,
)
from jaxmet.tree.leaves import as_before, dense, is_quantized, with_weight
from jaxmet.tree.named_leaves import named_leaves
from jaxmet.tree.quantizer import (
    Quantizer,
    check_fields,
    granularity,
    scale_text,
)
from jaxmet.tree.table import Table, noted, noted_html

if TYPE_CHECKING:
    from jaxmet.tree.grids import Grids


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantizers:
    """The quantizers of a model: a pytree beside `params`.

    `weights` are keyed by parameter (weights that the model derives from parameters by
    node), `activations` by the node whose output they quantize. `shared` pairs a node
    with the one whose quantizer it uses; `skipped` pairs what is not quantized with why;
    `derived` names the nodes whose weight the model computes from several parameters.

    Args:
        weights: a `Quantizer` per weight or bias, by name of the parameter; default none.
        activations: a `Quantizer` per node whose output has its own; default none.
        shared: pairs of a node and the node whose quantizer it uses; default none.
        skipped: pairs of what is not quantized and the reason; default none.
        derived: nodes whose weight the model computes from parameters; default none.

    >>> quantizers = jm.calibrate(params, graph, batches)
    >>> quantizers.weights["stem/kernel"].bits
    """

    weights: dict[str, Any] = dataclasses.field(default_factory=dict)
    activations: dict[str, Any] = dataclasses.field(default_factory=dict)
    shared: tuple[tuple[str, str], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    derived: tuple[str, ...] = ()

    def owner(self, name: str) -> str | None:
        """The name under which the quantizer of this node's output is kept.

        Args:
            name: the name of a node.

        Returns:
            That name, None where the output is not quantized.

        >>> quantizers.owner("left/relu")
        """
        owners, seen = dict(self.shared), set()
        while name not in self.activations and name in owners and name not in seen:
            seen.add(name)
            name = owners[name]
        return name if name in self.activations else None

    def activation(self, name: str) -> Quantizer | None:
        """What quantizes the output of this node, its own or one that it shares.

        Args:
            name: the name of a node.

        Returns:
            The quantizer, None where there is none.

        >>> quantizers.activation("stem/relu")
        """
        owner = self.owner(name)
        return None if owner is None else self.activations[owner]

    def set(self, glob: str, **fields: Any) -> "Quantizers":
        """A copy in which the quantizers that the glob means have other fields.

        `set('stem', bits=16)`, `set('*/kernel', axis=None)`, `set('head*',
        enabled=False)`. Changing the bits of a calibrated quantizer keeps the real range
        that it covers. An int32 bias takes its quantizer from its product: it can only be
        switched with `enabled`.

        Args:
            glob: names of parameters or nodes, with or without wildcards.
            **fields: fields of `jm.Quantizer` and their new values.

        Returns:
            The changed copy.

        Raises:
            ValueError: for a glob that matches no quantizer of its own, an unknown field and an
                impossible value.

        >>> quantizers = quantizers.set("head/*", bits=16)
        """
        check_fields(fields)
        own = [*self.weights, *self.activations]
        names = select(
            glob, [*own, *dict(self.shared)], caller=f"Quantizers.set({glob!r})"
        )
        free = {"enabled", "product"} & fields.keys()
        quantizers = [g[n] for g in self._groups() for n in names if n in g]
        if not any(free or q.product is None for q in quantizers):
            raise ValueError(f"jaxmet.Quantizers.set: {self._no_grid_of(names[0])}")

        def changed(group: Mapping[str, Quantizer]) -> dict[str, Quantizer]:
            return {
                name: q.set(**({f: fields[f] for f in free} if q.product else fields))
                if name in names
                else q
                for name, q in group.items()
            }

        weights, activations = map(changed, self._groups())
        return dataclasses.replace(self, weights=weights, activations=activations)

    def _groups(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.weights, self.activations

    def _no_grid_of(self, name: str) -> str:
        if name in self.weights:
            weight, activation = self.weights[name].product
            return (
                f"the quantizer of {name!r} is the product of those of {weight!r} and "
                f"{activation!r}. Set one of these, or enabled=False."
            )
        return f"{name!r} uses the quantizer of {self.owner(name)!r}. Set that one."

    def leaves(self, params: Any, caller: str) -> dict[str, Any]:
        """The leaves of `params` by name, every weight that has a quantizer among them."""
        leaves = named_leaves(params)
        for name in self.weights:
            if name not in leaves and name not in self.derived:
                raise ValueError(
                    f"jaxmet.{caller}: the tree has no parameter {name!r}, for which there is "
                    f"a quantizer. {suggestion(name, leaves)} Pass the parameters that the "
                    "quantizers are of."
                )
            array = dense(leaves[name]) if name in leaves else np.zeros(0)
            if not (hasattr(array, "shape") and hasattr(array, "dtype")):
                raise ValueError(
                    f"jaxmet.{caller}: {name!r} is {kind_of(array)}, not an array. Pass the "
                    "parameters that the quantizers are of."
                )
            self._check_size(name, array, caller)
        return leaves

    def _check_size(self, name: str, array: Any, caller: str) -> None:
        """Refuse a stated scale that does not fit its weight: quantizers of another tree."""
        q = self.weights[name]
        scale = q.maximum if q.maximum is not None else q.scale
        shape = jnp.shape(array)
        if name in self.derived or scale is None or q.block is not None:
            return
        sizes = jnp.shape(scale)
        fits = all(n in (1, m) for n, m in zip(sizes, shape, strict=False))
        if sizes and not (fits and len(sizes) == len(shape)):
            raise ValueError(
                f"jaxmet.{caller}: the quantizer of {name!r} has scales of shape {sizes}, and "
                f"the parameter has the shape {shape}. Pass the parameters that the quantizers "
                "are of, or calibrate for these."
            )

    def pin(self, params: Any) -> "Quantizers":
        """A copy whose weight scales are leaves, computed from `params` as it is now.

        Scales that are leaves already stay, and so do weights that the model derives.

        Args:
            params: the tree whose weights decide the scales.

        Returns:
            The copy with pinned scales.

        Raises:
            ValueError: for a tree without a parameter that has a quantizer.

        >>> pinned = quantizers.pin(params)
        """
        leaves = self.leaves(params, "Quantizers.pin")

        def pinned(name: str, q: Quantizer) -> Quantizer:
            open_ = q.follows and q.product is None and q.bits != 32
            if not open_ or name not in leaves:
                return q
            array = on_host(dense(leaves[name]))
            grid = None if array is None else grid_of(q, array)
            if grid is None:
                return q.holding(*q.grid(dense(leaves[name])))
            return q.holding(*map(jax.device_put, grid))

        weights = {name: pinned(name, q) for name, q in self.weights.items()}
        return dataclasses.replace(self, weights=weights)

    def quantize_weights(
        self, params: Mapping[str, Any], grids: "Grids | None" = None
    ) -> dict[str, Any]:
        """The named leaves with every one that has a quantizer quantized."""
        out = dict(params)
        for name in self.weights:
            if name in params:  # the hook quantizes what the model derives
                out[name] = self.quantize_weight(name, params, grids)
        return out

    def quantize_weight(
        self, name: str, params: Mapping[str, Any], grids: "Grids | None" = None
    ) -> Any:
        """One of the named leaves quantized; an int32 bias with the scale of its weight."""
        q, leaf = self.weights[name], params[name]
        known = self.on_host(name, params) if grids is None else None
        if known is not None and self._is_float(name):
            return leaf
        if known is not None:
            return with_weight(leaf, as_before(known, dense(leaf)))
        if q.product is not None:
            return self._int32_bias(name, params, grids)
        return with_weight(leaf, q(dense(leaf), grids and grids.weights[name]))

    def _int32_bias(
        self, name: str, params: Mapping[str, Any], grids: "Grids | None"
    ) -> Any:
        """The bias as an integer accumulator holds it: a multiple of s_w s_x.

        It is unchanged where the product itself is not integer.
        """
        weight_name, node = self.weights[name].product
        owner, q_w = self.owner(node), self.weights.get(weight_name)
        if q_w is None or owner is None or weight_name not in params:
            raise ValueError(
                f"jaxmet.quantize_weights: the bias {name!r} is to be rounded to the "
                f"scales of {weight_name!r} and {node!r}, and one has no quantizer. "
                "Calibrate again, or use bias='float'."
            )
        q_x = self.activations[owner]
        parts = (self.weights[name], q_w, q_x)
        ends = (None, None, None)
        if grids is not None:
            by_name = (grids.weights[name], grids.weights[weight_name])
            ends = (*by_name, grids.activations[owner])
        elif not all(q.active for q in parts):
            return params[name]
        if q_x.follows:
            return params[name]
        bias = jnp.asarray(dense(params[name]))
        rest = self._beside(name, params, bias)
        weight = params[weight_name]
        if is_quantized(weight) and ends[1] is None:
            s_w = weight.weight.scale  # what it was rounded with: nothing to look for
        else:
            s_w, _ = q_w.grid(dense(weight), ends[1])
        s_x, _ = q_x.grid(None, ends[2])
        s_x = s_x.astype(s_w.dtype)
        product = along_bias(s_w, bias, name) * along_bias(s_x, bias, name)
        product = lax.stop_gradient(jnp.broadcast_to(product, bias.shape))
        scale = jnp.maximum(product, SCALE_FLOOR**2)
        whole = bias if rest is None else bias.astype(rest.dtype) + rest
        rounded = fake_quant(whole, scale, jnp.zeros_like(scale), *INT32_ENDS)
        if rest is not None:
            rounded = (rounded - rest).astype(bias.dtype)
        for grid in ends:
            if grid is not None:
                rounded = jnp.where(grid.enabled, rounded, bias)
        return with_weight(params[name], rounded)

    def _is_float(self, name: str) -> bool:
        """Whether a weight or bias is skipped."""
        q = self.weights[name]
        if q.product is None:
            return not q.active
        q_w, q_x = self.weights[q.product[0]], self.activation(q.product[1])
        return (
            q_x is None or q_x.follows or not (q.active and q_w.active and q_x.active)
        )

    def on_host(
        self, name: str, params: Mapping[str, Any], bits: int | None = None
    ) -> np.ndarray | None:
        """A quantized weight in NumPy, with scales of another width of weights too.

        None where only JAX can do it: for traced, sharded and half-precision leaves, and for
        ranges that are searched for.
        """
        q = self.weights[name]
        if q.product is None:
            return round_on_host(q, dense(params[name]), bits)
        weight, node = q.product
        owner, q_w = self.owner(node), self.weights.get(weight)
        if q_w is None or owner is None:
            return None
        read = (name, weight, *(other for other, _ in q.beside))
        known = (on_host(dense(params[n])) for n in read if n in params)
        arrays = [a for a in known if a is not None]
        if len(arrays) < len(read):
            return None
        bias, array, *rest = arrays
        if self._is_float(name):
            return bias
        of_w, of_x = grid_of(q_w, array, bits), grid_of(self.activations[owner], array)
        if of_w is None or of_x is None:
            return None
        scale = bias_scale(of_w[0], of_x[0], bias, name)
        zero_point = np.zeros_like(scale)
        if not rest:
            return rounded(bias, (scale, zero_point), INT32_ENDS, None)
        wider = max(arrays, key=lambda a: a.dtype.itemsize).dtype
        terms = [
            sign * a.astype(wider).reshape(bias.shape)
            for a, (_, sign) in zip(rest, q.beside, strict=True)
        ]
        beside = functools.reduce(np.add, terms)
        found = rounded(bias + beside, (scale, zero_point), INT32_ENDS, None)
        return (found - beside).astype(bias.dtype)

    def _beside(
        self, name: str, params: Mapping[str, Any], bias: jax.Array
    ) -> jax.Array | None:
        """What the accumulator adds to a bias: of a folded norm the mean, and another bias."""
        terms = []
        for other, sign in self.weights[name].beside:
            if other not in params:
                raise ValueError(
                    f"jaxmet.quantize_weights: the int32 bias {name!r} is a sum with {other!r}, "
                    "which the tree does not have. Pass the whole variables, or use "
                    "bias='float'."
                )
            x = jnp.asarray(dense(params[other]))
            terms.append(sign * x.astype(wide(bias.dtype, x.dtype)))
        dtype = wide(*(x.dtype for x in terms))
        parts = [x.astype(dtype).reshape(bias.shape) for x in terms]
        return functools.reduce(jnp.add, parts) if parts else None

    def whole_bias(self, name: str, params: Mapping[str, Any]) -> jax.Array:
        """What an int32 bias stands for: the parameter, and what is added beside it."""
        bias = jnp.asarray(dense(params[name]))
        rest = self._beside(name, params, bias)
        return bias if rest is None else bias.astype(rest.dtype) + rest

    def _table(self) -> Table:
        rows = [(n, "weight", q) for n, q in self.weights.items()]
        rows += [(n, "activation", q) for n, q in self.activations.items()]
        return Table(
            {
                "tensor": [name for name, _, _ in rows],
                "kind": [kind for _, kind, _ in rows],
                "bits": [q.bits if q.enabled else None for _, _, q in rows],
                "symmetric": ["yes" if q.symmetric else "no" for _, _, q in rows],
                "one scale per": [granularity(q) for _, _, q in rows],
                "scale": [scale_text(q, kind) for _, kind, q in rows],
            },
            title=f"Quantizers: {len(self.weights)} weights, "
            f"{len(self.activations)} activations",
        )

    def _notes(self) -> dict[str, list[str]]:
        return {
            "sharing a quantizer": [f"{n} as {self.owner(n)}" for n, _ in self.shared],
            "not quantized": [f"{name}: {why}" for name, why in self.skipped],
        }

    def __repr__(self) -> str:
        return noted(self._table(), self._notes())

    def _repr_html_(self) -> str:
        return noted_html(self._table(), self._notes())


jax.tree_util.register_dataclass(
    Quantizers, ["weights", "activations"], ["shared", "skipped", "derived"]
)


def check_are_quantizers(quantizers: Any, caller: str) -> None:
    """Raise unless these are `Quantizers`."""
    if not isinstance(quantizers, Quantizers):
        raise ValueError(
            f"jaxmet.{caller}: quantizers is of type {type(quantizers).__name__}. Give what "
            "jm.calibrate returned, after the parameters (and the graph)."
        )
