"""One quantizer: which grid a tensor is put on."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.numerics.calibrators import CALIBRATORS, is_percentile, range_of
from jaxmet.numerics.fake_quant import fake_quant
from jaxmet.numerics.grid import check_bits, grid_ends
from jaxmet.numerics.ranges import grid_between, regrid, round_through
from jaxmet.tree.checks import is_concrete
from jaxmet.tree.names import suggestion


class Grid(NamedTuple):
    """The ends of one grid and its switch as data: changes recompile nothing."""

    low: Any
    high: Any
    enabled: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantizer:
    """One grid. Scale and zero point are leaves, everything else is static.

    A `scale` of `None` follows the tensor: it is recomputed from what is quantized, by
    `calibrator` (a search, but for 'minmax' and 'percentile': `Quantizers.pin` does it
    once), and no gradient goes through it. Scales are scalars, or have the rank of the
    tensor with size 1 on the axes they do not tell apart. `axis` are the axes with
    scales of their own, and on `block_axis` each scale
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
    percentile: float | int = 99.99
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
            extremes = range_of(
                lax.stop_gradient(jnp.asarray(x)),
                low,
                high,
                method=self.calibrator,
                symmetric=self.symmetric,
                percentile=self.percentile,
                axis=self.axis,
                block=self.block,
                block_axis=self.block_axis,
            )
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
        check_fields(fields)
        if "scale" in fields and fields["scale"] is None:
            fields["zero_point"] = None
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
                f"{granularity(self)}, so axis and block cannot change alone. Give "
                "scale= too (None follows the weight again), or calibrate again."
            )
        if not changed & {"bits", "symmetric", "signed", "narrow"}:
            return new
        return _on_new_grid(self, new)

    def __repr__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        what = f"{self.bits} bits, {kind}, {granularity(self)}, {scale_text(self)}"
        return f"Quantizer({what}{'' if self.enabled else ', off'})"


_META = [f.name for f in dataclasses.fields(Quantizer)][2:]
jax.tree_util.register_dataclass(Quantizer, ["scale", "zero_point"], _META)


def _on_new_grid(old: Quantizer, new: Quantizer) -> Quantizer:
    """The real range of a calibrated quantizer on the grid of another."""
    scale, zero_point = old.grid(None)
    kinds = [(q.symmetric, q.signed, q.narrow) for q in (old, new)]
    if kinds[0] == kinds[1]:
        scale, zero_point = regrid(
            scale, zero_point, old.ends, new.ends, symmetric=new.symmetric
        )
    else:
        least, most = (scale * (end - zero_point) for end in old.ends)
        scale, zero_point = grid_between(
            least, most, *new.ends, symmetric=new.symmetric
        )
    zero_point = None if new.symmetric else zero_point
    return dataclasses.replace(new, scale=scale, zero_point=zero_point)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse names that are no field of a quantizer, and impossible bit-widths."""
    known = [field.name for field in dataclasses.fields(Quantizer)]
    for name in fields:
        if name not in known:
            raise ValueError(
                f"jaxmet.Quantizers.set: a quantizer has no field {name!r}. "
                f"{suggestion(name, known)}"
            )
    if "bits" in fields:
        check_bits(fields["bits"], caller="Quantizers.set")
    if fields.get("calibrator", "minmax") not in CALIBRATORS:
        raise ValueError(
            f"jaxmet.Quantizers.set: calibrator is {fields['calibrator']!r}. It is one of "
            f"{', '.join(map(repr, CALIBRATORS))}."
        )
    if not is_percentile(fields.get("percentile", 100)):
        raise ValueError(
            f"jaxmet.Quantizers.set: percentile is {fields['percentile']!r}. Give a number "
            "above 50, up to 100 for smallest to largest."
        )


def granularity(q: Quantizer) -> str:
    """What has a scale of its own, in a word."""
    if q.block is not None:
        return f"block of {q.block}"
    return "tensor" if q.axis is None else "channel"


def scale_text(q: Quantizer, kind: str = "weight") -> str:
    """The scale in a few words, for tables."""
    if q.product is not None:
        return f"product of {q.product[0]} and {q.product[1]}"
    if q.bits == 32:
        return "float"
    if q.scale is None:
        return "follows the weight" if kind == "weight" else "on the fly"
    if not hasattr(q.scale, "dtype") or not is_concrete(q.scale):
        return "traced"
    least, most = np.min(q.scale), np.max(q.scale)
    return f"{least:.4g}" if least == most else f"{least:.4g} .. {most:.4g}"
