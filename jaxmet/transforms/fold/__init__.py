"""Batch norms folded into the products beside them, and quantizers with them."""

from jaxmet.transforms.fold.fold import fold_batch_norm as fold_batch_norm
