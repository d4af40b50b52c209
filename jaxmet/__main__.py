"""`python -m jaxmet`: the main job on a small trained network."""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmet",
        description="Quantizes a small MobileNetV2-style network, trained on Fashion-MNIST and "
        "packaged with its data: folds batch norms, equalizes, calibrates, and simulates the "
        "integer device; runs it in integers, and as an ONNX file where the extra 'onnx' is "
        "installed. Prints one table: test accuracy with its 95 %% interval, the paired "
        "change against float, and the signal-to-noise ratio of the logits. Some two minutes on "
        "two cores, mostly compiling. Writes jaxmet-report.html, and nothing else, where the "
        "extra 'plot' is installed.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three rows: float, 8 bits, and weights of 4 bits; some twenty seconds, no report",
    )
    options = parser.parse_args()
    from jaxmet.demo.run import main as run_demo

    run_demo(quick=options.quick)


if __name__ == "__main__":
    main()
