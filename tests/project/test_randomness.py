"""All randomness comes from `key`, which has one default; no seed hides anywhere else."""

import ast
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmet as jm

PACKAGE = Path(jm.__file__).parent

# Where a seed may stand, and why.
SEEDS = {
    "layers/arguments.py": "the one documented default",
    "tree/stored_trees.py": "keys that were saved are keys again",
    "engine/nodes/norms/affine_chain.py": "numbers that only tell algebraic identities apart",
}
SOURCE = re.compile(r"(^|\.)random\.|^(PRNGKey|default_rng|RandomState|urandom)$")
FACTORIES = {
    *("key", "PRNGKey", "default_rng", "RandomState", "seed", "Random"),
    *("SeedSequence", "Generator", "wrap_key_data", "urandom"),
}


def seeds(tree: ast.AST) -> list[int]:
    """The lines on which a source of random numbers is made."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and SOURCE.search(name := ast.unparse(node.func))
        and name.rpartition(".")[2] in FACTORIES
    ]


def test_no_seed_stands_in_the_package_but_the_default():
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := seeds(ast.parse(path.read_text())))
    }
    allowed = {f for f in found if f in SEEDS or f.startswith("demo/")}
    assert not found.keys() - allowed, "these make random numbers of their own"
    assert not SEEDS.keys() - allowed, "these do not any more: take them off the list"


@pytest.mark.parametrize(
    "line",
    [
        "jax.random.key(0)",
        "random.key(3)",
        "jax.random.PRNGKey(seed)",
        "np.random.default_rng(7)",
        "default_rng()",
        "numpy.random.RandomState(1)",
        "np.random.seed(0)",
        "random.Random(3)",
        "jax.random.wrap_key_data(x)",
    ],
)
def test_the_walk_finds_seeds(line):
    assert seeds(ast.parse(f"def f(x, seed):\n    return {line}")) == [2]
    assert not seeds(ast.parse(f"def f(x):\n    '''{line}'''\n    return x.key(1)"))


def drawing() -> dict[str, Any]:
    """Every public function that takes a key."""
    public = {n: getattr(jm, n) for n in dir(jm) if not n.startswith("_")}
    return {
        name: function
        for name, function in public.items()
        if inspect.isfunction(function)
        and "key" in inspect.signature(function).parameters
    }


def test_a_key_is_a_keyword_with_the_documented_default():
    functions = drawing()
    expected = "adaround equalize factorize noise prune ptq rotate score_ratios"
    assert set(functions) == {*expected.split(), "search_scales"}
    for name, function in functions.items():
        key = inspect.signature(function).parameters["key"]
        assert key.kind is inspect.Parameter.KEYWORD_ONLY, name
        assert key.default is None, name
        if name != "ptq":
            assert "jax.random.key(0)" in (function.__doc__ or ""), name


# One layer that reads an image of 6 x 6 positions, of which few rows are drawn.
X = jax.random.normal(jax.random.key(3), (8, 6, 6, 2))
PARAMS = {
    "conv": jax.random.normal(jax.random.key(4), (3, 3, 2, 4)),
    "next": jax.random.normal(jax.random.key(6), (3, 3, 4, 4)),
    "out": jax.random.normal(jax.random.key(5), (4, 3)),
}


def apply(params, x):
    for name in ("conv", "next"):
        x = jax.nn.relu(convolved(x, params[name]))
    return jnp.mean(x, axis=(1, 2)) @ params["out"]


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.cache
def calls() -> dict[str, Any]:
    graph = jm.trace(apply, PARAMS, X)
    batches = [X[:4], X[4:]]
    config = jm.QuantConfig(weight_bits=3)
    quiet: dict[str, Any] = {"progress": False}
    q = jm.calibrate(PARAMS, graph, batches, config, **quiet)
    few = quiet | {"rows": 16}

    def score(apply, params):
        return -jnp.mean(jnp.square(apply(params, X)))

    return {
        "adaround": lambda **k: jm.adaround(PARAMS, graph, q, batches, **few, **k),
        "search_scales": lambda **k: jm.search_scales(
            PARAMS, graph, q, batches, **few, **k
        ),
        "factorize": lambda **k: jm.factorize(
            PARAMS, graph, ratios=0.7, batches=batches, **(few | {"rows": 4}), **k
        ),
        "prune": lambda **k: jm.prune(
            PARAMS, graph, 0.5, batches=batches, **(few | {"rows": 4}), **k
        ),
        "score_ratios": lambda **k: jm.score_ratios(
            *(PARAMS, graph, score),
            **(few | {"rows": 4, "batches": batches, "ratios": (0.7,)}),
            **k,
        ),
        "rotate": lambda **k: jm.rotate(PARAMS, graph, **k),
        "noise": lambda **k: jm.noise(PARAMS, graph, q, batches, **quiet, **k),
        "equalize": lambda **k: jm.equalize(
            PARAMS, graph, objective="noise", batches=batches, **quiet, **k
        ),
    }


def arrays(found: Any) -> list[np.ndarray]:
    if isinstance(found, jm.Table):
        return [np.asarray(found[name], object) for name in found.columns]
    return [np.asarray(x) for x in jax.tree.leaves(found)]


def equal(one: Any, two: Any) -> bool:
    pairs = zip(arrays(one), arrays(two), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["adaround", "search_scales", "factorize", "prune"])
def test_the_default_is_key_zero_and_another_key_draws_others(name):
    call = calls()[name]
    default = call()
    assert equal(call(key=jax.random.key(0)), default)
    assert not equal(call(key=jax.random.key(1)), default)


def test_a_wrong_key_is_refused_by_every_function_that_draws():
    for name, call in calls().items():
        for key in (3, jax.random.split(jax.random.key(0))):
            with pytest.raises(ValueError, match=rf"jaxmet\.{name}: the key is"):
                call(key=key)


@pytest.mark.parametrize("form", ["list", "batched"])
def test_later_batches_show_other_positions(form):
    """The same image comes in every batch, so what is new can only be other positions.

    Its 16 positions hold one unit vector each. Factors of rank 6 that are fitted to at most
    six positions keep the rows of the weight that these read, and no others.
    """
    size, rank = 16, 6
    image = np.eye(size, dtype=np.float32).reshape(1, 4, 4, size)
    weight = np.random.default_rng(0).normal(size=(1, 1, size, size))
    params = {"k": jax.device_put(np.float32(weight))}
    graph = jm.trace(lambda p, x: convolved(x, p["k"]), params, image)

    def kept(number: int) -> int:
        batches: Any = [image] * number
        if form == "batched":
            batches = jm.batched(np.repeat(image, number, 0), 1)
        new = jm.factorize(
            *(params, graph),
            ranks={"k": rank},
            batches=batches,
            rows=2,
            progress=False,
        )
        off = np.asarray(jm.densify(new)["k"], np.float64) - weight
        return int(np.sum(np.linalg.norm(off[0, 0], axis=1) < 1e-2))

    assert kept(1) == 2
    assert 3 <= kept(3) <= rank
    assert kept(40) < rank  # all positions were seen, and six ranks are too few
