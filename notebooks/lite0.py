"""EfficientNet-Lite0 in place of the packaged network: `%run -i lite0.py` in notebook 2.

Defines `model` and `variables`, `images` of the folder `pictures`, and as `labels` what the
float network says of them. It is for a checkout, where `benchmarks/` is beside `notebooks/`.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.append("../benchmarks")
from lite.network import FAMILY, LinenLite
from lite.pictures import read_folder
from lite.weights import find_weights, load_weights

variant = FAMILY["lite0"]
model, variables = LinenLite(variant), load_weights(find_weights("lite0"))
folder = Path(pictures) / "evaluation"  # noqa: F821
images = jnp.asarray(read_folder(folder, variant.pixels)[:200])
_run = jax.jit(model.apply)
labels = jnp.concatenate([_run(variables, x).argmax(-1) for x in jnp.split(images, 2)])
