"""Integers in JAX against onnxruntime and the simulation; sizes of what is stored."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmet as jm
from runtimes.cases import BATCH, Case, run
from runtimes.figures import Row, percent, shares, time_ratio

COLUMNS = (
    "network", "quantizers", "identical to onnxruntime (%)", "one step (%)",
    "identical to the simulation (%)", "StableHLO / float", "jm.save, compressed / float",
)  # fmt: skip
TIMES = ("network", "quantizers", "time / float replay, 1", "32")


def rows(case: Case) -> list[Row]:
    """`jm.lift(apply, quantizers)` on a tree of integers."""
    program, integers = lifted(case)
    made = case.keep("integers", run(program, integers, case.inputs))
    runtime = case.outputs("onnxruntime")
    close = ["–", "–"] if runtime is None else shares(made, runtime, case.step)
    floats = sum(np.asarray(a).nbytes for a in jax.tree.leaves(case.floats))
    return [
        [
            *case.label,
            *close,
            percent(made == case.simulated, 2),
            *(f"{path.stat().st_size / floats:.3f}" for path in stored(case, integers)),
        ]
    ]


def times(case: Case) -> list[Row]:
    """Integers, the weights constants of the program, over the float model as jaxmet runs it."""
    replay = jm.evaluate(
        case.apply, lambda node, compute, operands: (compute(*operands), None)
    )
    found = []
    for count in (1, BATCH):
        runs = []
        program, integers = lifted(case)
        inside = lambda _, x: program(integers, x)  # as constants: the faster form
        for function, tree in ((inside, None), (replay, case.saved.params)):
            compiled = jax.jit(function).lower(tree, case.inputs[:count]).compile()
            runs.append(_blocking(compiled, tree, jax.device_put(case.inputs[:count])))
        found.append(time_ratio(*runs, pairs=40 if count == 1 else 12))
    return [[*case.label, *found]]


def _blocking(program: Any, tree: Any, x: Any) -> Any:
    return lambda: jax.block_until_ready(program(tree, x))


def lifted(case: Case) -> tuple[Any, Any]:
    """The program in integers and its tree."""
    params, quantizers = case.saved.params, case.saved.quantizers
    graph = jm.trace(case.apply, params, case.example)
    return jm.lift(case.apply, quantizers), jm.quantize(params, graph, quantizers)


def stored(case: Case, integers: Any) -> list[Path]:
    """The artefact of StableHLO, and the tree with its quantizers."""
    quantizers = case.saved.quantizers
    artefact, tree = case.folder / "model.jax", case.folder / "integers.npz"
    model = (case.apply, integers, quantizers, case.example)
    jm.export.stablehlo(artefact, *model, overwrite=True)
    jm.save(tree, params=integers, quantizers=quantizers, compress=True)
    return [artefact, tree]
