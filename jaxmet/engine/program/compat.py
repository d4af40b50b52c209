"""What changed between JAX releases, in one place."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import dtypes
from jax.core import Tracer

from jaxmet.numerics.xp import QUICK as QUICK

CALLS = ("jit", "pjit", "closed_call", "core_call", "core_closed_call")
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
REMAT = ("remat2", "remat", "checkpoint")
Size = Any  # of an axis: an int, or a dimension that `jax.export` keeps symbolic


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The equations and the constants of an open, closed or merged jaxpr."""
    if hasattr(jaxpr, "consts"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def call_body(params: dict[str, Any]) -> Any:
    """The body of a call-like equation."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            return params[key]
    raise KeyError(f"no body among {sorted(params)}")


def inlined_body(equation: Any) -> tuple[Any, Sequence[Any]]:
    """Body and constants of a `jax.jit(…, inline=True)`; newer releases inline it late."""
    inline = equation.params.get("inline")
    if inline is True or str(getattr(inline, "value", "")).startswith("jax"):
        return open_jaxpr(call_body(equation.params))
    return None, ()


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """Number of constants and of carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(list(constants)), len(list(carry))


def sub_jaxprs(params: dict[str, Any]) -> list[Any]:
    """Every jaxpr among an equation's parameters, found by what it has."""
    found = []
    for value in params.values():
        items = value if isinstance(value, (tuple, list)) else (value,)
        found += [i for i in items if hasattr(i, "eqns") or hasattr(i, "jaxpr")]
    return found


def bind(primitive: Any, params: dict[str, Any], operands: Sequence[Any]) -> list[Any]:
    """Run one equation again, custom rules included."""
    bound = primitive.get_bind_params(params)
    if isinstance(bound, tuple):  # older releases hand the functions apart
        functions, bound = bound
        operands = (*functions, *operands)
    results = primitive.bind(*operands, **bound)
    return list(results) if primitive.multiple_results else [results]


def is_key(aval: Any) -> bool:
    """Whether an abstract value is a typed PRNG key."""
    return jnp.issubdtype(aval.dtype, dtypes.prng_key)


@contextlib.contextmanager
def only_new_garbage() -> Iterator[None]:
    """Inside, the collector looks at what is made inside: of all objects it takes seconds."""
    if gc.get_freeze_count():  # the user's: to unfreeze would undo it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def held_after(tracer: Any) -> Callable[[], bool]:
    """Whether an array of the trace that this one belongs to is still held somewhere.

    `jax.checking_leaks` asks the same, but takes minutes to say who holds it.
    """
    trace = weakref.ref(tracer._trace)

    def held() -> bool:
        if trace() is None:
            return False
        gc.collect()  # what only cycles keep alive is not held
        return any(isinstance(x, Tracer) for x in gc.get_referrers(trace()))

    return held
