"""What does running a model through jaxmet's replay cost?

Compares the demo's network with the same network replayed under a hook that does nothing:
floating-point operations as XLA counts them, time to trace and lower, time to run. Times are
the least of several, warm, ratios from one process; compile time is apart.

    python benchmarks/replay.py [--batch 64] [--repeat 7]
"""

import argparse
import time
from collections.abc import Callable

import jax

import jaxmet as jm
from jaxmet.demo.network import Network


def idle(node, run, operands):
    del node
    return run(*operands), None


def least(action: Callable[[], object], repeat: int) -> float:
    """The shortest of `repeat` runs in seconds, after one that does not count."""
    jax.block_until_ready(action())
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(action())
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()

    model = Network()
    images = jax.random.normal(jax.random.key(0), (options.batch, 28, 28, 1))
    params = model.init(jax.random.key(1), images)
    ways = {
        "plain": model.apply,
        "replay": lambda *a: jm.evaluate(model.apply, idle, cpu_formulations=False)(*a)[
            0
        ],
        "replay, CPU formulation": lambda *a: jm.evaluate(model.apply, idle)(*a)[0],
    }
    rows = []
    for name, apply in ways.items():

        def lower(apply=apply):
            jax.clear_caches()
            return jax.jit(lambda p, x: apply(p, x)).lower(params, images)

        lowering = least(lambda: lower() and None, options.repeat)
        lowered = lower()
        start = time.perf_counter()
        compiled = lowered.compile()
        compiling = time.perf_counter() - start
        running = least(lambda: compiled(params, images), options.repeat)
        flops = compiled.cost_analysis()["flops"]
        rows.append((name, flops, lowering, compiling, running))
    plain = rows[0]
    print(
        jm.Table(
            {
                "way": [r[0] for r in rows],
                "operations": [r[1] / plain[1] for r in rows],
                "trace + lower": [r[2] / plain[2] for r in rows],
                "compile": [r[3] / plain[3] for r in rows],
                "run": [r[4] / plain[4] for r in rows],
            },
            title=f"ratios to plain, batch {options.batch}, jax {jax.__version__}, "
            f"{jax.devices()[0].device_kind}",
        )
    )
    print(f"plain: lower {plain[2]:.3f} s, run {plain[4]:.4f} s")


if __name__ == "__main__":
    main()
