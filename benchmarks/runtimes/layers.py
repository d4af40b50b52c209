"""Each layer fed the integers of onnxruntime: how the simulation differs, layer by layer.

Every value on a grid is read from onnxruntime as it runs its fused operations. The simulation then
computes each node from the runtime's own values of the nodes before it, so that a difference is
the layer's own and none that came down to it.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmet as jm
from jaxmet.export.onnx_file import CALLER, lowered
from jaxmet.export.onnx_graph import OnnxGraph
from jaxmet.export.onnx_passes import fused
from runtimes.cases import Case
from runtimes.figures import Row
from runtimes.in_onnxruntime import operations, session, written

COLUMNS = (
    "network", "quantizers", "layers", "values (million)", "identical (%)",
    "differ, of a million", "of one input", "most steps", "where most differ, of a million",
)  # fmt: skip
BATCH = 16


class Tap(NamedTuple):
    """The integers of a node in the file, and their grid."""

    tensor: str
    scale: np.ndarray
    zero_point: np.ndarray

    def value(self, integers: np.ndarray) -> np.ndarray:
        return (integers.astype(np.float32) - np.float32(self.zero_point)) * self.scale


def rows(case: Case) -> list[Row]:
    """All values of a network that are on a grid."""
    path = case.folder / "tapped.onnx"
    taps = tapped(case, path)
    run = session(path, case.folder / "tapped_optimized.onnx")
    _check_same_operations(case)
    compare = jax.jit(fed(case))
    tree = jm.round_weights(case.saved.params, case.saved.quantizers)
    differ, most, count = Counter(), Counter(), Counter()
    name = run.get_inputs()[0].name
    for i in range(0, len(case.inputs), BATCH):
        x = case.inputs[i : i + BATCH]
        found = run.run([t.tensor for t in taps.values()], {name: x})
        given = {
            node: t.value(a) for (node, t), a in zip(taps.items(), found, strict=True)
        }
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
            f"{wrong / len(case.inputs):.2f}",
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


def tapped(case: Case, path: Path) -> dict[str, Tap]:
    """Write the file with all its integers as outputs; which is whose."""
    import onnx
    from onnx import helper, numpy_helper

    saved = case.saved
    model, grids = lowered(
        CALLER, case.apply, saved.params, saved.quantizers, (case.example,),
        "dynamic", 21, {},
    )  # fmt: skip
    graph = OnnxGraph(fused(model))
    taps: dict[str, Tap] = {}
    for node in [n for n in graph.graph.node if n.op_type == "QuantizeLinear"]:
        grid = grids.get(node.input[1])
        if grid is None:
            continue
        tensor, reader = node.output[0], graph.only_consumer(node.output[0])
        while reader is not None and reader.op_type in ("Max", "Min"):
            tensor, reader = (
                reader.output[0],
                graph.only_consumer(reader.output[0]),
            )
        scale, zero = (graph.constant(n) for n in node.input[1:])
        if scale is None or zero is None:
            raise ValueError(f"{grid.owner}: its grid is no constant.")
        taps[grid.owner] = Tap(tensor, scale, zero)
    kinds = {t.name: t for t in graph.graph.output}
    for tap in taps.values():
        if tap.tensor not in kinds:
            kind = numpy_helper.from_array(tap.zero_point).data_type
            made = helper.make_empty_tensor_value_info(tap.tensor)
            made.type.tensor_type.elem_type = kind
            graph.graph.output.append(made)
            kinds[tap.tensor] = made
    onnx.save(model, path)
    return taps


def _check_same_operations(case: Case) -> None:
    """What is read must be what onnxruntime computes anyway."""
    written(case)
    session(case.folder / "integers.onnx", case.folder / "optimized.onnx")
    plain, read = (
        operations(case.folder / f"{n}.onnx") for n in ("optimized", "tapped_optimized")
    )
    computes = {k for k in plain | read if k.startswith("QLinear") or k == "QGemm"}
    for kind in sorted(computes):
        if plain[kind] != read[kind]:
            print(
                f"{case.network}, {case.way}: {kind} {plain[kind]}, read {read[kind]}"
            )
