"""What a model of the table is, and random parameters and statistics that are not trivial."""

import dataclasses
import fnmatch
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FAMILIES = ("flax", "haiku", "equinox", "jraph", "keras", "transformers", "others")
STATISTICS = ("mean", "var", "moving_mean", "moving_variance", "average")
VARIANCES = ("var", "moving_variance")


@dataclasses.dataclass(frozen=True)
class Built:
    """A model, its parameters and `inputs(key, n)`: n examples, a tuple of arrays.

    `norms` counts the batch norms in the model's own tree. With `whole`, what `inputs`
    returns has no common batch axis and is one batch as it is.
    """

    apply: Callable[..., Any]
    params: Any
    inputs: Callable[[jax.Array, int], tuple[Any, ...]]
    norms: int = 0
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    """One row of the table: `make(key)` builds it, from the `packages` that it needs.

    `unfoldable` batch norms have no neighbour that could take their gain, for the reason
    `why`: the architecture says so.
    """

    name: str
    packages: tuple[str, ...]
    make: Callable[[jax.Array], Built]
    unfoldable: int = 0
    why: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(p for p in self.packages if importlib.util.find_spec(p) is None)


MODELS: dict[str, Model] = {}


def model(name: str, *packages: str, **known: Any) -> Callable[[Any], Any]:
    """Registers a function of a key as a model of the table."""

    def register(make: Callable[[jax.Array], Built]) -> Callable[[jax.Array], Built]:
        MODELS[name] = Model(name, packages, make, **known)
        return make

    return register


def load_models(only: str = "*") -> list[Model]:
    """All models whose name matches one of the globs, by family; packages load later."""
    for family in FAMILIES:
        importlib.import_module(f"outside.{family}_models")
    globs = only.split(",")
    return [m for n, m in MODELS.items() if any(fnmatch.fnmatch(n, g) for g in globs)]


# Numbers


def keys(key: jax.Array) -> Iterator[jax.Array]:
    """As many keys as are asked for."""
    while True:
        key, sub = jax.random.split(key)
        yield sub


def drawn(params: Any, key: jax.Array, statistics: tuple[str, ...] = STATISTICS) -> Any:
    """The same tree with every constant leaf drawn: gains, biases, small layer scales.

    Random weights stay, and so do running statistics, which `settled` measures.
    """
    source = keys(key)

    def draw(path: tuple[Any, ...], leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or leaf.size == 0:
            return leaf
        array = np.asarray(leaf)
        if last(path) in statistics or array.min() != array.max():
            return leaf
        normal = jax.random.normal(next(source), array.shape, array.dtype)
        value = float(array.flat[0])
        return 0.1 * normal if value == 0 else max(value, 0.1) * jnp.exp(0.3 * normal)

    return jax.tree_util.tree_map_with_path(draw, params)


def last(path: tuple[Any, ...]) -> str:
    """The last name on a path of keys, attributes or indices."""
    names = [getattr(k, "key", getattr(k, "name", None)) for k in path]
    name = next((n for n in reversed(names) if isinstance(n, str) and n != "value"), "")
    return name.split("/")[-1]


def settled(
    train: Callable[[Any], Any], params: Any, key: jax.Array, noise: float = 1.0
) -> Any:
    """Running statistics near those of data, as training leaves them; without `noise`, those.

    `train(params)` is the tree after one step over data. Statistics move to
    m · old + (1 − m) · batch; two calls, from zeros and from ones, give m and the batch's.
    """

    train = jax.jit(train)

    def filled(value: float) -> Any:
        def fill(path: tuple[Any, ...], x: Any) -> Any:
            return jnp.full_like(x, value) if last(path) in STATISTICS else x

        return train(jax.tree_util.tree_map_with_path(fill, params))

    source = keys(key)

    def settle(path: tuple[Any, ...], x: Any, zero: Any, one: Any) -> Any:
        if last(path) not in STATISTICS:
            return x
        if not np.any(np.asarray(one - zero) < 1):
            return x  # training does not touch it
        batch = zero / (1 - (one - zero))
        normal = noise * jax.random.normal(next(source), x.shape)
        variance = last(path) in VARIANCES
        return (
            (batch + 1e-3) * jnp.exp(0.2 * normal) if variance else batch + 0.1 * normal
        )

    return jax.tree_util.tree_map_with_path(settle, params, filled(0.0), filled(1.0))


def count(params: Any, *names: str) -> int:
    """How many leaves of a tree have one of these names: batch norms, by their variance."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(last(path) in (names or VARIANCES) for path, _ in leaves)


# Inputs


def images(
    size: int = 32, channels: int = 3
) -> Callable[[jax.Array, int], tuple[Any, ...]]:
    """Pictures with structure: smooth random fields with noise, of one mean and contrast."""

    def inputs(key: jax.Array, n: int) -> tuple[Any, ...]:
        coarse, fine = jax.random.split(key)
        field = jax.random.uniform(
            coarse, (n, size // 4, size // 4, channels), minval=-1.0
        )
        smooth = jax.image.resize(field, (n, size, size, channels), "linear")
        x = smooth + 0.2 * jax.random.uniform(fine, smooth.shape, minval=-1.0)
        centred = x - jnp.mean(x, (1, 2, 3), keepdims=True)
        return (centred / jnp.std(centred, (1, 2, 3), keepdims=True),)

    return inputs


def vectors(*shape: int) -> Callable[[jax.Array, int], tuple[Any, ...]]:
    """Numbers between −1 and 1, as features that were scaled."""
    return lambda key, n: (jax.random.uniform(key, (n, *shape), minval=-1.0),)


def tokens(length: int, words: int) -> Callable[[jax.Array, int], tuple[Any, ...]]:
    """Rows of token numbers."""
    return lambda key, n: (jax.random.randint(key, (n, length), 1, words),)
