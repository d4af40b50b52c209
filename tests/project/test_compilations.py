"""What a second call compiles: nothing, for another tree of the same structure and shapes."""

from functools import partial

import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

COMPILED = "/jax/core/compile/backend_compile_duration"
SIZES = (6, 6, 4)  # two layers of one shape


def apply(params, x, *, scale=1.0):
    for i in range(len(SIZES)):
        x = x @ params[str(i)]["kernel"] + params[str(i)]["bias"][None]
        x = jax.nn.relu(x) * jnp.asarray(scale, x.dtype)
    return x


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *n: jax.device_put(np.float32(rng.normal(size=n)))
    sizes = zip((5, *SIZES), SIZES, strict=False)
    return {
        str(i): {"kernel": draw(*n), "bias": draw(n[1])} for i, n in enumerate(sizes)
    }


@pytest.fixture
def programs():
    """The programs that were compiled since the list was cleared."""
    found = []

    def listen(event, duration, **more):
        del duration
        if event == COMPILED:
            found.append(more)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.clear_event_listeners()


def score(apply, params):
    return -jnp.mean(jnp.square(apply(params, jnp.ones((4, 5)))))


def score_on_host(apply, params):
    return float(np.mean(np.asarray(apply(params, np.ones((4, 5), np.float32)))))


quiet = {"progress": False}
STEPS = {
    "calibrate": lambda p, g, q, b: jm.calibrate(p, g, b, **quiet),
    "calibrate, mse": lambda p, g, q, b: jm.calibrate(
        p, g, b, jm.QuantConfig(activation_range="mse"), **quiet
    ),
    "calibrate, list": lambda p, g, q, b: jm.calibrate(p, g, list(b), **quiet),
    "calibrate, keyword": lambda p, g, q, b: jm.calibrate(p, g, b, scale=2.0, **quiet),
    "noise": lambda p, g, q, b: jm.noise(p, g, q, b, **quiet),
    "compare": lambda p, g, q, b: jm.compare(p, g, q, next(iter(b))),
    "sensitivity": lambda p, g, q, b: jm.sensitivity(p, g, q, score, **quiet),
    "sensitivity, many": lambda p, g, q, b: jm.sensitivity(
        p, g, q, score, together=3, **quiet
    ),
    "sensitivity, host": lambda p, g, q, b: jm.sensitivity(
        p, g, q, score_on_host, **quiet
    ),
    "equalize": lambda p, g, q, b: jm.equalize(p, g, batches=b, **quiet),
    "smooth": lambda p, g, q, b: jm.smooth(p, g, b, **quiet),
    "rotate": lambda p, g, q, b: jm.rotate(p, g),
    "factorize": lambda p, g, q, b: jm.factorize(p, g, ratios=0.5, batches=b, **quiet),
    "prune": lambda p, g, q, b: jm.prune(p, g, 0.5, batches=b, **quiet),
    "score_ratios": lambda p, g, q, b: jm.score_ratios(
        p, g, score, batches=b, method="prune", ratios=(0.5,), **quiet
    ),
    "score_ratios, many": lambda p, g, q, b: jm.score_ratios(
        p, g, score, batches=b, method="weight", ratios=(0.5,), together=2, **quiet
    ),
    "ptq": lambda p, g, q, b: jm.ptq(g.apply, p, b, **quiet),
    "round_weights": lambda p, g, q, b: jm.round_weights(p, q),
    "grids": lambda p, g, q, b: jm.grids(q, weight_bits=4),
    "pin": lambda p, g, q, b: q.pin(p),
    "cost": lambda p, g, q, b: jm.cost(p, g, np.ones((1, 5), np.float32)),
    "plan": lambda p, g, q, b: jm.plan(p, g),
}
LIMITS = {
    "grids": 0,
    "round_weights": 0,
    "pin": 0,
    "cost": 0,
    "plan": 0,
    "calibrate": 2,
    "ptq": 40,  # it is five steps, and scales of int32 biases are seven small programs
}


@pytest.fixture(scope="module")
def calibrated():
    """One graph, two trees with their quantizers, and the data of both."""
    images = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    batches, trees = jm.batched(images, batch_size=4), (tree(0), tree(1))
    graph = jm.trace(partial(apply), trees[0], images[:1])
    both = [(p, graph, jm.calibrate(p, graph, batches, **quiet)) for p in trees]
    jax.random.key(0)
    return *both, batches


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "ptq" else n for n in STEPS],
)
def test_a_second_call_compiles_nothing(name, calibrated, programs) -> None:
    one, two, batches = calibrated
    STEPS[name](*one, batches)
    assert len(programs) <= LIMITS.get(name, 30)
    programs.clear()
    STEPS[name](*two, batches)
    assert len(programs) == 0


def test_a_second_trace_of_a_model_finds_its_programs(programs) -> None:
    model = partial(apply)
    images = np.ones((4, 5), np.float32)
    for seed in range(2):
        programs.clear()
        graph = jm.trace(model, tree(seed), images[:1], scale=2.0)
        jm.calibrate(tree(seed), graph, [images], **quiet)
    assert len(programs) == 0


def test_other_statics_are_other_programs() -> None:
    model, images = partial(apply), np.ones((4, 5), np.float32)
    graph = jm.trace(model, tree(0), images[:1])
    ends = []
    for scale in (1.0, 2.0, 1.0):
        found = jm.calibrate(tree(0), graph, [images], scale=scale, **quiet)
        ends.append(float(found.activations[graph.nodes[-2].name].scale))
    assert ends[0] == ends[2] != ends[1]


def test_a_score_whose_data_changed_is_scored_anew() -> None:
    """The same function object, and other numbers in what it reads."""
    model, images = partial(apply), np.ones((4, 5), np.float32)
    graph = jm.trace(model, tree(0), images[:1])
    quantizers = jm.calibrate(tree(0), graph, [images], **quiet)
    data = {"x": images}

    def score(apply, params):
        return jnp.mean(apply(params, jnp.asarray(data["x"])))

    run = lambda: jm.sensitivity(tree(0), graph, quantizers, score, **quiet)[
        "only this"
    ]
    first = run()
    data["x"] = 2 * images
    second = run()
    data["x"] = images
    assert first != second and first == run()


class Convolutions(nn.Module):
    """Layers of as many shapes as there are sizes, and a dense one."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for size in self.sizes:
            x = nn.relu(nn.Conv(size, (3, 3), feature_group_count=2)(x))
        return nn.Dense(self.sizes[-1] + 2)(jnp.mean(x, (1, 2)))


@pytest.mark.parametrize("method", ["spatial", "weight"])
def test_factorize_compiles_only_its_pass_over_data(method, programs) -> None:
    x, counts = jax.random.normal(jax.random.key(0), (4, 6, 6, 8)), []
    for sizes in ((10, 12), (14, 16, 18, 20)):
        model = Convolutions(sizes)
        params = jax.jit(model.init)(jax.random.key(1), x)
        graph = jm.trace(model.apply, params, x)
        programs.clear()
        small = jm.factorize(params, graph, ratios=0.6, method=method)
        assert len(jm.widths(small)) == len(sizes) + 1 and not programs
        options = {"ratios": 0.6, "method": method, "batches": [x, x], **quiet}
        jm.factorize(params, graph, **options)
        counts.append(len(programs))
    assert counts[1] <= counts[0] <= 10


def family(depth):
    """A chain of `depth` layers of one shape and a last one: `(apply, params)`."""
    sizes = (6,) * depth + (4,)

    def model(params, x):
        for i in range(len(sizes)):
            x = jax.nn.relu(x @ params[str(i)]["kernel"] + params[str(i)]["bias"][None])
        return x

    rng = np.random.default_rng(depth)
    draw = lambda *n: jax.device_put(np.float32(rng.normal(size=n)))
    pairs = zip((5, *sizes), sizes, strict=False)
    return model, {
        str(i): {"kernel": draw(*n), "bias": draw(n[1])} for i, n in enumerate(pairs)
    }


PASSES = {
    "equalize": lambda p, g, q, b: jm.equalize(p, g, batches=b, **quiet),
    "calibrate": lambda p, g, q, b: jm.calibrate(p, g, b, **quiet),
    "correct_bias": lambda p, g, q, b: jm.correct_bias(p, g, q, b, **quiet),
    "noise": lambda p, g, q, b: jm.noise(p, g, q, b, **quiet),
    "adaround": lambda p, g, q, b: jm.adaround(p, g, q, b, **quiet),
    "factorize": lambda p, g, q, b: jm.factorize(p, g, ratios=0.5, batches=b, **quiet),
    "prune": lambda p, g, q, b: jm.prune(p, g, 0.5, batches=b, **quiet),
}


@pytest.mark.slow
def test_a_second_model_of_a_family_compiles_its_passes_over_data_only(programs):
    images = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    batches, compiled = jm.batched(images, batch_size=4), {}
    for depth in (3, 4):
        model, params = family(depth)
        graph = jm.trace(model, params, images[:1])
        quantizers = jm.calibrate(params, graph, batches, **quiet)
        for name, step in PASSES.items():
            programs.clear()
            step(params, graph, quantizers, batches)
            compiled[name] = len(programs)
    # calibrate has been called before; a chain is walked by programs that its layers share
    most = {"equalize": 4, "noise": 1, "factorize": 2, "prune": 2}
    assert {n: c for n, c in compiled.items() if c > most.get(n, 0)} == {}
