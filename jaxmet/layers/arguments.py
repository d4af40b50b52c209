"""Arguments that are checked before any work, in one wording for every function."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.program.compat import is_key
from jaxmet.engine.run.lift import lift
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


def check_key(key: Any, caller: str, *, why: str = "rows are drawn") -> Any:
    """`key_of` where a key must be given, and why."""
    if key is None:
        raise ValueError(
            f"jaxmet.{caller}: there is no key, and {why}. Give key=jax.random.key(0)."
        )
    return key_of(key, caller)


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
        jax.eval_shape(partial(lift(apply), **kwargs), params, *inputs)
    except Exception:  # whatever a model raises of what it does not take
        return False
    return True
