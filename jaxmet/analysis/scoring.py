"""A user's score of many variants of one network: one program where it can be traced."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.program.compat import held_after, only_new_garbage
from jaxmet.engine.run.programs import split_keywords
from jaxmet.engine.run.shared_programs import share_programs
from jaxmet.engine.run.staged import StagedProgram
from jaxmet.transforms.lift import lift
from jaxmet.tree.checks import check_callable
from jaxmet.tree.named_leaves import named_leaves, replace_leaves

Score = Callable[[Callable[..., Any], Any], Any]
Setting = tuple[Any, Any]
Runner = Callable[[Sequence[Setting]], Iterator[Any]]


def runner(
    score: Score,
    params: Any,
    graph: Graph,
    *,
    apply_of: Callable[[Any, Any], Callable[..., Any]],
    traceable: bool,
    together: int = 1,
    shared: Any = None,
    leaves_of: Callable[[Any], dict[str, Any]] = lambda what: {},
    changing: Collection[str] = (),
) -> Runner:
    """The scores of some variants in turn, each a pair of settings.

    The first says how to run, `apply_of(how, shared)`: a tree of arrays, or None. The second
    says on what: `leaves_of(what)` are the leaves, of those that are `changing`, that are
    others than in `params`. All of these arrays are data: nothing is compiled twice, whether the
    score can be traced or not, nor in a second call that traces to the same program. What a
    variant computes like the one before it is not computed again, so neighbours should differ
    late in the network. `together` variants are computed at once, by `jax.vmap`, where the score
    can be traced.
    """
    tree = lambda what: replace_leaves(params, leaves_of(what))
    if not traceable:
        forward = _compiled(apply_of, shared)
        as_it_is = Partial(forward, None)  # one object: who jits it compiles it once
        return lambda settings: (
            score(as_it_is if how is None else Partial(forward, how), tree(what))
            for how, what in settings
        )

    # Not a batch of one: its weights would make grouped convolutions.
    if together == 1:
        scored = lambda how, shared, params: score(apply_of(how, shared), params)

        def in_turn(settings: Sequence[Setting]) -> Iterator[Any]:
            rows = ((how, shared, tree(what)) for how, what in settings)
            first = next(rows, None)
            if first is None:
                return
            program = StagedProgram(scored, *first)
            program.compile()
            yield from program.rows(itertools.chain([first], rows))

        return in_turn

    leaves = {n: x for n, x in named_leaves(params).items() if n in changing}
    one = lambda how, own, shared: score(
        apply_of(how, shared), replace_leaves(params, own)
    )
    many = share_programs(jax.vmap(one, in_axes=(0, 0, None)))

    def in_groups(settings: Sequence[Setting]) -> Iterator[Any]:
        for start in range(0, len(settings), together):
            now = list(settings[start : start + together])
            rows = [(how, leaves | leaves_of(what)) for how, what in now]
            rows += rows[-1:] * (together - len(now))
            yield from many(*jax.tree.map(_in_rows, *rows), shared)[: len(now)]

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
            programs[key] = share_programs(
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
    result = (
        type(found).__name__ if shape is None else f"an array of shape {tuple(shape)}"
    )
    result = "a complex number" if _is_complex(found) else result
    return (
        f"jaxmet.{caller}: the score is {result}. Let score(apply, params) return one number, "
        "higher is better."
    )
