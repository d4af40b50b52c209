"""The table: how each primitive runs on arrays of which only some channels are left."""

from jaxmet.engine.nodes.pointwise import POINTWISE
from jaxmet.engine.pruned.parts.elementwise import elementwise
from jaxmet.engine.pruned.parts.partial import Rule
from jaxmet.engine.pruned.parts.pieces import concatenate, pad, slices, split
from jaxmet.engine.pruned.parts.products import conv, dot
from jaxmet.engine.pruned.parts.sums import reduction, window
from jaxmet.engine.pruned.parts.views import (
    broadcast,
    reshape,
    reverse,
    squeeze,
    transpose,
)

REDUCE = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or")
WINDOW = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
RULES: dict[str, Rule] = {
    **dict.fromkeys((*POINTWISE, "add_any"), elementwise),
    **dict.fromkeys(REDUCE, reduction),
    **dict.fromkeys(WINDOW, window),
    "broadcast_in_dim": broadcast,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "rev": reverse,
    "slice": slices,
    "split": split,
    "concatenate": concatenate,
    "pad": pad,
    "dot_general": dot,
    "conv_general_dilated": conv,
}
