"""The only folder that knows front-ends: modules as pure functions of a tree.

nnx       the one file that knows flax
equinox   the one file that knows equinox, which it never imports by itself
"""

from collections.abc import Callable
from typing import Any

from jaxmet.engine.frontends import equinox, nnx
from jaxmet.tree.checks import check_flags, kind_of


def functional(
    module: Any, state: Any = None, *, vmap: bool = True
) -> tuple[Callable, Any, Callable]:
    """An nnx or equinox module as `(apply, params, merge)`.

    `apply(params, *inputs, **kwargs)` calls a module made of `params`, which hold all its
    arrays, and leaves the given one unchanged; `method='name'` calls another method.
    `merge(params)` is a module again. Put the module in inference mode first:
    `module.eval()`, or `eqx.nn.inference_mode(module)`.

    With `mutable=` the updated statistics are returned too: for nnx an nnx filter, such as
    `nnx.BatchStat`, for `(outputs, updated state)`; for equinox `mutable=True`, for
    `(outputs, updated params)`.

    Args:
        module: An `nnx.Module` or an `equinox.Module`.
        state: The `eqx.nn.State` of an equinox module, as `eqx.nn.make_with_state` returns
            it. `params` is then `{'params': module, 'state': statistics}`, and `merge`
            returns the pair `(module, state)`.
        vmap: Of an equinox module, whether `apply` takes batches: it then calls the module
            once per example of axis 0 of every input, under the axis name of its batch
            norms. Keyword arguments are the same for all examples.

    Returns:
        `apply`, a function of the parameters; `params`, all arrays of the module; and
        `merge`, which makes a module of such a tree.

    Raises:
        TypeError: for anything but such a module (linen needs no such step), and for a `state`
            that is none.
        ValueError: for a `vmap` that is neither True nor False.

    >>> apply, params, merge = jm.functional(model)  # or of equinox: (model, state)
    >>> params = jm.fold_batch_norm(params, jm.trace(apply, params, images[:1]))
    >>> model = merge(params)
    """
    check_flags("functional", vmap=vmap)
    if equinox.is_module(module):
        return equinox.functional(module, state, vmap=vmap)
    if isinstance(module, tuple) and any(map(equinox.is_module, module)):
        raise TypeError(
            "jaxmet.functional: got a tuple with an equinox module in it. Pass a module and "
            "its state side by side: jm.functional(model, state)."
        )
    if state is not None:
        raise TypeError(
            f"jaxmet.functional: a state came with a {type(module).__name__}. Only an "
            "equinox module has one: jm.functional(*eqx.nn.make_with_state(Model)(key))."
        )
    return nnx.functional(module)


def check_apply(apply: Any, caller: str) -> None:
    """Raise unless a model is a function; a linen module is called through its `apply`."""
    if hasattr(apply, "apply") or not callable(apply):
        raise ValueError(
            f"jaxmet.{caller}: apply is {kind_of(apply)}. Pass model.apply of a linen module, "
            "or what jm.functional(module) returns for an nnx or equinox one."
        )


def refuse_module(apply: Any, params: Any, caller: str) -> None:
    """Refuse a module, or its method, in place of a function of the parameters."""
    for thing, role in ((apply, "apply"), (params, "params")):
        found = getattr(thing, "__self__", thing)
        of_nnx = nnx.is_module(found)
        # An equinox tree is a fine tree of parameters, and a wrapper without arrays (as
        # eqx.filter_jit makes) a fine function.
        of_equinox = role == "apply" and equinox.holds_arrays(found)
        if of_nnx or of_equinox:
            kind, mode = (
                ("nnx", "module.eval()")
                if of_nnx
                else ("equinox", "eqx.nn.inference_mode(module)")
            )
            raise ValueError(
                f"jaxmet.{caller}: {role} is a {type(found).__name__}, of an {kind} module, "
                "which holds its parameters itself. Put it in inference mode "
                f"({mode}), then use apply, params, merge = jm.functional(module) and pass "
                "these apply and params."
            )
