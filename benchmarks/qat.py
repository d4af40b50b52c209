"""What training behind quantization wins back, and what a step of it costs.

    apt-get install dataset-fashion-mnist
    pip install '.[benchmarks]'
    python benchmarks/qat.py                              # accuracy
    python benchmarks/qat.py --methods jaxmet qwix --configs W8A8 W4A8 W4A4 W3A3 W2A4
    python benchmarks/qat.py --speed                      # time and memory of a step

Accuracy is that of the demo's network on the 10,000 test images of Fashion-MNIST. *PTQ* is
`jm.ptq` on 512 training images. The other columns go on from its result for `--steps` batches
of 128 training images, with Adam and a rate that falls to nothing: *QAT* trains weights,
*learned ranges* scales and zero points beside them, in steps relative to their size. *Float* is
the folded network, and what the same steps make of it. Seeds draw the batches. Rates were
chosen with `--validate`, on 5,000 training images held out of the steps, none on test images.

*qwix* trains the same folded linen model, bits, batches and steps by `QtProvider`: weights a
scale a channel, activations a scale an example, found at each step (its defaults), and is
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
from train_demo import DATA, VALIDATION, as_input, augment, read_idx

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network

BATCH = 128
WIDTHS = {
    "W8A8": (8, 8),
    "W4A8": (4, 8),
    "W4A4": (4, 4),
    "W3A3": (3, 3),
    "W2A4": (2, 4),
}
Tree = Any


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
        self.options, folder = options, options.data
        images = read_idx(folder / "train-images-idx3-ubyte.gz")
        labels = read_idx(folder / "train-labels-idx1-ubyte.gz")
        order = np.random.default_rng(0).permutation(len(images))  # as in train_demo
        if options.validate:
            held, order = order[:VALIDATION], order[VALIDATION:]
            self.test = images[held], labels[held]
        else:
            test = read_idx(folder / "t10k-images-idx3-ubyte.gz")
            self.test = test, read_idx(folder / "t10k-labels-idx1-ubyte.gz")
        self.train = images[order], labels[order]
        self.network = Network()
        variables = data.weights()
        graph = jm.trace(self.network.apply, variables, as_input(images[:1]))
        self.folded = jm.fold_batch_norm(variables, graph)
        self.calibration = jm.stacked(data.load()[0], batch_size=BATCH)

    def table(self) -> None:
        """Each cell a mean and a standard deviation over seeds, in percent."""
        right = self.accuracy(jax.jit(self.network.apply), self.folded)
        print(f"float: {100 * right:.2f} %; {self.options.steps} steps of {BATCH}")
        on = [self.more_float(seed) for seed in self.options.seeds]
        print(f"float, trained on: {cell(on)} %\n", flush=True)
        columns = ["PTQ", "QAT", "learned ranges"] if self.has("jaxmet") else []
        columns += ["qwix QAT"] if self.has("qwix") else []
        print("| bits |", " | ".join(columns), "| seconds a run |")
        print("|" + "---|" * (len(columns) + 2))
        for name in self.options.configs:
            start, cells, runs = time.perf_counter(), [], 0
            if self.has("jaxmet"):
                found = [self.quantized(name, seed) for seed in self.options.seeds]
                cells += [cell(column) for column in zip(*found, strict=True)]
                runs += 2 * len(found)
            if self.has("qwix"):
                try:
                    cells.append(cell([self.qwix(name, s) for s in self.options.seeds]))
                except Exception as error:  # which it refuses is part of the table
                    cells.append(f"refused: {type(error).__name__}: {str(error)[:80]}")
                runs += len(self.options.seeds)
            spent = (time.perf_counter() - start) / max(runs, 1)
            print("|", " | ".join([name, *cells, f"{spent:.0f}"]), "|", flush=True)

    def has(self, method: str) -> bool:
        return method in self.options.methods

    def accuracy(self, predict: Callable[..., jax.Array], *trees: Tree) -> float:
        images, labels = self.test
        right = 0
        for i in range(0, len(images), 500):
            found = predict(*trees, as_input(images[i : i + 500]))
            right += int(np.sum(np.argmax(found, -1) == labels[i : i + 500]))
        return right / len(images)

    def fit(self, forward: Callable, trained: Tree, labels: Tree, seed: int) -> Tree:
        """What the steps make of `trained`; `forward(trained, x)` gives logits."""
        count = self.options.steps
        falling = partial(optax.cosine_decay_schedule, decay_steps=count)
        each: dict[Any, Any] = {
            "weights": optax.adam(falling(self.options.rate)),
            # Steps relative to each range: scales of 4 and of 16 bits differ a thousandfold.
            "ranges": optax.lamb(falling(self.options.range_rate)),
        }
        each |= dict.fromkeys(("statistics", "bounds"), optax.set_to_zero())
        optimizer = optax.multi_transform(each, labels)

        def loss(trained: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
            targets = optax.smooth_labels(
                jax.nn.one_hot(y, 10), 0.1
            )  # as in train_demo
            return jnp.mean(optax.softmax_cross_entropy(forward(trained, x), targets))

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(
            trained: Tree, state: Any, key: jax.Array, x: jax.Array, y: jax.Array
        ) -> tuple[Tree, Any]:
            grads = jax.grad(loss)(trained, augment(key, x), y)
            updates, state = optimizer.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state

        images, truth = self.train
        rng, key = np.random.default_rng(seed), jax.random.key(seed)
        trained = jax.tree.map(jnp.array, trained)  # donated
        state = optimizer.init(trained)
        for i in range(count):
            chosen = rng.choice(len(images), BATCH, replace=False)
            x, y = as_input(images[chosen]), jnp.asarray(truth[chosen], jnp.int32)
            trained, state = step(trained, state, jax.random.fold_in(key, i), x, y)
        return trained

    def more_float(self, seed: int) -> float:
        graph = self.graph(self.folded)
        labels = jm.optimizer_labels(self.folded, graph)
        params = self.fit(graph.apply, self.folded, labels, seed)
        return self.accuracy(jax.jit(graph.apply), params)

    def graph(self, params: Tree) -> jm.Graph:
        return jm.trace(self.network.apply, params, as_input(self.test[0][:1]))

    def quantized(self, name: str, seed: int) -> tuple[float, ...]:
        """After training, with weights alone and with ranges."""
        weight_bits, activation_bits = WIDTHS[name]
        config = jm.QuantConfig(weight_bits, activation_bits)
        params, quantizers, _ = jm.ptq(
            self.network.apply,
            self.folded,
            self.calibration,
            config,
            key=jax.random.key(seed),
            progress=False,
        )
        quantizers = quantizers.pin(params)
        apply = self.network.apply

        def predict(quantizers: Tree, params: Tree, x: jax.Array) -> jax.Array:
            return jm.simulate(apply, quantizers)(params, x)

        run = jax.jit(predict)
        found = [self.accuracy(run, quantizers, params)]
        graph = self.graph(self.folded)
        for learn in (None, "lsq"):
            start = quantizers.set("*", learn=learn)
            labels = jm.optimizer_labels(params, graph, start)
            pair = self.fit(
                lambda pair, x: predict(pair[1], pair[0], x),
                (params, start),
                labels,
                seed,
            )
            found.append(self.accuracy(run, pair[1], pair[0]))
        return tuple(found)

    def qwix(self, name: str, seed: int) -> float:
        """The same by qwix; what it raises is shown."""
        import qwix  # pyright: ignore[reportMissingImports]

        weight_bits, activation_bits = WIDTHS[name]
        rule = qwix.QtRule(
            weight_qtype=f"int{weight_bits}", act_qtype=f"int{activation_bits}"
        )
        model = qwix.quantize_model(self.network, qwix.QtProvider([rule]))
        graph = self.graph(self.folded)
        labels = jm.optimizer_labels(self.folded, graph)

        def forward(params: Tree, x: jax.Array) -> jax.Array:
            return model.apply(params, x)

        params = self.fit(forward, self.folded, labels, seed)
        return self.accuracy(jax.jit(forward), params)


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
    replay = jm.evaluate(
        graph.apply, lambda node, run, operands: (run(*operands), None)
    )
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
