"""One table of transforms against one set of laws; what does not hold is excused by name."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm
import zoo
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.named_leaves import flatten, named_leaves

MODELS = ("conv_bn_relu", "inverted_residual", "residual", "grouped", "concatenation")
FRONTENDS = ("linen", "nnx")


@dataclass(frozen=True, eq=False)
class Transform:
    """A function of `(params, graph, batches)`, and the laws that it need not keep."""

    name: str
    run: Callable[..., Any]
    excused: dict[str, str] = field(default_factory=dict)
    acts_on: tuple[str, ...] = MODELS


def folded(params, graph, batches):
    del batches
    return jm.fold_batch_norm(params, graph)


def equalized(params, graph, batches, **options):
    del batches
    return jm.equalize(params, graph, progress=False, **options)


def coarse(graph):
    # What rounds is fixed beforehand, so that the transform is a function of params.
    weights = {
        layer.weight.name: jm.Quantizer(bits=4, axis=layer.weight.out_axes)
        for layer in graph.layers
    }
    return jm.Quantizers(weights)


def absorbed(params, graph, batches):
    del batches
    return jm.absorb_bias(params, graph, n_sigma=0.0)


def smoothed(params, graph, batches, **options):
    return jm.smooth(params, graph, batches, progress=False, **options)


def turned(params, graph, batches):
    del batches
    return jm.rotate(params, graph)


def reestimated(params, graph, batches):
    return jm.reestimate_batch_norm(params, graph, batches, progress=False)


def rounded(params, graph, batches):
    del batches
    return jm.round_weights(params, coarse(graph))


def in_integers(params, graph, batches):
    del batches
    return jm.quantize(params, graph, coarse(graph))


def corrected(params, graph, batches):
    return jm.correct_bias(params, graph, coarse(graph), batches, progress=False)


def corrected_without_data(params, graph, batches):
    return corrected(params, graph, None)


def adapted(params, graph, batches):
    return jm.adaround(
        params, graph, coarse(graph), batches, key=jax.random.key(0), progress=False
    )[0]


def factorized(params, graph, batches):
    del batches
    return jm.factorize(params, graph, ratios=0.7, method="weight")


def pruned(params, graph, batches):
    return jm.prune(params, graph, 0.6, batches=batches, progress=False)


ROUNDS = {"function": "rounding to 4 bits changes the function: that is what it shows"}
SHIFTS = {"function": "the float model is shifted, so that the rounded one is not"}
LEAVES = {"plain tree": "exact clips make leaves that hold bounds"}
SMALLER = {
    "function": "less is computed: that is what it is for",
    "plain tree": "what is left of a leaf is no array of its shape",
    "tree kept": "a leaf's parts are leaves",
}
TRANSFORMS = (
    Transform(
        "fold_batch_norm",
        folded,
        acts_on=("conv_bn_relu", "inverted_residual", "residual"),
    ),
    Transform(
        "equalize range", functools.partial(equalized, objective="range"), LEAVES
    ),
    Transform(
        "equalize skip",
        functools.partial(equalized, objective="range", clip="skip"),
        acts_on=("conv_bn_relu", "residual", "grouped", "concatenation"),
    ),
    Transform("smooth", smoothed, acts_on=("transformer",)),
    Transform(
        "smooth, input scales",
        functools.partial(smoothed, input_scales=True, alpha="noise"),
        {
            "plain tree": "weights state what their inputs are divided by",
        },
        acts_on=("transformer",),
    ),
    Transform(
        "rotate",
        turned,
        {
            "plain tree": "weights state that their inputs are rotated",
        },
        acts_on=("transformer",),
    ),
    Transform("round_weights", rounded, ROUNDS),
    Transform(
        "quantize",
        in_integers,
        ROUNDS
        | {
            "plain tree": "integers are no floats",
            "eager equals jit": "it is for files: under jit it raises",
        },
    ),
    Transform(
        "absorb_bias",
        absorbed,
        {
            "function": "it is kept above a value that half of a normal one is below here",
            "plain tree": "padding that holds a constant makes leaves that say so",
        },
        acts_on=("conv_bn_relu", "inverted_residual"),
    ),
    Transform(
        "reestimate_batch_norm",
        reestimated,
        {"function": "other statistics are another function"},
        acts_on=("conv_bn_relu", "residual"),
    ),
    Transform(
        "adaround",
        adapted,
        ROUNDS
        | {
            "eager equals jit": "it looks at layers one after the other and compiles "
            "a program for each: it refuses traced trees"
        },
        acts_on=("conv_bn_relu", "inverted_residual"),
    ),
    Transform(
        "factorize",
        factorized,
        SMALLER | {"names kept": "two factors are two layers"},
        acts_on=("inverted_residual", "residual", "concatenation"),
    ),
    Transform(
        "prune",
        pruned,
        SMALLER | {"eager equals jit": "which channels stay decides about shapes"},
        acts_on=("inverted_residual", "residual", "concatenation"),
    ),
    Transform(
        "correct_bias", corrected, SHIFTS, acts_on=("conv_bn_relu", "inverted_residual")
    ),
    Transform(
        "correct_bias without data",
        corrected_without_data,
        SHIFTS,
        acts_on=("conv_bn_relu",),
    ),
)
LAWS: dict[str, Callable[..., None]] = {}


def law(check: Callable[..., None]) -> Callable[..., None]:
    LAWS[check.__name__.replace("_", " ")] = check
    return check


def subject(model: str, frontend: str):
    return *zoo.redrawn(model, frontend, 3), zoo.traced(model, frontend)


@functools.cache
def observed(transform: Transform, model: str, frontend: str):
    """What a transform returns, and its input as it was before and is after."""
    _, params, inputs, graph = subject(model, frontend)
    before = [a.copy() for a in arrays(params)]
    return transform.run(params, graph, [inputs]), before, arrays(params)


def result(transform: Transform, model: str, frontend: str):
    return observed(transform, model, frontend)[0]


def arrays(params: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def close(one: Any, two: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(np.abs(b).max(initial=0.0), 1e-12)
        assert np.abs(a - b).max(initial=0.0) <= tolerance * scale


@law
def does_something(transform, model, frontend):
    _, params, _, _ = subject(model, frontend)
    before, after = (
        named_leaves(params),
        named_leaves(result(transform, model, frontend)),
    )
    changed = [
        name
        for name, leaf in after.items()
        if name not in before
        or is_compressed(leaf)
        or not np.array_equal(leaf, before[name])
    ]
    assert changed


@law
def tree_kept(transform, model, frontend):
    _, params, _, _ = subject(model, frontend)
    after = result(transform, model, frontend)
    assert flatten(after)[2] == flatten(params)[2]
    for a, b in zip(flatten(after)[1], flatten(params)[1], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@law
def plain_tree(transform, model, frontend):
    after = result(transform, model, frontend)
    assert not any(is_compressed(leaf) for leaf in flatten(after, whole=True)[1])


@law
def input_untouched(transform, model, frontend):
    _, before, after = observed(transform, model, frontend)
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)


@law
def eager_equals_jit(transform, model, frontend):
    _, params, inputs, graph = subject(model, frontend)
    compiled = jax.jit(lambda p: transform.run(p, graph, [inputs]))(params)
    close(compiled, result(transform, model, frontend), 1e-5)


@law
def same_bits_again(transform, model, frontend):
    _, params, inputs, graph = subject(model, frontend)
    again = transform.run(params, graph, [inputs])
    for a, b in zip(
        arrays(again), arrays(result(transform, model, frontend)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@law
def linen_equals_nnx(transform, model, frontend):
    other = named_leaves(result(transform, model, "nnx"))
    mine = named_leaves(result(transform, model, "linen"))
    assert set(mine) == set(other)
    for name, leaf in mine.items():
        close(leaf, other[name], 1e-5)


@law
def function(transform, model, frontend):
    apply, params, inputs, _ = subject(model, frontend)
    after = jax.jit(jm.lift(apply))(result(transform, model, frontend), *inputs)
    close(after, jax.jit(apply)(params, *inputs), 2e-5)


@law
def names_kept(transform, model, frontend):
    apply, _, inputs, graph = subject(model, frontend)
    again = jm.trace(apply, result(transform, model, frontend), *inputs)
    assert [n.name for n in again.nodes] == [n.name for n in graph.nodes]
    # The one thing that a leaf may say of how its layer reads it.
    weights = [dataclasses.replace(n.weight, rotated=False) for n in again.layers]
    assert weights == [n.weight for n in graph.layers]


@law
def wrong_tree_raises(transform, model, frontend):
    _, params, inputs, graph = subject(model, frontend)
    with pytest.raises(ValueError, match=r"jaxmet\.\w+: .*no parameter"):
        transform.run({"params": {"other": jnp.ones(3)}}, graph, [inputs])


# Networks of each transform in both front-ends; the others run with the slow tests, in linen:
# that nnx gives the same is a law of its own.
EVERY_DAY = 1

CELLS = [
    pytest.param(
        *(t, m, f, name),
        id=f"{t.name}-{m}-{f}-{name}".replace(" ", "_"),
        marks=[pytest.mark.slow] * (i >= EVERY_DAY),
    )
    for t in TRANSFORMS
    for i, m in enumerate(t.acts_on)
    for f in FRONTENDS
    for name in LAWS
    if name not in t.excused
    if f == "linen" or (i < EVERY_DAY and name != "linen equals nnx")
]


@pytest.mark.parametrize(("transform", "model", "frontend", "name"), CELLS)
def test_law(transform, model, frontend, name):
    LAWS[name](transform, model, frontend)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.name)
def test_excuses_are_of_laws_and_are_needed(transform):
    assert set(transform.excused) <= set(LAWS)
    for name in transform.excused:
        with pytest.raises((AssertionError, ValueError)):
            for model in transform.acts_on:
                LAWS[name](transform, model, "linen")


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("model", MODELS)
def test_32_bits_are_the_identity(model, frontend):
    apply, params, inputs, graph = subject(model, frontend)
    config = jm.QuantConfig(weight_bits=32, activation_bits=32)
    quantizers = jm.calibrate(params, graph, [inputs], config, progress=False)
    simulated = jax.jit(jm.simulate(apply, quantizers))(params, *inputs)
    close(simulated, jax.jit(apply)(params, *inputs), 1e-6)
    assert not quantizers.weights and not quantizers.activations


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_unknown_names_raise(frontend):
    _, _, _, graph = subject("residual", frontend)
    for act in (graph.only, graph.without, graph.__getitem__):
        with pytest.raises(ValueError, match="'bloc'"):
            act("bloc")
