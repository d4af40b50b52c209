"""The pieces of benchmarks/efficientnet_lite.py: network, weights file, pictures, intervals."""

import collections
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image

import jaxmet as jm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from lite import network, torch_file, weights
from lite.figures import Resampled, interval, outcome
from lite.pictures import read_folder, read_labelled, read_picture

TINY = network.Variant(0.25, 0.5, 32)


# Network


PUBLISHED = {"lite0": 4.7, "lite1": 5.4, "lite2": 6.1, "lite3": 8.2, "lite4": 13.0}
"""Millions of parameters, as the authors' page of the family states them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_family_has_the_published_sizes(name: str) -> None:
    variant = network.FAMILY[name]
    x = jax.ShapeDtypeStruct((1, variant.pixels, variant.pixels, 3), jnp.float32)
    init = network.LinenLite(variant).init
    shapes = jax.eval_shape(init, jax.random.key(0), x)["params"]
    number = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert abs(number / 1e6 - PUBLISHED[name]) < 0.06


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any, jax.Array]:
    model = network.LinenLite(TINY)
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(  # variances too, so nothing below zero
        lambda a: jnp.asarray(rng.uniform(0.01, 0.1, a.shape), a.dtype), shapes
    )
    return model, variables, x


@pytest.mark.slow
def test_linen_and_nnx_are_twins(tiny: Any) -> None:
    model, variables, x = tiny
    module = network.nnx_of(TINY, variables)
    np.testing.assert_allclose(
        jax.jit(module)(x), jax.jit(model.apply)(variables, x), rtol=1e-5, atol=1e-6
    )
    apply, params, _ = jm.functional(module)
    one, two = jm.trace(model.apply, variables, x), jm.trace(apply, params, x)
    assert {n.name for n in one.nodes} == {n.name for n in two.nodes}
    assert len(one.layers) == len(two.layers) == 3 * len(network.blocks(TINY)) + 2


# The weights file


def torch_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """The legacy format, opcode by opcode for what a pickler here cannot name."""
    kinds = {"float32": "FloatStorage", "int64": "LongStorage"}
    out = io.BytesIO()
    for head in (torch_file.MAGIC, 1001, {"little_endian": True}):
        pickle.dump(head, out, protocol=2)
    body = b"\x80\x02ccollections\nOrderedDict\n)R("
    for key, (name, array) in enumerate(tensors.items()):
        body += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        body += text("storage") + f"ctorch\n{kinds[str(array.dtype)]}\n".encode()
        body += text(str(key)) + text("cpu") + integer(array.size) + b"NtQ"
        strides = [s // array.itemsize for s in array.strides]
        body += integer(0) + numbers(array.shape) + numbers(strides)
        body += b"\x89ccollections\nOrderedDict\n)RtR"
    out.write(body + b"u.")
    pickle.dump([str(k) for k in range(len(tensors))], out, protocol=2)
    for array in tensors.values():
        out.write(array.size.to_bytes(8, "little") + array.tobytes())
    return out.getvalue()


def text(s: str) -> bytes:
    return b"X" + len(s).to_bytes(4, "little") + s.encode()


def integer(n: int) -> bytes:
    return b"J" + n.to_bytes(4, "little")


def numbers(values: Any) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensors_of(variables: Any) -> dict[str, np.ndarray]:
    """What the released file holds, under its names."""
    flat = collections.OrderedDict()

    def conv(place: dict, norm: dict, stats: dict, conv_name: str, norm_name: str):
        flat[f"{conv_name}.weight"] = np.ascontiguousarray(
            np.asarray(place["kernel"]).transpose(3, 2, 0, 1)
        )
        flat[f"{norm_name}.weight"] = np.asarray(norm["scale"])
        flat[f"{norm_name}.bias"] = np.asarray(norm["bias"])
        flat[f"{norm_name}.running_mean"] = np.asarray(stats["mean"])
        flat[f"{norm_name}.running_var"] = np.asarray(stats["var"])
        flat[f"{norm_name}.num_batches_tracked"] = np.zeros((1,), np.int64)

    p, s = variables["params"], variables["batch_stats"]
    conv(p["stem"], p["stem_bn"], s["stem_bn"], "_conv_stem", "_bn0")
    for i, block in enumerate(network.blocks(TINY)):
        names = ["expand"] * (block.expansion != 1) + ["depthwise", "project"]
        for name, number in zip(names, range(3 - len(names), 3), strict=True):
            q, t, here = p[f"block{i}"], s[f"block{i}"], f"_blocks.{i}"
            conv(
                q[name],
                q[f"{name}_bn"],
                t[f"{name}_bn"],
                f"{here}._{name}_conv",
                f"{here}._bn{number}",
            )
    conv(p["head"], p["head_bn"], s["head_bn"], "_conv_head", "_bn1")
    flat["_fc.weight"] = np.ascontiguousarray(np.asarray(p["classifier"]["kernel"]).T)
    flat["_fc.bias"] = np.asarray(p["classifier"]["bias"])
    return flat


@pytest.fixture(scope="module")
def content(tiny: Any) -> bytes:
    return torch_bytes(tensors_of(tiny[1]))


@pytest.mark.slow
def test_weights_come_back(tiny: Any, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    found = weights.load_weights(path, TINY)
    jax.tree.map(np.testing.assert_array_equal, found, dict(tiny[1]))


def test_damaged_weights_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(FileNotFoundError, match=r"w\.pth: there is no such"):
        weights.load_weights(path)
    for broken in (b"", b"hello", content[:-7], content[:900], content + b"\0"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"w\.pth: .*torch's legacy format"):
            weights.load_weights(path, TINY)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth: it has no tensor|--variant"):
        weights.load_weights(path, network.FAMILY["lite0"])


def test_nothing_in_a_file_is_executed(content: bytes, tmp_path: Path) -> None:
    path, witness = tmp_path / "w.pth", tmp_path / "witness"
    call = b"cos\nsystem\n(" + text(f"touch {witness}") + b"tR"
    path.write_bytes(content.replace(b"ccollections\nOrderedDict\n)R(", call + b"(", 1))
    with pytest.raises(ValueError, match=r"it names (os|posix)\.system"):
        weights.load_weights(path, TINY)
    assert not witness.exists()


# Pictures


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a_7.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "b_8.png")
    alpha = np.dstack([rgb, np.zeros((40, 60), np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "c_9.png")
    deep = rgb[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "d_10.png")
    images, labels = read_labelled(tmp_path, 40)
    assert images.shape == (4, 40, 40, 3) and labels.tolist() == [7, 8, 9, 10]
    # The middle square, at its own size: no resampling, (x - 127)/128.
    middle = (rgb[:, 10:50].astype(np.float32) - 127) / 128
    np.testing.assert_allclose(images[0], middle, atol=1e-6)
    np.testing.assert_allclose(images[1], middle[..., :1].repeat(3, 2), atol=1e-6)
    np.testing.assert_allclose(images[2], 1.0)  # nothing but the white after it
    np.testing.assert_allclose(images[3], images[1], atol=1.01 / 128)
    assert read_folder(tmp_path, 8).shape == (4, 8, 8, 3)


def test_bad_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        read_folder(tmp_path / "nowhere", 8)
    (tmp_path / "note.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        read_folder(tmp_path, 8)
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"x\.jpg: it cannot be read"):
        read_folder(tmp_path, 8)
    whole = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(whole, "JPEG")
    (tmp_path / "x.jpg").write_bytes(whole.getvalue()[:-200])
    with pytest.raises(ValueError, match=r"x\.jpg: it cannot be read.*(?i:truncated)"):
        read_picture(tmp_path / "x.jpg", 8)
    (tmp_path / "x.jpg").write_bytes(whole.getvalue())
    with pytest.raises(ValueError, match=r"x\.jpg: its name does not end"):
        read_labelled(tmp_path, 8)


# Figures


def test_intervals_cover_what_they_should() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(400, 10))
    logits = reference + 0.3 * rng.normal(size=reference.shape)
    row = outcome(logits, reference)
    resampled = Resampled(400)
    agreement = interval(resampled.agreement(row))
    assert agreement.value == 100 * np.mean(logits.argmax(1) == reference.argmax(1))
    exact = scipy.stats.binomtest(int(row.agrees.sum()), 400).proportion_ci()
    assert abs(agreement.low - 100 * exact.low) < 0.8
    assert abs(agreement.high - 100 * exact.high) < 0.8
    sqnr = interval(resampled.sqnr(row))
    error = np.sum((logits - reference) ** 2)
    assert abs(sqnr.value - 10 * np.log10(np.sum(reference**2) / error)) < 1e-9
    assert sqnr.low < sqnr.value < sqnr.high and sqnr.high - sqnr.low < 1
    # Paired: a row that errs on the same images differs by nothing, whatever its spread.
    twice = outcome(reference + 1.01 * (logits - reference), reference)
    difference = interval(resampled.sqnr(twice) - resampled.sqnr(row))
    assert difference.high - difference.low < 1e-9
    assert abs(difference.value + 20 * np.log10(1.01)) < 1e-9
