"""What training after quantization wins back, and what a step of it costs.

    apt-get install dataset-fashion-mnist
    pip install '.[benchmarks]'
    python benchmarks/qat.py                              # accuracy
    python benchmarks/qat.py --methods jaxmet qwix --configs W8A8 W4A8 W4A4 W3A3 W2A4
    python benchmarks/qat.py --speed                      # time and memory of a step

Accuracy is that of the demo's network on the 10,000 test images of Fashion-MNIST. *PTQ* is
`jm.ptq` on 512 training images, with ranges of least squared error for activations below 8
bits. The other columns go on from its result for `--steps` batches of 128 training images, with
Adam and a rate that falls to nothing: *QAT* trains weights, *learned ranges* scales and zero
points beside them, in steps relative to their size. The loss is the cross entropy with what
the float network says of the images, so no label is needed; with `--labels` it is that with the
labels, smoothed as when the network was trained, on images moved and flipped. *Float* is the
folded network, and what the same steps make of it, with the labels and without. Seeds draw the
batches. Rates were chosen with `--validate`, on 5,000 training images held out of the steps,
none on test images. `--ends 8` gives the first and the last layer, the picture and the logits 8
bits, as most published figures of few bits do.

*qwix* trains the same folded linen model, bits, batches and steps by `QtProvider`: weights one
scale per channel, activations one scale per example, found at each step (its defaults), and is
evaluated by the same provider. It wants an environment of its own with `pip install qwix`.

A step's time is that of gradients with respect to weights and ranges, against the same of the
float network in the same run: the faster of the plain model and its idle replay.
"""

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fashion import BATCH, Fashion, Tree
from train_demo import DATA, as_input

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network

WIDTHS = {
    "W8A8": (8, 8),
    "W4A8": (4, 8),
    "W4A4": (4, 4),
    "W3A3": (3, 3),
    "W2A4": (2, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of idx.gz")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--configs", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--methods", nargs="+", default=["jaxmet"])
    parser.add_argument("--rate", type=float, default=1e-3, help="of the weights")
    parser.add_argument("--range-rate", type=float, default=1e-3)
    parser.add_argument("--ends", type=int, help="bits of the first and last layer")
    parser.add_argument("--labels", action="store_true", help="learn from labels")
    parser.add_argument("--validate", action="store_true", help="hold 5,000 out")
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    names = ["jax", "jaxlib", "flax", "optax"]
    names += ["qwix"] if "qwix" in options.methods else []
    print(f"python {platform.python_version()}, {jax.devices()[0].device_kind},")
    print(", ".join(f"{n} {version(n)}" for n in names), "\n", flush=True)
    if options.speed:
        speed()
        return
    Bench(options).table()


class Bench:
    """The data, the folded network and its trainers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data = Fashion(options.data, validate=options.validate)
        self.network = Network()
        variables = data.weights()
        first = as_input(self.data.train[0][:1])
        graph = jm.trace(self.network.apply, variables, first)
        self.folded = jm.fold_batch_norm(variables, graph)
        self.graph = jm.trace(self.network.apply, self.folded, first)
        # The model by its replay, whose depthwise convolutions train faster on CPU.
        replay = jm.evaluate(self.network.apply, _idle)
        self.forward = lambda params, x: replay(params, x)[0]
        self.taught = self.data.told_by(self.forward, self.folded)
        self.calibration = jm.batched(data.load()[0], batch_size=BATCH)

    def table(self) -> None:
        """Each cell a mean and a standard deviation over seeds, in percent."""
        right = self.data.accuracy(jax.jit(self.network.apply), self.folded)
        print(f"float: {100 * right:.2f} %; {self.options.steps} steps of {BATCH}")
        run, kinds = jax.jit(self.forward), jm.optimizer_labels(self.folded, self.graph)
        for labels in (False, True) if self.has("jaxmet") else ():
            fit = self.trainer(self.forward, kinds, labels)
            on = [
                self.data.accuracy(run, fit(self.folded, s)) for s in self.options.seeds
            ]
            kind = "labels" if labels else "its own outputs"
            print(f"float, trained on with {kind}: {cell(on)} %", flush=True)
        columns = ["PTQ", "QAT", "learned ranges"] if self.has("jaxmet") else []
        if self.has("qwix"):
            columns += ["qwix QAT", "qwix QAT, depthwise in float"]
        print("\n| bits |", " | ".join(columns), "| seconds a run |")
        print("|" + "---|" * (len(columns) + 2))
        for name in self.options.configs:
            start, cells, runs = time.perf_counter(), [], 0
            if self.has("jaxmet"):
                found = self.quantized(name)
                cells += [cell(column) for column in zip(*found, strict=True)]
                runs += 2 * len(found)
            if self.has("qwix"):
                cells += [self.qwix(name, rest) for rest in (None, ".*depthwise.*")]
                runs += len(self.options.seeds)
            spent = (time.perf_counter() - start) / max(runs, 1)
            print("|", " | ".join([name, *cells, f"{spent:.0f}"]), "|", flush=True)

    def has(self, method: str) -> bool:
        return method in self.options.methods

    def trainer(
        self, forward: Callable, labels: Tree, by_labels: bool | None = None
    ) -> Callable[[Tree, int], Tree]:
        """What the steps make of a tree, compiled once."""
        by_labels = self.options.labels if by_labels is None else by_labels
        falling = partial(optax.cosine_decay_schedule, decay_steps=self.options.steps)
        each: dict[Any, Any] = {
            "weights": optax.adam(falling(self.options.rate)),
            # Steps relative to each range: scales of 4 and of 16 bits differ a thousandfold.
            "ranges": optax.lamb(falling(self.options.range_rate)),
        }
        each |= dict.fromkeys(("statistics", "bounds"), optax.set_to_zero())
        return self.data.trainer(
            forward,
            optax.multi_transform(each, labels),
            self.data.smoothed() if by_labels else self.taught,
            self.options.steps,
            moved=by_labels,
        )

    def quantized(self, name: str) -> list[tuple[float, ...]]:
        """For each seed: after PTQ, after training weights, and weights with ranges."""
        weight_bits, activation_bits = WIDTHS[name]
        # Few levels: clip what is rare rather than round everything coarsely.
        ranges = "minmax" if activation_bits >= 8 else "mse"
        config = jm.QuantConfig(
            weight_bits,
            activation_bits,
            activation_range=ranges,
            rules=ends(self.options.ends),
        )
        apply = self.network.apply

        def forward(pair: Tree, x: jax.Array) -> jax.Array:
            params, quantizers = pair
            return jm.simulate(apply, quantizers)(params, x)

        run, fits, found = jax.jit(forward), {}, []
        for seed in self.options.seeds:
            params, quantizers, _ = jm.ptq(
                apply,
                self.folded,
                self.calibration,
                config,
                key=jax.random.key(seed),
                progress=False,
            )
            quantizers = quantizers.pin(params)
            right = [self.data.accuracy(run, (params, quantizers))]
            for learn in (None, "lsq"):
                start = (params, quantizers.set("*", learn=learn))
                if learn not in fits:
                    labels = jm.optimizer_labels(params, self.graph, start[1])
                    fits[learn] = self.trainer(forward, labels)
                right.append(self.data.accuracy(run, fits[learn](start, seed)))
            found.append(tuple(right))
        return found

    def qwix(self, name: str, left: str | None) -> str:
        """The same by qwix, with the modules `left` in float, or what it says instead."""
        import qwix  # pyright: ignore[reportMissingImports]

        weight_bits, activation_bits = WIDTHS[name]
        rules = [] if left is None else [qwix.QtRule(module_path=left)]
        types = f"int{weight_bits}", f"int{activation_bits}"
        rules.append(
            qwix.QtRule(module_path=".*", weight_qtype=types[0], act_qtype=types[1])
        )
        model = qwix.quantize_model(self.network, qwix.QtProvider(rules))

        def forward(params: Tree, x: jax.Array) -> jax.Array:
            return model.apply(params, x)

        labels = jm.optimizer_labels(self.folded, self.graph)
        fit, run = self.trainer(forward, labels), jax.jit(forward)
        try:
            return cell(
                [
                    self.data.accuracy(run, fit(self.folded, s))
                    for s in self.options.seeds
                ]
            )
        except Exception as error:  # which it refuses is part of the table
            return f"refused: {type(error).__name__}"


def ends(bits: int | None) -> tuple[jm.Rule, ...]:
    """The first and the last layer, what they read and the logits, at other widths."""
    if bits is None:
        return ()
    layers = [jm.Rule(f"{n}/kernel", weight_bits=bits) for n in ("stem", "classifier")]
    values = ("input", "head/pool", "classifier")
    return (*layers, *(jm.Rule(n, activation_bits=bits) for n in values))


def _idle(node: Any, run: Callable, operands: tuple) -> tuple[Any, None]:
    del node
    return run(*operands), None


def cell(values: Any) -> str:
    values = 100 * np.asarray(values)
    return f"{values.mean():.2f} ± {values.std(ddof=min(1, len(values) - 1)):.2f}"


def speed() -> None:
    """Step time and memory of both networks, weights alone and with ranges."""
    from lite.network import FAMILY, LinenLite
    from speed import least, markdown, memory

    lite = LinenLite(FAMILY["lite0"])
    for name, model, shape in (
        ("demo", Network(), (BATCH, 28, 28, 1)),
        ("EfficientNet-Lite0", lite, (32, 224, 224, 3)),
    ):
        x = jax.random.normal(jax.random.key(0), shape)
        drawn = jax.jit(model.init)(jax.random.key(1), x[:1])
        graph = jm.trace(model.apply, drawn, x[:1])
        params = jm.fold_batch_norm(drawn, graph)
        quantizers = jm.calibrate(params, graph, [x], progress=False).pin(params)
        print(f"{markdown(steps(name, graph, params, quantizers, x, least, memory))}\n")


def steps(
    name: str,
    graph: jm.Graph,
    params: Tree,
    quantizers: jm.Quantizers,
    x: jax.Array,
    least: Callable,
    memory: Callable,
) -> list[dict[str, Any]]:
    replay = jm.evaluate(graph.apply, _idle)
    forwards: dict[str, tuple[Callable, tuple[int, ...]]] = {
        "float, plain": (lambda p, q: graph.apply(p, x), (0,)),
        "float, idle replay": (lambda p, q: replay(p, x)[0], (0,)),
        "simulated, weights": (lambda p, q: jm.simulate(graph.apply, q)(p, x), (0,)),
        "simulated, weights and ranges": (
            lambda p, q: jm.simulate(graph.apply, q)(p, x),
            (0, 1),
        ),
    }
    labels = jnp.arange(len(x)) % 10
    ways, compiling, peak = {}, {}, {}
    for way, (forward, trained) in forwards.items():

        def loss(p: Tree, q: Tree, forward: Callable = forward) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(
                forward(p, q), labels
            )
            return jnp.mean(losses)

        lowered = jax.jit(jax.grad(loss, argnums=trained)).lower(params, quantizers)
        start = time.perf_counter()
        compiled = lowered.compile()
        compiling[way], peak[way] = time.perf_counter() - start, memory(compiled)
        ways[way] = lambda c=compiled: c(params, quantizers)
    seconds = least(ways, 5)
    base = min(list(ways)[:2], key=seconds.__getitem__)
    return [
        {
            f"{name}, batch {len(x)}": way,
            "seconds": seconds[way],
            "time / float": seconds[way] / seconds[base],
            "memory / float": peak[way] / peak[base],
            "compile (s)": compiling[way],
        }
        for way in ways
    ]


if __name__ == "__main__":
    main()
