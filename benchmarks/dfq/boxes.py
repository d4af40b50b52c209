"""What a detector needs around its network: anchors, matching, decoding, suppression.

Liu et al., [SSD: Single Shot MultiBox Detector](https://arxiv.org/abs/1512.02325),
ECCV 2016. Boxes are x1, y1, x2, y2 in pixels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfq.networks import ANCHORS
from dfq.scenes import SIZE

MAPS = ((12, (16, 22)), (6, (28, 36)), (3, (40, 50)))  # cells a side, sizes in pixels
RATIOS = (0.5, 1.0, 2.0)  # width over height
SPREADS = (0.1, 0.2)  # of centres and of log sizes: codes then are of order one
POSITIVE = 0.5  # overlap from which an anchor answers for a box
BEST, KEPT = 24, 10  # a class: candidates before suppression, detections after it
OVERLAP = 0.45  # a candidate that overlaps a better one by more is suppressed


class Detections(NamedTuple):
    """`KEPT` boxes a class with scores, 0 where there are fewer; classes from 1 on."""

    boxes: jax.Array  # (batch, classes, KEPT, 4)
    scores: jax.Array  # (batch, classes, KEPT)


def anchors() -> np.ndarray[Any, Any]:
    """Centres and sizes of all anchors, in the order of the network's outputs."""
    rows = []
    for cells, sizes in MAPS:
        shapes = [(size * r**0.5, size / r**0.5) for size in sizes for r in RATIOS]
        assert len(shapes) == ANCHORS
        middle = (np.arange(cells) + 0.5) * SIZE / cells
        for y in middle:
            for x in middle:
                rows += [(x, y, *shape) for shape in shapes]
    return np.array(rows, np.float32)


def corners(centred: jax.Array) -> jax.Array:
    """Centre and size to corners."""
    middle, half = centred[..., :2], centred[..., 2:] / 2
    return jnp.concatenate([middle - half, middle + half], -1)


def overlaps(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of each of `(n, 4)` with each of `(m, 4)`."""
    low = jnp.maximum(a[:, None, :2], b[None, :, :2])
    high = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = jnp.prod(jnp.maximum(high - low, 0.0), axis=-1)
    of_a = jnp.prod(a[:, 2:] - a[:, :2], axis=-1)
    of_b = jnp.prod(b[:, 2:] - b[:, :2], axis=-1)
    return shared / jnp.maximum(of_a[:, None] + of_b[None] - shared, 1e-6)


def targets(boxes: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the anchors of one scene should say: codes and classes, 0 the background.

    An anchor answers for the box that it overlaps most if by at least `POSITIVE`, and
    the best anchor of each box answers for that in any case.
    """
    known = jnp.asarray(anchors())
    real = classes[None] > 0
    found = jnp.where(real, overlaps(corners(known), boxes), 0.0)
    best = jnp.argmax(found, axis=0)  # of each box
    mine = jnp.arange(len(known))[:, None] == best[None]
    found = jnp.where(mine & real, 2.0, found)
    owner = jnp.argmax(found, axis=1)  # of each anchor
    kinds = jnp.where(jnp.max(found, axis=1) >= POSITIVE, classes[owner], 0)
    box = boxes[owner]
    middle, size = (
        (box[:, :2] + box[:, 2:]) / 2,
        jnp.maximum(box[:, 2:] - box[:, :2], 1),
    )
    shift = (middle - known[:, :2]) / known[:, 2:] / SPREADS[0]
    growth = jnp.log(size / known[:, 2:]) / SPREADS[1]
    return jnp.concatenate([shift, growth], -1), kinds


def decode(codes: jax.Array) -> jax.Array:
    """Boxes of the anchors from their codes, `(batch, anchors, 4)` both."""
    known = jnp.asarray(anchors())[None]
    middle = known[..., :2] + codes[..., :2] * SPREADS[0] * known[..., 2:]
    size = known[..., 2:] * jnp.exp(jnp.clip(codes[..., 2:] * SPREADS[1], -3, 3))
    return jnp.clip(corners(jnp.concatenate([middle, size], -1)), 0, SIZE)


def detect(codes: jax.Array, logits: jax.Array) -> Detections:
    """The detections in a batch of network outputs, best first."""
    scores = jax.nn.softmax(logits)[..., 1:]  # (batch, anchors, classes)
    of_classes = jax.vmap(suppress, in_axes=(None, 1))
    return Detections(*jax.vmap(of_classes)(decode(codes), scores))


def suppress(boxes: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best boxes of one class in one scene that do not overlap better ones."""
    scores, chosen = lax.top_k(scores, BEST)
    boxes = boxes[chosen]
    close = overlaps(boxes, boxes) > OVERLAP
    later = jnp.arange(BEST)

    def visit(i: int, kept: jax.Array) -> jax.Array:
        return kept & ~(kept[i] & close[i] & (later > i))

    kept = lax.fori_loop(0, BEST, visit, jnp.ones(BEST, bool))
    scores, chosen = lax.top_k(jnp.where(kept, scores, 0.0), KEPT)
    return boxes[chosen], scores
