"""The command line: the main job on a small trained network, a report, a file's check."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

DEMO = """Quantizes a small MobileNetV2-style network, trained on Fashion-MNIST and packaged with
its data: folds batch norms, equalizes, calibrates, and simulates the integer device; runs it in
integers, and as an ONNX file where the extra 'onnx' is installed. Prints one table: test accuracy
with its 95 % interval, the paired change against float, and the signal-to-noise ratio of the
logits. Some two minutes on two cores, mostly compiling. Writes jaxmet-report.html, and nothing
else, where the extra 'plot' is installed."""
MODEL = "the model as module:function, a function apply(params, *inputs)"
SAVED = "a file of jm.save that holds params and quantizers"
INPUTS = "examples: an .npy file, or an .npz file with one array per input"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command, by default the one of `sys.argv`."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        if options.run is _demo:
            raise
        raise SystemExit(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxmet", description=DEMO)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three rows: float, 8 bits, and weights of 4 bits; some twenty seconds, no report",
    )
    parser.set_defaults(run=_demo)
    commands = parser.add_subparsers(title="commands")
    report = commands.add_parser(
        "report",
        help="write the HTML report of a quantized model",
        description="Writes the report of a quantized model as one HTML file, with the noise that "
        "each quantizer adds. It needs the extra 'plot'.",
    )
    report.set_defaults(run=_report)
    check = commands.add_parser(
        "check",
        help="compare a file with the simulation and with float",
        description="Runs a file of jm.export.onnx, jm.export.litert or jm.export.stablehlo, and "
        "compares it with the simulation and the float model.",
    )
    check.add_argument("file", type=Path, help="the file, .onnx, .tflite or .jax")
    check.add_argument("--runtime", default="onnxruntime", help="or openvino")
    check.set_defaults(run=_check)
    for command in (report, check):
        command.add_argument("model", help=MODEL)
        command.add_argument("saved", type=Path, help=SAVED)
        command.add_argument("inputs", type=Path, help=INPUTS)
        command.add_argument("--batch-size", type=int, default=32, help="default 32")
    out = Path("jaxmet-report.html")
    report.add_argument("-o", "--out", type=Path, default=out, help=f"default {out}")
    return parser


def _demo(options: argparse.Namespace) -> None:
    from jaxmet.demo.run import main as run_demo

    run_demo(quick=options.quick)


def _report(options: argparse.Namespace) -> None:
    import jaxmet as jm

    apply, params, quantizers, batches = _loaded(options)
    first = next(iter(batches))
    graph = jm.trace(apply, params, *first)
    noise = jm.noise(params, graph, quantizers, batches)
    jm.report(
        options.out,
        params,
        graph,
        quantizers=quantizers,
        batch=first,
        tables=[noise],
    )
    print(options.out)


def _check(options: argparse.Namespace) -> None:
    import jaxmet as jm

    apply, params, quantizers, batches = _loaded(options)
    given = options.file, apply, params, quantizers, batches
    print(jm.export.check(*given, runtime=options.runtime))


def _loaded(options: argparse.Namespace) -> tuple[Any, Any, Any, list[tuple[Any, ...]]]:
    """The model, its parameters and quantizers, and batches of the examples."""
    import jaxmet as jm

    apply = _model(options.model)
    saved = jm.load(options.saved)
    if saved.params is None or saved.quantizers is None:
        missing = "params" if saved.params is None else "quantizers"
        raise ValueError(
            f"jaxmet: {options.saved} holds no {missing}. Write it with "
            "jm.save(path, params=params, quantizers=quantizers)."
        )
    batches = jm.batched(_inputs(options.inputs), batch_size=options.batch_size)
    return apply, saved.params, saved.quantizers, [tuple(batch) for batch in batches]


def _model(name: str) -> Any:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(
            f"jaxmet: the model is {name!r}. Write it as module:function, such as "
            "nets:apply or nets:model.apply."
        )
    sys.path.insert(0, "")  # the user's folder, as `python -m` has it
    return reduce(getattr, function.split("."), importlib.import_module(module))


def _inputs(path: Path) -> tuple[Any, ...]:
    import numpy as np

    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return (found,)
    with found:
        return tuple(found[name] for name in found.files)


if __name__ == "__main__":
    main()
