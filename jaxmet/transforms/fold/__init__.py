"""Batch norms folded into the products beside them, and quantizers with them.

fold             `jm.fold_batch_norm`
fold_quantizers  quantizers of the weights that take a gain
"""

from jaxmet.transforms.fold.fold import fold_batch_norm as fold_batch_norm
