"""Quantizers: the tree beside `params` that says which tensor is put on which grid."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.numerics.fake_quant import fake_quant
from jaxmet.numerics.grid import check_bits, grid_ends
from jaxmet.numerics.ranges import (
    SCALE_FLOOR,
    grid_between,
    minmax,
    regrid,
    round_through,
)
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.names import named_leaves, select, suggestion
from jaxmet.tree.table import Table

INT32_ENDS = (-(2.0**31), 2.0**31 - 128)  # the float32 numbers nearest inside int32


class Grid(NamedTuple):
    """The ends of one grid and its switch, as data: changing them recompiles nothing."""

    low: Any
    high: Any
    enabled: Any


class Grids(NamedTuple):
    """One `Grid` a quantizer, under the names of `Quantizers`."""

    weights: dict[str, Grid]
    activations: dict[str, Grid]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantizer:
    """One grid. Scale and zero point are leaves, everything else is static.

    A `scale` of `None` follows the tensor: it is recomputed from the smallest and
    largest value of what is quantized, and no gradient goes through it. Scales are
    scalars, or have the rank of the tensor with size 1 on the axes they do not tell
    apart. `axis` are the axes with scales of their own, and on `block_axis` each scale
    serves `block` neighbours. The integers of a symmetric grid are signed or not; an
    asymmetric grid always starts at 0. With 32 bits nothing is rounded, and the scale
    remembers its range as a 16 bit grid would hold it. `product` names the weight and
    the activation whose scales multiply to that of an int32 bias.
    """

    scale: Any = None
    zero_point: Any = None
    bits: int = 8
    symmetric: bool = True
    signed: bool = True
    narrow: bool = True
    axis: tuple[int, ...] | None = None
    block: int | None = None
    block_axis: int | None = None
    calibrator: str = "minmax"
    product: tuple[str, str] | None = None
    enabled: bool = True

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and highest integer."""
        bits = 16 if self.bits == 32 else self.bits
        signed = self.symmetric and self.signed
        return grid_ends(bits, signed=signed, narrow=self.narrow)

    @property
    def active(self) -> bool:
        """Whether it changes anything, unless grids given as data say otherwise."""
        return self.enabled and (self.bits != 32 or self.product is not None)

    def grid(self, x: Any, ends: Grid | None = None) -> tuple[jax.Array, jax.Array]:
        """The scale and zero point that quantize `x`, perhaps with other grid ends.

        Other ends cover the same real range: the scale stretches and the zero point
        moves with them.
        """
        low, high = self.ends if ends is None else (ends.low, ends.high)
        if self.scale is None:
            axes = {"block": self.block, "block_axis": self.block_axis}
            extremes = minmax(lax.stop_gradient(jnp.asarray(x)), self.axis, **axes)
            return grid_between(*extremes, low, high, symmetric=self.symmetric)
        scale = jnp.asarray(self.scale)
        if self.zero_point is None:
            zero_point = jnp.zeros_like(scale)
        else:
            zero_point = jnp.asarray(self.zero_point, scale.dtype)
        if ends is not None:
            scale, zero_point = regrid(
                scale, zero_point, self.ends, (low, high), symmetric=self.symmetric
            )
        return scale, round_through(zero_point)

    def __call__(self, x: Any, grid: Grid | None = None) -> Any:
        """`x` on the grid; with `grid` its ends and switch are those, as data."""
        if grid is None and (not self.enabled or self.bits == 32):
            return x
        x = jnp.asarray(x)
        low, high = self.ends if grid is None else grid[:2]
        quantized = fake_quant(
            x, *self.grid(x, grid), low, high, axis=self.axis, block=self.block
        )
        return quantized if grid is None else jnp.where(grid.enabled, quantized, x)

    def set(self, **fields: Any) -> "Quantizer":
        """A copy with some fields changed; a known real range stays what it is."""
        _check_fields(fields)
        for name in ("scale", "zero_point"):
            if fields.get(name) is not None:
                fields[name] = jnp.asarray(fields[name], jnp.float32)
        if fields.get("axis") is not None:
            fields["axis"] = tuple(fields["axis"])
        new = dataclasses.replace(self, **fields)
        if self.scale is None or "scale" in fields:
            return new
        changed = {name for name in fields if fields[name] != getattr(self, name)}
        if changed & {"axis", "block", "block_axis"}:
            raise ValueError(
                "jaxmet.Quantizers.set: the scale is already a number for "
                f"{_granularity(self)}, so axis and block cannot change alone. Give "
                "scale= too (None follows the weight again), or calibrate again."
            )
        if not changed & {"bits", "symmetric", "signed", "narrow"}:
            return new
        return _on_new_grid(self, new)

    def __repr__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        what = f"{self.bits} bits, {kind}, {_granularity(self)}, {_scale_text(self)}"
        return f"Quantizer({what}{'' if self.enabled else ', off'})"


_META = [f.name for f in dataclasses.fields(Quantizer)][2:]
jax.tree_util.register_dataclass(Quantizer, ["scale", "zero_point"], _META)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantizers:
    """The quantizers of a model: a pytree beside `params`.

    `weights` are keyed by parameter (weights that the model derives from parameters by
    node), `activations` by the node whose output they quantize. `shared` pairs a node
    with the one whose quantizer it uses; `left` pairs what is not quantized with why.
    """

    weights: dict[str, Any] = dataclasses.field(default_factory=dict)
    activations: dict[str, Any] = dataclasses.field(default_factory=dict)
    shared: tuple[tuple[str, str], ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def owner(self, name: str) -> str | None:
        """The name under which the quantizer of this node's output is kept."""
        owners, seen = dict(self.shared), set()
        while name not in self.activations and name in owners and name not in seen:
            seen.add(name)
            name = owners[name]
        return name if name in self.activations else None

    def activation(self, name: str) -> Quantizer | None:
        """What quantizes the output of this node, its own or one that it shares."""
        owner = self.owner(name)
        return None if owner is None else self.activations[owner]

    def set(self, glob: str, **fields: Any) -> "Quantizers":
        """A copy in which the quantizers that the glob means have other fields.

        `set('stem', bits=16)`, `set('*/kernel', axis=None)`, `set('head*',
        enabled=False)`. Changing the bits of a calibrated grid keeps the real range
        that it covers. An int32 bias takes its grid from its product: it can only be
        switched with `enabled`.
        """
        _check_fields(fields)
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
                f"the grid of {name!r} is the product of those of {weight!r} and "
                f"{activation!r}. Set one of these, or enabled=False."
            )
        return f"{name!r} uses the grid of {self.owner(name)!r}. Set that one."

    def pin(self, params: Any) -> "Quantizers":
        """A copy whose weight scales are leaves, computed from `params` as it is now.

        Scales that are leaves already stay, and so do weights that the model derives.
        """
        leaves = named_leaves(params)

        def pinned(name: str, q: Quantizer) -> Quantizer:
            follows = q.scale is None and q.product is None and q.bits != 32
            if not follows or name not in leaves:
                return q
            scale, zero_point = q.grid(_weight(leaves[name]))
            zero_point = None if q.symmetric else zero_point
            return dataclasses.replace(q, scale=scale, zero_point=zero_point)

        weights = {name: pinned(name, q) for name, q in self.weights.items()}
        return dataclasses.replace(self, weights=weights)

    def quantize_weights(
        self, params: Mapping[str, Any], grids: Grids | None = None
    ) -> dict[str, Any]:
        """The named leaves with every one that has a quantizer put on its grid."""
        out = dict(params)
        for name, q in self.weights.items():
            if name not in params:
                continue  # the model derives this weight: the hook quantizes it
            if q.product is not None:
                out[name] = self._int32_bias(name, params, grids)
            else:
                quantized = q(_weight(params[name]), grids and grids.weights[name])
                out[name] = _with_weight(params[name], quantized)
        return out

    def _int32_bias(
        self, name: str, params: Mapping[str, Any], grids: Grids | None
    ) -> Any:
        """The bias as an integer accumulator holds it: a multiple of s_w s_x.

        It stays as it is where the product itself is not integer.
        """
        weight_name, node = self.weights[name].product
        owner, q_w = self.owner(node), self.weights.get(weight_name)
        if q_w is None or owner is None or weight_name not in params:
            raise ValueError(
                f"jaxmet.quantize_weights: the bias {name!r} is to be rounded to the "
                f"scales of {weight_name!r} and {node!r}, and one has no quantizer. "
                "Calibrate again, or use bias='float'."
            )
        q_x, parts = self.activations[owner], [self.weights[name], q_w]
        parts.append(q_x)
        g_w = grids and grids.weights[weight_name]
        g_x = grids and grids.activations[owner]
        if q_x.scale is None or (grids is None and not all(q.active for q in parts)):
            return params[name]
        bias = jnp.asarray(_weight(params[name]))
        s_w, _ = q_w.grid(_weight(params[weight_name]), g_w)
        s_x, _ = q_x.grid(None, g_x)
        product = along_bias(s_w, bias, name) * along_bias(s_x, bias, name)
        scale = jnp.maximum(jnp.broadcast_to(product, bias.shape), SCALE_FLOOR**2)
        quantized = fake_quant(bias, scale, jnp.zeros_like(scale), *INT32_ENDS)
        if grids is not None:
            on = grids.weights[name].enabled & g_w.enabled & g_x.enabled
            quantized = jnp.where(on, quantized, bias)
        return _with_weight(params[name], quantized)

    def __repr__(self) -> str:
        rows = [(n, "weight", q) for n, q in self.weights.items()]
        rows += [(n, "activation", q) for n, q in self.activations.items()]
        table = Table(
            {
                "what": [name for name, _, _ in rows],
                "kind": [kind for _, kind, _ in rows],
                "bits": [q.bits if q.enabled else None for _, _, q in rows],
                "symmetric": ["yes" if q.symmetric else "no" for _, _, q in rows],
                "one scale per": [_granularity(q) for _, _, q in rows],
                "scale": [_scale_text(q, kind) for _, kind, q in rows],
            },
            title=f"Quantizers: {len(self.weights)} weights, "
            f"{len(self.activations)} activations",
        )
        shared = [f"  {name} as {self.owner(name)}" for name, _ in self.shared]
        left = [f"  {name}: {why}" for name, why in self.left]
        return "\n".join(
            [repr(table)]
            + (["", "sharing a grid", *shared] if shared else [])
            + (["", "not quantized", *left] if left else [])
        )


jax.tree_util.register_dataclass(
    Quantizers, ["weights", "activations"], ["shared", "left"]
)


def grids(quantizers: Quantizers) -> Grids:
    """Grid ends and switches as a tree of data, to change without recompiling.

    `simulate(…, grids=…)` takes it. With other ends a grid covers the same real range
    in coarser or finer steps.
    """

    def grid(q: Quantizer) -> Grid:
        ends = q.ends if q.product is None else INT32_ENDS
        low, high = (jnp.asarray(end, jnp.float32) for end in ends)
        return Grid(low, high, jnp.asarray(q.active))

    return Grids(
        {name: grid(q) for name, q in quantizers.weights.items()},
        {name: grid(q) for name, q in quantizers.activations.items()},
    )


def along_bias(scale: jax.Array, bias: jax.Array, name: str) -> jax.Array:
    """A weight's or activation's scale in the axes of the bias of its product.

    Per channel it lies along the last axes; with one scale a stacked layer, along the
    first one.
    """
    sizes = tuple(n for n in scale.shape if n > 1)
    told = tuple(n for n in bias.shape if n > 1)
    if sizes in ((), told):
        return scale.reshape(bias.shape if sizes else (1,) * bias.ndim)
    for shape in (bias.shape[-1:], bias.shape[:1]):
        if sizes == shape:
            before = bias.ndim - 1 if shape == bias.shape[-1:] else 0
            after = bias.ndim - 1 - before
            return scale.reshape((1,) * before + sizes + (1,) * after)
    raise ValueError(
        f"jaxmet.quantize_weights: the bias {name!r} of shape {bias.shape} cannot take "
        f"a product with scales of shape {scale.shape}. Use bias='float' for it."
    )


def _weight(leaf: Any) -> Any:
    return leaf.weight if is_compressed(leaf) else leaf


def _with_weight(leaf: Any, weight: Any) -> Any:
    return leaf.replace(weight=weight) if is_compressed(leaf) else weight


def _on_new_grid(old: Quantizer, new: Quantizer) -> Quantizer:
    """The real range of a calibrated quantizer on the grid of another."""
    scale, zero_point = old.grid(None)
    kinds = [(q.symmetric, q.signed, q.narrow) for q in (old, new)]
    if kinds[0] == kinds[1]:
        scale, zero_point = regrid(
            scale, zero_point, old.ends, new.ends, symmetric=new.symmetric
        )
    else:
        extremes = [scale * (end - zero_point) for end in old.ends]
        scale, zero_point = grid_between(*extremes, *new.ends, symmetric=new.symmetric)
    zero_point = None if new.symmetric else zero_point
    return dataclasses.replace(new, scale=scale, zero_point=zero_point)


def _check_fields(fields: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Quantizer)]
    for name in fields:
        if name not in known:
            raise ValueError(
                f"jaxmet.Quantizers.set: a quantizer has no field {name!r}. "
                f"{suggestion(name, known)}"
            )
    if "bits" in fields:
        check_bits(fields["bits"], caller="Quantizers.set")


def _granularity(q: Quantizer) -> str:
    if q.block is not None:
        return f"block of {q.block}"
    return "tensor" if q.axis is None else "channel"


def _scale_text(q: Quantizer, kind: str = "weight") -> str:
    if q.product is not None:
        return f"product of {q.product[0]} and {q.product[1]}"
    if q.bits == 32:
        return "float"
    if q.scale is None:
        return "follows the weight" if kind == "weight" else "on the fly"
    if isinstance(q.scale, jax.core.Tracer) or not hasattr(q.scale, "dtype"):
        return "traced"
    least, most = np.min(q.scale), np.max(q.scale)
    return f"{least:.4g}" if least == most else f"{least:.4g} .. {most:.4g}"
