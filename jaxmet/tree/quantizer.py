"""One quantizer: which grid a tensor is put on."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmet.numerics.calibrators import (
    RangeMethod,
    check_calibrator,
    is_percentile,
    range_of,
)
from jaxmet.numerics.fake_quant import fake_quant
from jaxmet.numerics.grid import check_bits, grid_ends
from jaxmet.numerics.learned_ranges import (
    gradient_times,
    grid_of_learned_range,
    lsq_factor,
    positive,
    zero_point_on,
)
from jaxmet.numerics.ranges import grid_between, regrid
from jaxmet.tree.checks import check_choices, check_flags, is_concrete
from jaxmet.tree.globs import suggestion
from jaxmet.tree.host_rounding import stated_grid

Learn = Literal["lsq", "minmax"]
LEARN = get_args(Learn)
FLAGS = ("symmetric", "signed", "narrow", "enabled")


class Grid(NamedTuple):
    """The ends of one grid and its switch as data: changes recompile nothing."""

    low: Any
    high: Any
    enabled: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantizer:
    """One grid. What states it are leaves, everything else is static.

    Neither `scale` nor `maximum`: it follows the tensor, recomputed from what is quantized,
    by `calibrator`, a name or a function as in `QuantConfig.weight_range` (a search, but for
    'minmax' and 'percentile': `Quantizers.pin` does it once), and no gradient goes through
    it. Scales are scalars, or have the rank of the
    tensor with size 1 on the axes they do not tell apart. `axis` are the axes with
    scales of their own, and on `block_axis` each scale
    serves `block` neighbours. The integers of a symmetric grid are signed or not; an
    asymmetric grid always starts at 0. With 32 bits nothing is rounded, and the scale
    remembers its range as a 16 bit grid would hold it. `product` names the weight and
    the activation whose scales multiply to that of an int32 bias, and `beside` the parameters
    that are added to it in the accumulator, with their signs: the sum is rounded. No scale
    that quantizes is below `least`: where an int32 bias would overflow.

    `learn` says what trains: 'lsq' the scale and zero point, with the gradient scaled as
    in LSQ; 'minmax' the ends of the range, which are the leaves then (a symmetric grid
    has no `minimum`); None nothing, gradients are zero. Whatever an optimizer makes of the
    leaves is a valid grid: scales count as |scale|, zero points as the nearest integer of
    the grid, and ranges include zero.

    With 16 bits and more the range is `headroom` times as wide as with fewer, and changes
    with the bits accordingly. Calibration by 'minmax' sets it to 2 for activations: 16 bits
    round so finely that what is lost is lost to values beyond those of the data.

    Args:
        scale: the step, a scalar or of the tensor's rank with size 1 where it does not change;
            default None: it follows the tensor.
        zero_point: the integer that stands for zero, of the shape of `scale`; default None: 0.
        minimum: the lower end of the range, where `learn` is 'minmax'; default None.
        maximum: the upper end, likewise; default None.
        least: no scale that quantizes is below this; default None: no such bound.
        bits: the bit-width, 2 to 16, or 32 for no rounding; default 8.
        symmetric: whether the grid is symmetric about zero, without a zero point; default True.
        signed: whether a symmetric grid has negative integers; default True.
        narrow: whether a signed grid leaves out its lowest integer, as −128 of 8 bits; default
            True.
        axis: the axes with scales of their own; default None: one scale for the tensor.
        block: how many neighbours on `block_axis` share a scale; default None.
        block_axis: the axis that is divided into blocks; default None.
        calibrator: where the range of a scale that follows comes from: a name or a function;
            default 'minmax'.
        percentile: for the calibrator 'percentile'; default 99.99.
        product: of an int32 bias: the weight and the activation whose scales multiply to its
            own; default None.
        beside: of an int32 bias: parameters that are added to it, with their signs; default
            none.
        enabled: whether it quantizes at all; default True.
        learn: what trains: 'lsq' (the default), 'minmax' or None.
        headroom: how many times as wide the range is at 16 bits and more; default 1.
        products_only: of an activation: whether only products read it on its grid, and all else
            reads it as it is; default False.
        per_token: of an activation that only products read on its grid: whether what is summed for
            each result has a range of its own, found at every call; default False.

    >>> q = jm.Quantizer(scale=0.5, bits=4)
    >>> q(jnp.array([0.3, 9.0]))
    Array([0.5, 3.5], dtype=float32)
    """

    scale: Any = None
    zero_point: Any = None
    minimum: Any = None
    maximum: Any = None
    least: Any = None
    bits: int = 8
    symmetric: bool = True
    signed: bool = True
    narrow: bool = True
    axis: tuple[int, ...] | None = None
    block: int | None = None
    block_axis: int | None = None
    calibrator: RangeMethod = "minmax"
    percentile: float | int = 99.99
    product: tuple[str, str] | None = None
    beside: tuple[tuple[str, float], ...] = ()
    enabled: bool = True
    learn: Learn | None = "lsq"
    headroom: int = 1
    products_only: bool = False
    per_token: bool = False

    @property
    def follows(self) -> bool:
        """Whether the grid is recomputed from the tensor."""
        return self.scale is None and self.maximum is None

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and highest integer."""
        bits = 16 if self.bits == 32 else self.bits
        signed = self.symmetric and self.signed
        return grid_ends(bits, signed=signed, narrow=self.narrow)

    def margin(self, ends: Any) -> Any:
        """How many times as wide the range of a grid with these ends is as it must be."""
        if self.headroom == 1:
            return 1
        low, high = ends
        if isinstance(low, int) and isinstance(
            high, int
        ):  # no program for two integers
            return float(self.headroom) if high - low > 2**15 else 1.0
        return jnp.where(jnp.asarray(high - low) > 2**15, float(self.headroom), 1.0)

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
        if self.follows:
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
            grid = grid_between(*extremes, low, high, symmetric=self.symmetric)
            return self._raised(*grid)
        scale, zero_point = self._raised(*self._stated(ends))
        if self.learn is None:
            return lax.stop_gradient(scale), lax.stop_gradient(zero_point)
        return scale, zero_point

    def _raised(
        self, scale: jax.Array, zero_point: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The grid with no scale below the least one."""
        if self.least is None:
            return scale, zero_point
        least = lax.stop_gradient(jnp.asarray(self.least, scale.dtype))
        if scale.ndim == 0:
            least = jnp.max(least)
        scale = jnp.maximum(scale, least)
        return scale, jnp.broadcast_to(zero_point, scale.shape)

    def _stated(self, ends: Grid | None) -> tuple[jax.Array, jax.Array]:
        """The grid that the leaves state, or the same real range with other ends."""
        if self.maximum is not None:
            least = None if self.minimum is None else jnp.asarray(self.minimum)
            low, high = self.ends if ends is None else (ends.low, ends.high)
            grid = grid_of_learned_range(least, jnp.asarray(self.maximum), low, high)
            return grid if ends is None else self._with_margin(grid, ends[:2])
        scale = positive(jnp.asarray(self.scale))
        zero_point = jnp.zeros_like(scale)
        if self.zero_point is not None:
            zero_point = jnp.asarray(self.zero_point, scale.dtype)
            zero_point = zero_point_on(zero_point, *self.ends)
        if ends is None:
            return scale, zero_point
        grid = regrid(scale, zero_point, self.ends, ends[:2], symmetric=self.symmetric)
        return self._with_margin(grid, ends[:2])

    def _with_margin(
        self, grid: tuple[jax.Array, jax.Array], ends: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The margin that grids with these ends have, in place of the own: zero stays."""
        if self.headroom == 1:
            return grid
        scale, zero_point = grid
        change = self.margin(ends) / self.margin(self.ends)
        return scale * jnp.asarray(change, scale.dtype), zero_point

    def holding(self, scale: Any, zero_point: Any = None) -> "Quantizer":
        """A copy whose leaves state this grid, in the form that `learn` says."""
        none = dict.fromkeys(_STATED)
        zero_point = None if self.symmetric else zero_point
        if self.learn != "minmax":
            return dataclasses.replace(
                self, **none | {"scale": scale, "zero_point": zero_point}
            )
        low, high = self.ends
        least = None if zero_point is None else scale * (low - zero_point)
        most = scale * (high - (0 if zero_point is None else zero_point))
        return dataclasses.replace(self, **none | {"minimum": least, "maximum": most})

    def __call__(self, x: Any, grid: Grid | None = None, *, examples: int = 1) -> Any:
        """`x` on the grid; with `grid` its ends and switch are those, as data.

        `examples` is how many of a batch `x` holds: LSQ counts the values of one.
        """
        if grid is None and (not self.enabled or self.bits == 32):
            return x
        x = jnp.asarray(x)
        # Known numbers are constants of the program, to which no gradient goes.
        known = stated_grid(self) if grid is None else None
        if known is not None:
            return fake_quant(x, *known, *self.ends, axis=self.axis, block=self.block)
        low, high = self.ends if grid is None else grid[:2]
        scale, zero_point = self.grid(x, grid)
        if self.learn == "lsq" and not self.follows:
            factor = lsq_factor(x.size // (examples * max(scale.size, 1)), high)
            scale, zero_point = (gradient_times(a, factor) for a in (scale, zero_point))
        quantized = fake_quant(
            x, scale, zero_point, low, high, axis=self.axis, block=self.block
        )
        return quantized if grid is None else jnp.where(grid.enabled, quantized, x)

    def set(self, **fields: Any) -> "Quantizer":
        """A copy with some fields changed; a known real range stays what it is."""
        check_fields(fields)
        given = {name: fields.pop(name) for name in _STATED if name in fields}
        given = {
            n: a if a is None else jnp.asarray(a, jnp.float32) for n, a in given.items()
        }
        if fields.get("axis") is not None:
            fields["axis"] = tuple(fields["axis"])
        none = dict.fromkeys(_STATED)
        changed = {name for name in fields if fields[name] != getattr(self, name)}
        if changed & {"axis", "block", "block_axis"} and self.least is not None:
            fields.setdefault("least", jnp.max(self.least, keepdims=True))
        new = dataclasses.replace(self, **fields | none)
        if given:  # what is stated is meant as it is, whatever the bits
            new = dataclasses.replace(new, headroom=fields.get("headroom", 1))
            return _holding(self, new, given)
        if self.follows:
            return new
        if changed & {"axis", "block", "block_axis"}:
            raise ValueError(
                "jaxmet.Quantizers.set: the scale is already a number for "
                f"{granularity(self)}, so axis and block cannot change alone. Give "
                "scale= too (None follows the weight again), or calibrate again."
            )
        if not changed & {"bits", "symmetric", "signed", "narrow", "learn"}:
            return dataclasses.replace(self, **fields)
        return _on_new_grid(self, new)

    def __repr__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        what = f"{self.bits} bits, {kind}, {granularity(self)}, {scale_text(self)}"
        return f"Quantizer({what}{'' if self.enabled else ', off'})"


_STATED = ["scale", "zero_point", "minimum", "maximum"]
QUANTIZER_LEAVES = [*_STATED, "least"]
_META = [
    f.name for f in dataclasses.fields(Quantizer) if f.name not in QUANTIZER_LEAVES
]
jax.tree_util.register_dataclass(Quantizer, QUANTIZER_LEAVES, _META)


def _holding(old: Quantizer, new: Quantizer, given: Mapping[str, Any]) -> Quantizer:
    """`new` with the leaves that were given, in its own form."""
    if given.get("maximum") is not None:
        most = given["maximum"]
        least = given.get("minimum")
        least = -most if least is None else least
        grid = grid_between(least, most, *new.ends, symmetric=new.symmetric)
        return new.holding(*grid)
    if given.get("scale") is not None:
        zero_point = given.get("zero_point")
        if zero_point is None and not new.symmetric:
            zero_point = jnp.zeros_like(given["scale"])
            if not (old.follows or old.symmetric):
                zero_point = old.grid(None)[1]
        return new.holding(given["scale"], zero_point)
    if given.get("zero_point") is not None and not old.follows:
        return new.holding(old.grid(None)[0], given["zero_point"])
    return new  # every leaf is None: it follows the tensor


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
    return new.holding(*old._with_margin((scale, zero_point), new.ends))


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
    check_flags("Quantizers.set", **{n: fields[n] for n in FLAGS if n in fields})
    if fields.get("learn") is not None:
        check_choices("Quantizers.set", learn=(fields["learn"], LEARN))
    if "calibrator" in fields:
        check_calibrator(fields["calibrator"], "Quantizers.set", "calibrator")
    if not is_percentile(fields.get("percentile", 100)):
        raise ValueError(
            f"jaxmet.Quantizers.set: percentile is {fields['percentile']!r}. Give a number "
            "above 50, up to 100 for smallest to largest."
        )


def granularity(q: Quantizer) -> str:
    """What has a scale of its own, in a word."""
    if q.block is not None:
        return f"block of {q.block}"
    if q.per_token:
        return "token"
    return "tensor" if q.axis is None else "channel"


def scale_text(q: Quantizer, kind: str = "weight") -> str:
    """The scale in a few words, for tables."""
    if q.product is not None:
        return f"product of {q.product[0]} and {q.product[1]}"
    if q.bits == 32:
        return "float"
    if q.follows:
        return "follows the weight" if kind == "weight" else "on the fly"
    stated = q.scale if q.maximum is None else q.maximum
    if not hasattr(stated, "dtype") or not is_concrete(stated):
        return "traced"
    if q.maximum is not None or q.least is not None:
        stated = q.grid(None)[0]
    scale = stated
    least, most = np.min(scale), np.max(scale)
    return f"{least:.4g}" if least == most else f"{least:.4g} .. {most:.4g}"
