"""Each layer fed a runtime's own integers: how the simulation differs, layer by layer.

The simulation computes each node from the runtime's own values of the nodes before it, so that a
difference is the layer's own and none that came down to it.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmet as jm
from runtimes.cases import Case
from runtimes.figures import Row

COLUMNS = (
    "network", "quantizers", "layers", "values (million)", "identical (%)",
    "differ, of a million", "of one input", "most steps", "where most differ, of a million",
)  # fmt: skip
BATCH = 16


def tallied(
    case: Case, batches: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]
) -> list[Row]:
    """One row; batches are inputs and, by node, the runtime's values for them."""
    compare = jax.jit(fed(case))
    tree = jm.round_weights(case.saved.params, case.saved.quantizers)
    differ, most, count, inputs = Counter(), Counter(), Counter(), 0
    for x, given in batches:
        inputs += len(x)
        for node, (wrong, far) in compare(tree, x, given).items():
            differ[node] += int(wrong)
            most[node] = max(most[node], int(far))
            count[node] += given[node].size
    total, wrong = count.total(), differ.total()
    worst = sorted(count, key=lambda n: -differ[n] / count[n])[:2]
    places = [f"{n} {1e6 * differ[n] / count[n]:.1f}" for n in worst if differ[n]]
    return [
        [
            *case.label,
            len(count),
            f"{total / 1e6:.1f}",
            f"{100 * (1 - wrong / total):.5f}",
            f"{1e6 * wrong / total:.2f}",
            f"{wrong / inputs:.2f}",
            max(most.values()),
            ", ".join(places) or "–",
        ]
    ]


def fed(case: Case) -> Any:
    """`f(tree, x, given)`: by node how many values differ, and by how many steps at most."""
    quantizers = case.saved.quantizers

    def compare(tree: Any, x: Any, given: dict[str, Any]) -> Any:
        def hook(node: Any, run: Any, operands: tuple[Any, ...]) -> tuple[Any, Any]:
            result, quantizer = run(*operands), quantizers.activation(node.name)
            if quantizer is None:
                return result, None
            result = quantizer(result)
            if node.name not in given:  # the grid of a value that moves on
                return result, None
            theirs = given[node.name]
            step = jnp.asarray(quantizer.scale, jnp.float32).reshape(())
            apart = jnp.rint(jnp.abs(result - theirs) / step)
            return theirs, (jnp.sum(apart > 0), jnp.max(apart))

        return jm.evaluate(case.apply, hook)(tree, x)[1]

    return compare
