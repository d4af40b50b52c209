"""Files in other runtimes against the simulation: values, sizes, times and accuracy.

    pip install '.[benchmarks,onnx]' openvino
    apt-get install dataset-fashion-mnist              # scenes of the segmentation network
    python benchmarks/parity.py --folder made --images pictures
    python benchmarks/parity.py --folder made --times  # the times alone, on a quiet machine
    pip install '.[benchmarks,litert]'                 # elsewhere: its pins clash
    python benchmarks/parity.py --folder made litert

Networks, their quantizers and all outputs are kept in `--folder`, and runtimes are compared with
what is there: a table may be printed in another environment than the one before. Without
`--images` (a folder with calibration/ and evaluation/) EfficientNet-Lite0 is left out. Shares are
rounded down.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from runtimes import (
    accuracy,
    in_jax,
    in_litert,
    in_onnxruntime,
    in_openvino,
    litert_layers,
    onnx_layers,
    wide_files,
)
from runtimes.cases import PICTURES, cases
from runtimes.figures import print_device, print_table

TABLES: dict[str, tuple[Any, str, str]] = {  # what makes it, what it needs, its title
    "onnxruntime": (in_onnxruntime, "onnxruntime", "ONNX files in onnxruntime"),
    "wide": (
        wide_files,
        "onnxruntime",
        "ONNX files with activations of 16 bits, and weights alone",
    ),
    "jax": (in_jax, "flatbuffers", "Integers in JAX"),
    "onnx-layers": (
        onnx_layers,
        "onnxruntime",
        "Layers fed the integers of onnxruntime",
    ),
    "openvino": (in_openvino, "openvino", "The same ONNX files in OpenVINO"),
    "litert": (in_litert, "litert_converter", "LiteRT files"),
    "litert-layers": (
        litert_layers,
        "litert_converter",
        "Layers fed the integers of LiteRT",
    ),
    "accuracy": (accuracy, "onnxruntime", PICTURES),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--folder", type=Path, required=True, help="what is kept")
    parser.add_argument("--images", type=Path, help="of EfficientNet-Lite0")
    parser.add_argument("--only", default="", help="rows whose names have this in them")
    parser.add_argument("--times", action="store_true", help="times, and nothing else")
    given = parser.parse_args()
    for name in given.tables:
        if name not in TABLES:
            parser.error(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    print_device()
    for name, (module, package, title) in TABLES.items():
        if name not in (given.tables or TABLES):
            continue
        if importlib.util.find_spec(package) is None:
            print(f"\n{title}: not measured, there is no package {package!r} here.")
            continue
        columns, measure = module.COLUMNS, module.rows
        if given.times:
            if not hasattr(module, "times"):
                continue
            columns, measure = module.TIMES, module.times
        rows = []
        wide = getattr(module, "WIDE", False)
        for case in cases(given.folder, given.images, given.only, wide=wide):
            made = measure(case)
            rows += made
            print(*made, sep="\n", file=sys.stderr, flush=True)
        print_table(title, columns, rows)


if __name__ == "__main__":
    main()
