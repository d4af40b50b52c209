"""The networks of `benchmarks/dfq_tables.py`: atrous, concat, resize, several outputs.

They run with their committed weights on two scenes of random garments, so that no data
set is needed.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from dfq import boxes, networks, scenes
from dfq.stress import rescaled


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    garments = np.zeros((20, 28, 28), np.float32)
    garments[:, 4:24, 6:22] = rng.uniform(0.3, 1, (20, 20, 16))
    return scenes.Composer("test", garments, np.arange(20) % 10).scenes(range(2))


class Case:
    """One network: traced, and compiled once as it is."""

    def __init__(self, name, images):
        self.name, self.images = name, images
        self.apply = networks.NETWORKS[name]().apply
        self.params = networks.trained(name)
        self.graph = jm.trace(self.apply, self.params, images[:1])
        self.run = jax.jit(self.apply)
        self.fold = jax.jit(partial(jm.fold_batch_norm, graph=self.graph))
        self.outputs = self.run(self.params, images)


@pytest.fixture(scope="module", params=["deeplab", "ssd"])
def case(request, drawn):
    return Case(request.param, drawn.images)


def idle(node, run, operands):
    del node
    return run(*operands), None


def assert_close(found, wanted, tolerance):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for a, b in pairs:
        size = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size)


def reads(case, kind):
    """The nodes of a kind, and the nodes that each reads."""
    return {
        node.name: [edge.node for edge in node.inputs]
        for node in case.graph.nodes
        if node.kind == kind
    }


def leaves(tree, name):
    """All leaves with this name, in the order of their modules."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return [leaf for path, leaf in flat if path[-1].key == name]


def test_every_kernel_is_a_layer_under_its_own_name(case):
    paths, _ = jax.tree.flatten_with_path(case.params["params"])
    names = ["/".join(key.key for key in path) for path, _ in paths]
    kernels = [n.removesuffix("/kernel") for n in names if n.endswith("/kernel")]
    assert sorted(layer.name for layer in case.graph.layers) == sorted(kernels)
    assert not case.graph.unread


def test_atrous_convolutions_concatenations_and_resizes(case):
    rates = {
        node.name: node.convolution.kernel_dilation[0]
        for node in case.graph.layers
        if max(node.convolution.kernel_dilation) > 1
    }
    if case.name == "deeplab":
        assert rates == {
            "backbone/block7/depthwise": 2,
            "backbone/block8/depthwise": 2,
            "aspp/rate2/depthwise": 2,
            "aspp/rate4/depthwise": 4,
        }
        pyramid = ["point", "rate2/pointwise", "rate4/pointwise", "pooled"]
        assert list(reads(case, "concat").values()) == [
            [f"aspp/{name}/clip" for name in pyramid],
            ["aspp/merge/resize", "skip/clip"],
        ]
        assert list(reads(case, "resize").values()) == [
            ["aspp/merge/clip"],
            ["classifier"],
        ]
    else:
        heads = [[f"block{i}_{head}" for i in (5, 8, 9)] for head in ("box", "class")]
        assert not rates and list(reads(case, "concat").values()) == heads
        assert len(reads(case, "output")) == len(case.outputs) == 2


@pytest.mark.one_in(2)
def test_the_replay_computes_the_same(case):
    def replay(**options):
        run = jax.jit(jm.evaluate(case.apply, idle, **options))
        return run(case.params, case.images)[0]

    for a, b in zip(
        jax.tree.leaves(replay(cpu_formulations=False)),
        jax.tree.leaves(case.outputs),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert_close(replay(), case.outputs, 1e-5)


def test_folding_takes_every_norm_and_keeps_the_function(case):
    folded = case.fold(case.params)
    scales, variances = leaves(folded["params"], "scale"), leaves(folded, "var")
    assert len(scales) == sum(node.kind == "norm" for node in case.graph.nodes)
    for scale, variance in zip(scales, variances, strict=True):  # norms of gain one
        np.testing.assert_allclose(scale, np.sqrt(variance + 1e-3), rtol=1e-6)
    assert_close(case.run(folded, case.images), case.outputs, 2e-5)


def test_the_stress_copy_is_another_tree_with_the_same_function(case):
    stress = rescaled(case.params, case.graph)
    assert_close(case.run(stress, case.images), case.outputs, 5e-5)
    # Folding undoes the factors in front of norms, not those of the linear bottlenecks.
    folded = case.fold(stress)
    plain = case.fold(case.params)
    for tree, usual in ((stress, case.params), (folded, plain)):
        ratios = [
            np.max(
                np.abs(t["params"]["backbone"]["block6"]["project"]["kernel"]), axis=2
            )
            for t in (tree, usual)
        ]
        factors = ratios[0] / ratios[1]
        assert factors.max() / factors.min() > 20


def test_a_scene_says_the_same_in_labels_and_boxes(drawn):
    for labels, rows, classes in zip(*drawn[1:], strict=True):
        real = classes > 0
        assert real.any() and not rows[~real].any()
        for (x1, y1, x2, y2), kind in zip(rows.astype(int)[real], classes[real]):
            edges = (
                labels[y1, x1:x2],
                labels[y2 - 1, x1:x2],
                labels[y1:y2, x1],
                labels[y1:y2, x2 - 1],
            )
            assert all(np.any(edge == kind) for edge in edges)


def perfect(drawn):
    """The detections of a network that says what its anchors were told."""

    @jax.jit
    def detections(rows, classes):
        codes, given = jax.vmap(boxes.targets)(rows, classes)
        return boxes.detect(codes, 20 * jax.nn.one_hot(given, networks.CLASSES))

    return jax.tree.map(np.asarray, detections(drawn.boxes, drawn.classes))


def test_what_the_anchors_are_told_is_what_is_detected(drawn):
    found = perfect(drawn)
    for i, classes in enumerate(drawn.classes):
        for kind in range(1, networks.CLASSES):
            mine = drawn.boxes[i][classes == kind]
            certain = found.scores[i, kind - 1] > 0.5
            wanted = sorted(map(tuple, mine.tolist()))
            got = sorted(map(tuple, found.boxes[i, kind - 1][certain].tolist()))
            np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_a_missing_data_set_names_its_package(tmp_path):
    with pytest.raises(ValueError, match="dataset-fashion-mnist"):
        scenes.Composer.read("test", tmp_path)


def test_the_metrics_of_perfect_and_of_half_the_answers(drawn):
    pytest.importorskip("pycocotools")
    pytest.importorskip("sklearn")
    from dfq import metrics

    assert metrics.mean_iou(drawn.labels, drawn).value == 100
    found = perfect(drawn)
    assert metrics.mean_ap(*found, drawn).value == pytest.approx(100)
    # An intersection over union by hand: every pixel called background.
    blank = metrics.mean_iou(np.zeros_like(drawn.labels), drawn).value
    present = len(np.unique(drawn.labels))
    assert blank == pytest.approx(100 * np.mean(drawn.labels == 0) / present)
