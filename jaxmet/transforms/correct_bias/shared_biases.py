r"""One bias that several layers add: one correction, the best for all of them.

With $e_i$ the mean error of what layer $i$ makes, over $n_i$ positions, the squared error of
all of them is least at $d = \sum_i n_i e_i / \sum_i n_i$.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node, used_elsewhere
from jaxmet.engine.program.calls import is_array
from jaxmet.engine.run.replay import Run, evaluate
from jaxmet.layers.eligibility import of
from jaxmet.transforms.correct_bias.bias_parameters import BiasParameter

Places = Sequence[BiasParameter]


def layers_of(places: Places) -> dict[str, list[str]]:
    """By parameter the layers whose error it takes."""
    found: dict[str, list[str]] = {}
    for place in places:
        found.setdefault(place.into, []).append(place.layer.name)
    return found


def skipped_together(
    places: Places, left: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Why layers are skipped, those included that share a bias with one that is."""
    found = dict(left)
    for into, names in layers_of(places).items():
        whys = (of(name, left[name]) for name in names)
        first = next(filter(None, whys), None)
        for name in names if first is not None else ():
            found[name] = left[name] or f"{used_elsewhere(into)}; {first}"
    return found


def best_shift(shifts: Sequence[Any], positions: Sequence[int]) -> Any:
    """The mean of mean errors, each over so many positions."""
    first, *others = shifts
    if not others:
        return first
    total = sum(positions)
    return sum(e * (n / total) for e, n in zip(shifts, positions, strict=True))


def positions_of(graph: Graph, params: Any, names: Collection[str]) -> dict[str, int]:
    """How many positions layers make of the inputs that the model was traced with."""

    def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, Any]:
        result = run(*operands)
        return result, result if node.name in names else None

    if not names:
        return {}
    inputs, kwargs = graph.called
    # what is static among them, the graph's own function knows
    kwargs = {k: v for k, v in kwargs.items() if any(map(is_array, jax.tree.leaves(v)))}
    run = evaluate(graph.apply, hook)
    results = jax.eval_shape(lambda x, k: run(params, *x, **k)[1], inputs, kwargs)
    return {
        name: result.size // math.prod(result.shape[i] for i in graph[name].features)
        for name, result in results.items()
    }
