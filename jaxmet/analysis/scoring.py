"""A user's score of many variants of one network: one program where it can be traced."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.program.compat import held_after, only_new_garbage
from jaxmet.engine.run import shared_programs
from jaxmet.engine.run.lift import lift
from jaxmet.engine.run.programs import split_keywords
from jaxmet.tree.checks import check_callable

Score = Callable[[Callable[..., Any], Any], Any]
Setting = tuple[Any, Any]
Runner = Callable[[Sequence[Setting]], Iterator[Any]]


def runner(
    score: Score,
    params: Any,
    graph: Graph,
    *,
    apply_of: Callable[[Any, Any], Callable[..., Any]],
    params_of: Callable[[Any, Any], Any],
    traceable: bool,
    together: int = 1,
    shared: Any = None,
) -> Runner:
    """The scores of some variants in turn, each a pair of settings: trees of arrays, or None.

    The first says how to run, `apply_of(how, shared)`, the second on what,
    `params_of(params, what)`. Settings, and what they share, are data: nothing is compiled
    twice, whether the score can be traced or not, nor in a second call that traces to the same
    program.
    `together` variants are computed at once, by `jax.vmap`, where it can.
    """
    if not traceable:
        forward = _compiled(apply_of, shared)
        changed = shared_programs.shared(params_of)
        as_it_is = Partial(forward, None)  # one object: who jits it compiles it once
        return lambda settings: (
            score(
                as_it_is if how is None else Partial(forward, how),
                changed(params, what),
            )
            for how, what in settings
        )

    def scored(params: Any, shared: Any, setting: Any) -> Any:
        how, what = setting
        return score(apply_of(how, shared), params_of(params, what))

    # Not a batch of one: its weights would make grouped convolutions.
    if together == 1:
        one = shared_programs.shared(scored)
        return lambda settings: (one(params, shared, setting) for setting in settings)
    many = shared_programs.shared(jax.vmap(scored, in_axes=(None, None, 0)))

    def in_groups(settings: Sequence[Setting]) -> Iterator[Any]:
        for start in range(0, len(settings), together):
            now = list(settings[start : start + together])
            full = now + now[-1:] * (together - len(now))
            yield from many(params, shared, jax.tree.map(_in_rows, *full))[: len(now)]

    return in_groups


def _in_rows(*rows: Any) -> jax.Array:
    return jnp.stack([jnp.asarray(row) for row in rows])


def _compiled(
    apply_of: Callable[[Any, Any], Callable[..., Any]], shared: Any
) -> Callable[..., Any]:
    """The variant's model, compiled once for each set of static keyword arguments."""
    programs: dict[str, Callable[..., Any]] = {}

    def run(how: Any, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        arrays, static = split_keywords(kwargs)
        if (key := repr(sorted(static.items()))) not in programs:
            programs[key] = shared_programs.shared(
                lambda how, shared, p, x, arrays: apply_of(how, shared)(
                    p, *x, **arrays, **static
                ),
            )
        return programs[key](how, shared, params, inputs, arrays)

    return run


def check_score(caller: str, score: Any) -> None:
    """Raise unless the score is a function."""
    cure = "Pass a function score(apply, params) of the model and its parameters."
    check_callable(caller, "score", score, cure)


def is_traceable(score: Score, graph: Graph, params: Any, caller: str) -> bool:
    """Whether the score runs on traced parameters, refused where it keeps one."""
    check_score(caller, score)
    apply, held = lift(graph.apply), list[Callable[[], bool]]()

    def tried(params: Any) -> Any:
        held.append(held_after(jax.tree.leaves(params)[0]))
        return score(apply, params)

    try:
        with only_new_garbage():
            shape = jax.eval_shape(tried, params)
            kept = held[-1]()
    except jax.errors.JAXTypeError:
        return False
    except TypeError as error:
        if "valid JAX type" not in str(error):
            raise
        return False  # what it returns is no number: the first row says so
    if kept and held[-1]():
        # A cache may keep what it sees first; who keeps a second one too leaks.
        jax.eval_shape(lambda params: tried(params), params)
        if held[-1]():
            raise ValueError(
                f"jaxmet.{caller}: the score function keeps an array that is being traced, "
                "in a variable outside of it or an attribute. Let it return all that it "
                "computes."
            )
    if not hasattr(shape, "shape") or shape.shape != () or _is_complex(shape):
        raise ValueError(_no_number(shape, caller))
    return True


def number_of(found: Any, caller: str) -> float:
    """What a score returned, refused unless it is one number."""
    known = isinstance(found, int | float | np.generic | jax.Array)
    if np.shape(found) != () or not known or _is_complex(found):
        raise ValueError(_no_number(found, caller))
    return float(found)


def check_finite_score(number: float, where: str, caller: str) -> float:
    """A number, refused unless it is finite."""
    if not np.isfinite(number):
        raise ValueError(
            f"jaxmet.{caller}: the score of {where} is {number}. Let it be a finite number "
            "for every network, however bad."
        )
    return number


def _is_complex(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.complexfloating)


def _no_number(found: Any, caller: str) -> str:
    shape = getattr(found, "shape", None)
    said = (
        type(found).__name__ if shape is None else f"an array of shape {tuple(shape)}"
    )
    said = "a complex number" if _is_complex(found) else said
    return (
        f"jaxmet.{caller}: the score is {said}. Let score(apply, params) return one number, "
        "higher is better."
    )
