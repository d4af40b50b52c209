"""The battery: what is asked of every model, a cell each.

A cell is a verdict ('right', 'wrong', 'n/a', 'raised' or 'blocked', where what it needs was
not to be had), a short value for the table and a note for the list below it.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmet as jm
from outside.count import counted
from outside.model import Built, Model

BATCH = 16
# So many batches to learn from, to calibrate on and to compare two trees on.
BATCHES, RANGES, MORE = 8, 64, 16
W16 = jm.QuantConfig(weight_bits=16, activation_bits=16)
W4 = jm.QuantConfig(weight_bits=4, activation_bits=32)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one check of one model gave."""

    verdict: str
    value: str = ""
    note: str = ""


class Absent(Exception):
    """A check that has no meaning for a model, and why."""


def right(passed: bool, value: str, note: str = "") -> Cell:
    """A verdict on a value."""
    return Cell("right" if passed else "wrong", value, "" if passed else note)


def sqnr(exact: Any, other: Any) -> float:
    """Signal to error in dB, of the worst floating-point output."""
    least = np.inf
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error, energy = np.sum((a - b) ** 2), np.sum(a**2)
        if not np.isfinite(error):
            return float("nan")
        if error > 0:
            least = min(least, 10 * np.log10(energy / error) if energy > 0 else -np.inf)
    return float(least)


class Subject:
    """A model with its data and all that one check makes for another, each made once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        root = jax.random.key(0)
        made, self.calibration, self.evaluation = jax.random.split(root, 3)
        self.built: Built = model.make(made)
        self.apply, self.params = self.built.apply, self.built.params
        self.run = jax.jit(self.apply)

    @functools.cached_property
    def many(self) -> list[tuple[Any, ...]]:
        """What ranges are calibrated on: enough that little else lies outside."""
        if self.built.whole:
            every = jax.random.split(self.calibration, RANGES)
            return [self.built.inputs(k, BATCH) for k in every]
        rows = self.built.inputs(self.calibration, RANGES * BATCH)
        return list(jm.batched(rows, batch_size=BATCH))

    @property
    def data(self) -> list[tuple[Any, ...]]:
        """What slower methods learn from."""
        return self.many[:BATCHES]

    @functools.cached_property
    def other(self) -> tuple[Any, ...]:
        """What everything is measured on."""
        return self.built.inputs(self.evaluation, BATCH)

    @functools.cached_property
    def exact(self) -> Any:
        return self.run(self.params, *self.other)

    @functools.cached_property
    def more(self) -> list[tuple[Any, ...]]:
        """What two trees that differ little are compared on."""
        if self.built.whole:
            return [self.other]
        keys = jax.random.split(self.evaluation, MORE)
        return [self.built.inputs(k, BATCH) for k in keys]

    @property
    def few(self) -> tuple[Any, ...]:
        """The least that is worth tracing with."""
        return (
            self.other
            if self.built.whole
            else jax.tree.map(lambda x: x[:2], self.other)
        )

    @property
    def one(self) -> tuple[Any, ...]:
        if self.built.whole:
            raise Absent("one batch is one example")
        return jax.tree.map(lambda x: x[:1], self.other)

    @functools.cached_property
    def traced(self) -> tuple[jm.Graph, float]:
        start = time.perf_counter()
        graph = jm.trace(self.apply, self.params, *self.few)
        return graph, time.perf_counter() - start

    @property
    def graph(self) -> jm.Graph:
        return self.traced[0]

    @functools.cached_property
    def folded(self) -> Any:
        return jm.fold_batch_norm(self.params, self.graph, with_report=True)

    @functools.cached_property
    def quantizers(self) -> jm.Quantizers:
        return jm.calibrate(self.folded[0], self.graph, self.many, progress=False)

    def simulated(self, params: Any, quantizers: jm.Quantizers) -> float:
        """SQNR of the simulated model on inputs that calibration has not read."""
        outputs = jax.jit(jm.simulate(self.apply, quantizers))(params, *self.other)
        return sqnr(self.exact, outputs)

    def compared(self, params: Any, quantizers: jm.Quantizers) -> float:
        """The same on more inputs."""
        run = jax.jit(jm.simulate(self.apply, quantizers))
        pairs = [(self.run(self.params, *x), run(params, *x)) for x in self.more]
        exact, found = (
            jax.tree.map(lambda *y: np.stack(y), *of) for of in zip(*pairs, strict=True)
        )
        return sqnr(exact, found)

    @functools.cached_property
    def w8a8(self) -> float:
        return self.simulated(self.folded[0], self.quantizers)

    def macs(self, params: Any) -> int:
        return counted(jm.lift(self.apply), params, *self.one).macs

    def multiplications(self, params: Any) -> int:
        """What `jm.cost` says that one example takes, with the tree's own graph."""
        graph = jm.trace(self.apply, params, *self.few)
        return jm.cost(params, graph, *self.one)["macs"][-1]


# Cells


def layers(s: Subject) -> Cell:
    wanted = counted(s.apply, s.params, *s.few).layers
    found = s.graph.layers
    missing = f"{len(found)} of {len(wanted)}: {', '.join(wanted)}; found: "
    note = missing + ", ".join(n.name for n in found)
    return right(len(found) == len(wanted), f"{len(found)}/{len(wanted)}", note)


def norms(s: Subject) -> Cell:
    if not s.built.norms:
        raise Absent("no batch norm")
    possible = s.built.norms - s.model.unfoldable
    table = s.folded[1]
    done = [row for row in table if row["into"] is not None]
    why = {f"{r['norm']}: {r['note']}" for r in table if r["into"] is None}
    note = f"{len(table)} found; {'; '.join(sorted(why))}" + f"; {s.model.why}" * bool(
        s.model.why
    )
    return right(len(done) == possible, f"{len(done)}/{s.built.norms}", note)


def fold(s: Subject) -> Cell:
    if not s.built.norms:
        raise Absent("no batch norm")
    return _kept(s, s.run(s.folded[0], *s.other))


def equalize(s: Subject) -> Cell:
    params, report = jm.equalize(
        s.folded[0], s.graph, batches=s.data, progress=False, with_report=True
    )
    if params is s.folded[0]:
        raise Absent("nothing can be rescaled")
    return _kept(s, jax.jit(jm.lift(s.apply))(params, *s.other))


def _kept(s: Subject, outputs: Any, least: float = 100) -> Cell:
    kept = sqnr(s.exact, outputs)
    return right(kept >= least, f"{kept:.0f}", f"{kept:.1f} dB kept")


def replay(s: Subject) -> Cell:
    return _kept(s, jax.jit(jm.lift(s.apply))(s.params, *s.other), 120)


def single(s: Subject) -> Cell:
    names = [n.name for n in jm.trace(s.apply, s.params, *s.one).layers]
    more = [n.name for n in s.graph.layers]
    lost = sorted({*more} ^ {*names})
    return right(not lost, f"{len(names)}/{len(more)}", f"other layers: {lost}")


def w8a8(s: Subject) -> Cell:
    return right(s.w8a8 >= 15, f"{s.w8a8:.1f}", f"{s.w8a8:.1f} dB")


def w16a16(s: Subject) -> Cell:
    quantizers = jm.calibrate(s.folded[0], s.graph, s.many, W16, progress=False)
    found = s.simulated(s.folded[0], quantizers)
    note = f"{found:.1f} dB"
    if not found >= 45:  # does it round badly, or do other inputs leave the ranges?
        inputs = s.many[0]
        known = jax.jit(jm.simulate(s.apply, quantizers))(s.folded[0], *inputs)
        note += f"; {sqnr(s.run(s.params, *inputs), known):.1f} dB on what it was calibrated on"
    return right(found >= 45, f"{found:.1f}", note)


def correct(s: Subject) -> Cell:
    params = jm.correct_bias(s.folded[0], s.graph, s.quantizers, s.data, progress=False)
    before = s.compared(s.folded[0], s.quantizers)
    found = s.compared(params, s.quantizers)
    note = f"{before:.1f} dB before, {found:.1f} dB after"
    return right(found >= before - 0.5, f"{found - before:+.1f}", note)


def adaround(s: Subject) -> Cell:
    params, quantizers = (
        s.folded[0],
        jm.calibrate(s.folded[0], s.graph, s.many, W4, progress=False),
    )
    nearest = s.compared(params, quantizers)
    rounded, chosen = jm.adaround(
        params, s.graph, quantizers, s.data, key=jax.random.key(0), progress=False
    )
    found = s.compared(rounded, chosen)
    note = f"nearest {nearest:.1f} dB, adaround {found:.1f} dB"
    return right(found >= nearest - 0.1, f"{found - nearest:+.1f}", note)


def full_rank(s: Subject) -> Cell:
    _, table = jm.factorize(
        s.params, s.graph, ratios=0.5, with_report=True, progress=False
    )
    ranks = {r["layer"]: r["of"] for r in table if r["of"] is not None}
    if not ranks:
        raise Absent("no layer can be factorized")
    params = jm.factorize(s.params, s.graph, ranks=ranks, progress=False)
    return _kept(s, jax.jit(jm.lift(s.apply))(params, *s.other), 90)


def rank(s: Subject) -> Cell:
    params, table = jm.factorize(
        s.params, s.graph, ratios=0.5, batches=s.data, with_report=True, progress=False
    )
    cut = {r["layer"] for r in table if r["rank"] is not None}
    if not cut:
        raise Absent("no layer can be factorized")
    cost = jm.cost(s.params, s.graph, *s.one)
    before = sum(r["macs"] for r in cost if r["layer"] in cut)
    share = (before + s.macs(params) - s.macs(s.params)) / before
    outputs = jax.jit(jm.lift(s.apply))(params, *s.other)
    note = f"{len(cut)} layers cost {share:.3f} of what they did"
    return right(share <= 0.55 and _finite(outputs), f"{share:.2f}", note)


def prune(s: Subject) -> Cell:
    params, table = jm.prune(
        s.folded[0], s.graph, 0.6, batches=s.data, with_report=True, progress=False
    )
    if not len(jm.widths(params)):
        why = sorted({str(row["note"]) for row in table})
        raise Absent(f"no channel can be removed: {'; '.join(why)}")
    small = jax.jit(jm.lift(s.apply))(params, *s.other)
    dense = s.run(jm.densify(params), *s.other)
    same, share = sqnr(dense, small), s.macs(params) / s.macs(s.params)
    note = f"{same:.1f} dB between pruned and zeroed, {share:.3f} of the cost"
    return right(same >= 100 and share < 1, f"{share:.2f}", note)


def cost(s: Subject) -> Cell:
    found = jm.cost(s.params, s.graph, *s.one)["macs"][-1]
    wanted = s.macs(s.params)
    return right(found == wanted, f"{found / wanted:.3f}", f"{found} of {wanted}")


def noise(s: Subject) -> Cell:
    table = jm.noise(
        s.folded[0], s.graph, s.quantizers, s.data, examples=16, progress=False
    )
    # Where a gate is closed, what it closes makes no noise: ∞ dB.
    bad = [r["tensor"] for r in table if not r["SQNR (dB)"] > -np.inf]
    total = table["SQNR (dB)"][-1]
    return right(not bad, f"{total:.1f}", f"not finite: {bad[:3]}")


def compare(s: Subject) -> Cell:
    table = jm.compare(s.folded[0], s.graph, s.quantizers, s.other)
    column = [v for v in table["SQNR (dB)"] if v is not None]
    bad = sum(bool(np.isnan(v)) for v in column)
    return right(
        not bad and bool(column), f"{len(column)}", f"{bad} of {len(column)} NaN"
    )


def gradients(s: Subject) -> Cell:
    def loss(params: Any, quantizers: Any) -> Any:
        outputs = jm.simulate(s.apply, quantizers)(params, *s.few)
        return sum(jnp.mean(jnp.square(y)) for y in jax.tree.leaves(outputs))

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))
    found = jax.tree.leaves(grad(s.folded[0], s.quantizers))
    floats = [g for g in found if jnp.issubdtype(g.dtype, jnp.floating)]
    bad = sum(not np.all(np.isfinite(np.asarray(g))) for g in floats)
    some = sum(bool(np.any(np.asarray(g))) for g in floats)
    note = f"{bad} of {len(floats)} leaves not finite, {some} not zero"
    return right(not bad and some > 0, f"{some}/{len(floats)}", note)


def condition(s: Subject) -> Cell:
    """What is left of the outputs when the float model's own weights move by 0.1 %, 60 dB."""
    leaves, tree = jax.tree.flatten(s.params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        x * (1 + 1e-3 * jax.random.normal(k, x.shape, x.dtype))
        if jnp.ndim(x) > 1 and jnp.issubdtype(x.dtype, jnp.floating)
        else x
        for x, k in zip(leaves, keys, strict=True)
    ]
    found = sqnr(s.exact, s.run(tree.unflatten(moved), *s.other))
    return right(True, f"{found:.1f}", f"{found:.1f} dB")


def trace(s: Subject) -> Cell:
    seconds = s.traced[1]
    return right(seconds < 3, f"{seconds:.2f}", f"{seconds:.2f} s")


def _finite(outputs: Any) -> bool:
    return all(np.all(np.isfinite(np.asarray(y))) for y in jax.tree.leaves(outputs))


CELLS: dict[str, Callable[[Subject], Cell]] = {
    "layers": layers,
    "norms": norms,
    "fold": fold,
    "equalize": equalize,
    "replay": replay,
    "batch of 1": single,
    "W8A8": w8a8,
    "W16A16": w16a16,
    "correct": correct,
    "adaround": adaround,
    "full rank": full_rank,
    "rank": rank,
    "prune": prune,
    "cost": cost,
    "noise": noise,
    "compare": compare,
    "gradients": gradients,
    "condition": condition,
    "trace": trace,
}


def battery(model: Model, cells: list[str], told: Callable[[str, Cell], None]) -> None:
    """Run the cells over a model and tell each as it comes.

    What raises in a step that others need is told once; the others are blocked.
    """
    met: dict[str, str] = {}
    subject = Subject(model)
    for name in cells:
        try:
            cell = CELLS[name](subject)
        except Absent as error:
            cell = Cell("n/a", "–", str(error))
        except Exception as error:  # whatever it is, the table has to show it
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            cell = Cell("raised", "raised", text)
            if text in met:
                cell = Cell("blocked", "blocked", f"as {met[text]}")
            met.setdefault(text, name)
        told(name, dataclasses.replace(cell, note=cell.note[:1000]))
