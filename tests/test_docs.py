"""What the README and the guide print runs as printed, and names every public name."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


class Small(nn.Module):
    """A network with everything that the examples name."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=True, name="stem_bn")(x))
        x = nn.Conv(8, (3, 3), name="expand")(x)
        return nn.Dense(4, name="head")(jnp.mean(nn.relu(x), (1, 2)))


class SmallTwin(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.mean(nnx.relu(self.stem(x)), (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_examples_run_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    model = Small()
    params = model.init(jax.random.key(1), images)
    expected = model.apply(params, images)
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    scope = {"model": model, "params": params, "images": images}
    scope["nnx_model"] = SmallTwin(nnx.Rngs(0))
    for block in blocks:
        if "nnx_model" in block:
            nested = dict(scope)
            exec(block, nested)
            assert nested["merge"](nested["params"])(images).shape == (16, 4)
        else:
            exec(block, scope)
    error = jnp.mean(jnp.square(scope["logits"] - expected))
    assert 0 < error < 0.05 * jnp.mean(jnp.square(expected)) or page == "docs/guide.md"


class Trained(nn.Module):
    """What the page on training trains."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu6(nn.BatchNorm(not train, name="stem_bn")(x))
        return nn.Dense(4, name="head")(jnp.mean(x, (1, 2)))


class TrainedTwin(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu6(self.stem_bn(self.stem(x)))
        return self.head(jnp.mean(x, (1, 2)))


@pytest.mark.slow
def test_training_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    model, twin = Trained(), TrainedTwin(nnx.Rngs(0))
    variables = model.init(jax.random.key(1), images)
    scope = {"model": model, "variables": variables, "images": images}
    scope |= {"nnx_model": twin, "labels": jnp.arange(16) % 4}
    mean = jnp.copy(twin.stem_bn.mean[...])
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    with jax.numpy_dtype_promotion("standard"):
        for block in BLOCK.findall(text):
            exec(block, scope)
    before, after = variables["params"], scope["params"]
    assert jnp.any(before["stem"]["kernel"] != after["stem"]["kernel"])
    assert jnp.any(twin.stem_bn.mean[...] != mean) and jnp.isfinite(scope["value"])
    restored = jax.tree.leaves(scope["saved"].params["state"])
    assert len(restored) == len(jax.tree.leaves(scope["state"]))


@pytest.mark.slow
def test_compression_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    model = Small()
    scope = {"model": model, "images": images, "labels": jnp.arange(16) % 4}
    scope["params"] = model.init(jax.random.key(1), images)
    text = (ROOT / "docs/compression.md").read_text(encoding="utf-8")
    with jax.numpy_dtype_promotion("standard"):
        for block in BLOCK.findall(text):
            exec(block, scope)
    macs = [scope[name]["macs"][-1] for name in ("before", "after")]
    assert macs[1] < 0.7 * macs[0] and scope["logits"].shape == (16, 4)
    assert (tmp_path / "tiny.npz").exists()


def test_every_public_name_is_in_the_docs():
    pages = ("README.md", "docs/guide.md", "docs/training.md", "docs/compression.md")
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    source = (ROOT / "jaxmet/__init__.py").read_text(encoding="utf-8")
    public = re.findall(r"^from .* import \w+ as (\w+)$", source, re.MULTILINE)
    assert len(public) > 20
    missing = [n for n in public if not re.search(rf"\bjm\.{n}\b", text)]
    assert not missing
