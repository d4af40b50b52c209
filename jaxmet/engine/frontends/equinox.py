"""The one file that knows equinox: a module, and its state, as a pure function.

Equinox is an optional dependency, so it is looked for among the loaded modules: who has a
module of it has loaded it.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax


def _loaded() -> Any:
    return sys.modules.get("equinox")


def is_module(thing: Any) -> bool:
    eqx = _loaded()
    return eqx is not None and isinstance(thing, eqx.Module)


def holds_arrays(thing: Any) -> bool:
    """Whether a thing is a module with arrays in it."""
    if not is_module(thing):
        return False
    return any(_loaded().is_array(leaf) for leaf in jax.tree.leaves(thing))


def functional(
    module: Any, state: Any, *, vmap: bool
) -> tuple[Callable, Any, Callable]:
    """See `jaxmet.functional`."""
    eqx = _loaded()
    indices = _indices(module)
    if state is None and indices:
        state, module = _initial(module), eqx.nn.delete_init_state(module)
    elif state is not None and not isinstance(state, eqx.nn.State):
        raise TypeError(
            f"jaxmet.functional: state is a {type(state).__name__}. Pass the second thing "
            "that eqx.nn.make_with_state(Model)(…) returns."
        )
    indices = _indices(module)
    params, static = eqx.partition(module, eqx.is_array)
    stateful = state is not None
    leaves, tree = jax.tree.flatten(state)
    numbers = tree.unflatten(range(len(leaves)))
    places = {path: numbers.get(index) for path, index in indices.items()}
    if stateful:
        held = jax.tree.map(lambda i: leaves[i], places)
        params = {"params": params, "state": _nested(held)}
    axis = _axis_name(module)

    def merge(params: Any) -> Any:
        if not stateful:
            return eqx.combine(params, static)
        given = [*leaves]
        for path, places_of in places.items():
            value = _at(params["state"], path)
            flat = jax.tree.structure(places_of).flatten_up_to(value)
            for i, leaf in zip(jax.tree.leaves(places_of), flat, strict=True):
                given[i] = leaf
        return eqx.combine(params["params"], static), tree.unflatten(given)

    def apply(
        params: Any,
        *inputs: Any,
        method: str = "__call__",
        mutable: bool = False,
        **kwargs: Any,
    ) -> Any:
        merged = merge(params)
        model, state = merged if stateful else (merged, None)
        call = getattr(model, method)
        place = _place_of_state(call, inputs, kwargs) if stateful else None
        takes_state = place is not None

        def one(*inputs: Any) -> Any:
            if isinstance(place, int):
                return call(*inputs[:place], state, *inputs[place:], **kwargs)
            if takes_state:
                return call(*inputs, **kwargs, state=state)
            return call(*inputs, **kwargs), state

        if not takes_state and not mutable:
            single = lambda *inputs: one(*inputs)[0]
            return (
                jax.vmap(single, axis_name=axis)(*inputs) if vmap else single(*inputs)
            )
        every = jax.vmap(one, out_axes=(0, None), axis_name=axis) if vmap else one
        outputs, state = every(*inputs)
        if not mutable:
            return outputs
        if not stateful:
            return outputs, params
        updated = {path: state.get(index) for path, index in indices.items()}
        return outputs, {**params, "state": _nested(updated)}

    return apply, params, merge


def _initial(module: Any) -> Any:
    """The state that a module was made with, where it still holds it."""
    try:
        return _loaded().nn.State(module)
    except ValueError as error:
        raise TypeError(
            f"jaxmet.functional: the {type(module).__name__} came without its state. Pass "
            "both that eqx.nn.make_with_state(Model)(…) returned: jm.functional(model, state)."
        ) from error


def _place_of_state(call: Callable, inputs: Any, kwargs: Any) -> int | str | None:
    """Where a call takes its state: before which input, by name, or nowhere.

    A state of another name is what is missing after the inputs.
    """
    how = inspect.signature(call)
    if "state" in how.parameters:
        place = list(how.parameters).index("state")
        return place if place < len(inputs) else "state"

    def binds(*given: Any) -> bool:
        try:
            how.bind(*given, **kwargs)
        except TypeError:
            return False
        return True

    missing = not binds(*inputs) and binds(*inputs, None)
    return len(inputs) if missing else None


Path = tuple[str, ...]


def _indices(module: Any) -> dict[Path, Any]:
    """The entries of a module's state, by where the module uses them first."""
    eqx = _loaded()
    is_index = lambda x: isinstance(x, eqx.nn.StateIndex)
    pairs, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=is_index)
    found: dict[Any, tuple[Path, Any]] = {}
    for path, leaf in pairs:
        if is_index(leaf):
            names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
            found.setdefault(leaf.marker, (names, leaf))
    return dict(found.values())


def _nested(entries: dict[Path, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, value in entries.items():
        inner = out
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return out


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _axis_name(module: Any) -> Any:
    """The axis over which the batch norms of a module take their means."""
    eqx = _loaded()
    is_norm = lambda x: isinstance(x, eqx.nn.BatchNorm)
    norms = filter(is_norm, jax.tree.leaves(module, is_leaf=is_norm))
    names = {norm.axis_name for norm in norms}
    if len(names) > 1 or any(not isinstance(name, str) for name in names):
        raise ValueError(
            f"jaxmet.functional: the batch norms of {type(module).__name__} take means over "
            f"the axes {sorted(map(str, names))}. Use vmap=False and map over them yourself."
        )
    return names.pop() if names else None
