"""Writes docs/works-on.md: what jaxmet finds in every model of the tests' zoo.

python docs/works_on.py
"""

import sys
from collections import Counter
from pathlib import Path

import jax

import jaxmet as jm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

HEAD = """# What works on what

Written by `python docs/works_on.py` from the models that the tests run (`tests/zoo.py`). For
every model and front-end below the replay runs the model's own equations, and its outputs are
bit-identical to the model's under `jax.jit` ([how equal](model.md#run-the-equations-with-a-hook)),
and the nodes found equal a list written by hand.

*layers*: products and lookups with a parameter. *norms*: those whose statistics are stored, so
that they can be folded, and others. *channel groups*: those that `equalize` may rescale, of
all; a group stays alone where something on its way is not homogeneous, or is an input or
output of the model. *quantizers*: activations that `calibrate` puts on a grid by default, and
values that stay in float.

| model | front-ends | layers | norms | channel groups | quantizers |
|---|---|---|---|---|---|
"""


OUTSIDE = """
## Models from outside

What `python benchmarks/outside.py --together --cells layers,norms,fold,W8A8,trace` printed of
public models, at small widths, with random weights and batch norm statistics of data (jax 0.10.2,
CPU, 16 examples that nothing was fitted to). *layers*: found, of those in an independent count of
the jaxpr. *norms*: batch norms folded, of those in the model. *fold*: how far folding keeps the
function (dB). *W8A8*: SQNR of the simulated outputs (dB), at the defaults, folded, without any
correction. *trace*: seconds.

"""
TABLE = HERE.parent / "benchmarks" / "outside" / "table.md"


def page() -> str:
    from zoo import CASES

    rows = []
    for case in CASES.values():
        apply, params, inputs = next(iter(case.make.values()))(jax.random.key(0))
        graph = jm.trace(apply, params, *inputs)
        plan = jm.plan(params, graph)
        kinds = Counter(plan["kind"])
        over = Counter(n.norm.over for n in graph.nodes if n.norm is not None)
        norms = ", ".join(f"{n} {what}" for what, n in sorted(over.items())) or "–"
        free = [g for g in graph.groups if g.free]
        floats = sum(str(name).startswith("input of ") for name in plan["name"])
        grids = str(kinds["activation"]) + (f", {floats} in float" if floats else "")
        cells = (
            case.name.replace("_", " "),
            ", ".join(case.frontends),
            str(len(graph.layers)),
            norms,
            f"{len(free)} of {len(graph.groups)}",
            grids,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(rows) + "\n" + OUTSIDE + TABLE.read_text(encoding="utf-8")


if __name__ == "__main__":
    (HERE / "works-on.md").write_text(page(), encoding="utf-8")
