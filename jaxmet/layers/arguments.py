"""Arguments that are checked before any work, in one wording for every function."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.program.calls import Apply, is_array
from jaxmet.engine.program.compat import is_key
from jaxmet.engine.run.lifted import lifted
from jaxmet.tree.batches import inputs_from, inputs_of
from jaxmet.tree.config import OPTIONS, QuantConfig


def key_of(key: Any, caller: str) -> Any:
    """The one default of the package, `jax.random.key(0)`, or the typed key that was given.

    It may be given as the two 32-bit integers that `jax.random.PRNGKey` makes, too. Each use
    of a key splits it or folds numbers of its own into it.
    """
    if key is None:
        return jax.random.key(0)
    if hasattr(key, "dtype") and is_key(key) and key.shape == ():
        return key
    try:
        if hasattr(key, "dtype") and key.dtype == jnp.uint32:
            typed = jax.random.wrap_key_data(jnp.asarray(key))
            if typed.shape == ():
                return typed
    except (TypeError, ValueError):
        pass  # a wrong number of integers
    shape = f" of shape {tuple(key.shape)}" if hasattr(key, "shape") else ""
    shown = f", {key!r}" if isinstance(key, bool | int | float | str) else ""
    raise ValueError(
        f"jaxmet.{caller}: the key is a {type(key).__name__}{shape}{shown}, not one PRNG key. "
        "Give key=jax.random.key(0)."
    )


def check_keywords(
    kwargs: Mapping[str, Any],
    graph: Graph,
    params: Any,
    caller: str,
    *,
    config: bool = False,
) -> None:
    """Refuse options of `QuantConfig` and `Rule` among the keyword arguments for the model.

    Unless the model takes one of that name. `config` says that the function takes a
    configuration.
    """
    inputs, called = graph.called
    given = {name: value for name, value in kwargs.items() if name not in called}
    refuse_options(given, graph.apply, params, inputs, caller, config=config)


def refuse_options(
    kwargs: Mapping[str, Any],
    apply: Apply,
    params: Any,
    inputs: Sequence[Any],
    caller: str,
    *,
    config: bool = True,
) -> None:
    """`check_keywords` for a model that is not traced yet."""
    options = misplaced(kwargs, OPTIONS, apply, params, inputs)
    if not options:
        return
    fields = QuantConfig.__dataclass_fields__
    of_config = [f"{n}={v!r}" for n, v in options.items() if n in fields]
    of_rule = [f"{n}={v!r}" for n, v in options.items() if n not in fields]
    if of_rule:
        of_config.append(f"rules=[jm.Rule('*', {', '.join(of_rule)})]")
    write = f"config=jm.QuantConfig({', '.join(of_config)})"
    if not config:
        write = f"jm.calibrate(…, {write}), and pass the quantizers that it returns"
    owner = "Rule" if of_rule and len(of_config) == 1 else "QuantConfig"
    raise ValueError(
        f"jaxmet.{caller}: {', '.join(options)} is an option of jm.{owner}, but keyword "
        f"arguments go to the model, which does not take it. Write {write}."
    )


def misplaced(
    kwargs: Mapping[str, Any],
    options: Collection[str],
    apply: Apply,
    params: Any,
    inputs: Sequence[Any],
) -> dict[str, Any]:
    """The keyword arguments for a model that are options of something else.

    None where the model takes them, or where something else is wrong with the call.
    """
    found = {n: v for n, v in kwargs.items() if n in options and not _takes(apply, n)}
    others = {n: v for n, v in kwargs.items() if n not in found}
    if (
        not found
        or _runs(apply, params, inputs, kwargs)
        or not _runs(apply, params, inputs, others)
    ):
        return {}
    return found


def _takes(apply: Apply, name: str) -> bool:
    """Whether the signature of a model names a keyword argument."""
    try:
        return name in inspect.signature(apply).parameters
    except (TypeError, ValueError):
        return False


def _runs(apply: Apply, params: Any, inputs: Sequence[Any], kwargs: Any) -> bool:
    """Whether the model accepts the call; nothing is computed."""
    try:
        jax.eval_shape(partial(lifted(apply), **kwargs), params, *inputs)
    except Exception:  # whatever a model raises of what it does not take
        return False
    return True


# Batches that the model does not accept


@contextlib.contextmanager
def accepting(
    batch: tuple[Any, ...],
    caller: str,
    apply: Apply,
    params: Any,
    kwargs: Mapping[str, Any],
    *,
    traced: tuple[Any, ...] | None = None,
    cure: str | None = None,
) -> Iterator[None]:
    """While the model is traced for a batch, say of its errors that it refuses the batch.

    `traced` are the inputs of the graph's trace. An error of a model that runs on the batch
    has another cause and passes unchanged.
    """
    try:
        yield
    except Exception as error:
        of_flax = type(error).__module__.startswith("flax.")
        known = of_flax or isinstance(error, TypeError | ValueError | AttributeError)
        if not known or str(error).startswith("jaxmet."):
            raise
        given = inputs_of(batch)[0]
        if any(0 in x.shape for x in jax.tree.leaves(given)):
            raise ValueError(
                f"jaxmet.{caller}: a batch has no examples in it. Leave it out."
            ) from error
        if _runs(apply, params, given, kwargs):
            raise
        reason = str(error).split("\n")[0].rstrip(".")
        number = len(given)
        inputs = "1 input" if number == 1 else f"{number} inputs"
        shapes = _compared(given, traced)
        if _runs(apply, params, _with_axis(given), kwargs):
            cure = BATCH_AXIS
        elif cure is None:
            cure = inputs_from(given)
        raise ValueError(
            f"jaxmet.{caller}: the model did not accept a batch of {inputs}: {reason}. {shapes} "
            f"{cure}"
        ) from error


EXAMPLES = "give batches of examples, x[None] for a single one."
BATCH_AXIS = f"The leading batch axis is missing: {EXAMPLES}"
AXIS_IN_TRACE = f"Trace the model with x[None], and {EXAMPLES}"
VMAP = (
    "Give it one: trace jax.vmap(apply, in_axes=(None, 0)) with x[None], and give batches of "
    "examples."
)


def check_examples(
    graph: Graph,
    params: Any,
    batch: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    caller: str,
) -> tuple[Any, Any]:
    """The shapes of the model's outputs for one example of a batch, and for the whole batch.

    Raises ValueError unless the model runs on single examples along axis 0 of the batch.
    Inputs without a common axis 0 are one example.
    """
    whole, _ = inputs_of(batch)
    traced, _ = inputs_of(graph.called[0])
    one = _one_of(whole)
    shapes = [[x.shape for x in jax.tree.leaves(t)] for t in (whole, traced)]
    alike = len(shapes[0]) == len(shapes[1])
    if alike and any(len(a) < len(b) for a, b in zip(*shapes, strict=True)):
        raise ValueError(
            f"jaxmet.{caller}: single examples along axis 0 of the batch are needed here. "
            f"{_compared(whole, traced)} {BATCH_AXIS}"
        )
    model = partial(lifted(graph.apply), **kwargs)
    with accepting(whole, caller, graph.apply, params, kwargs, traced=traced):
        of_whole = jax.eval_shape(model, params, *whole)
    try:
        return jax.eval_shape(model, params, *one), of_whole
    except Exception as error:  # whatever a model raises of what it does not take
        why, cure = "the model has no batch axis", VMAP
        if _runs(graph.apply, params, _with_axis(whole), kwargs):
            why, cure = "axis 0 of the batch is no batch axis", AXIS_IN_TRACE
        raise ValueError(
            f"jaxmet.{caller}: {why}, and single examples are needed here: the model takes "
            f"{_shapes(whole)} and not {_shapes(one)}. {cure}"
        ) from error


def _one_of(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shapes of one example, as a batch of one."""
    sizes = {x.shape[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) > 1 or () in sizes:
        return batch
    shape = lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    return jax.tree.map(shape, batch)


def _with_axis(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shapes of two such inputs on a leading axis; one would fit reshapes that drop it."""
    shape = lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
    return jax.tree.map(shape, batch)


def _compared(given: Any, traced: Any) -> str:
    """A sentence with the shapes of a batch, and those of the trace."""
    also = "" if traced is None else f", those of the traced inputs {_shapes(traced)}"
    return f"The shapes of the batch are {_shapes(given)}{also}."


def _shapes(tree: Any) -> str:
    shapes = [str(tuple(x.shape)) for x in jax.tree.leaves(tree) if is_array(x)]
    more = ", …" if len(shapes) > 5 else ""
    return ", ".join(shapes[:5]) + more
