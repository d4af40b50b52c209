"""Encodings through aimet-onnx and back: its file with pairs against ours, in onnxruntime.

    python benchmarks/aimet_round_trip.py write folder      # where '.[onnx]' is installed
    python benchmarks/aimet_round_trip.py compare folder    # where aimet-onnx 2.42 is

`write` puts the demo's network into the folder: as encodings of each version, as integers, and
1,024 images. `compare` loads the encodings with aimet-onnx, has it write its own QuantizeLinear
pairs, and counts the outputs that are equal to the bit. The two steps need no common environment.
"""

import argparse
from pathlib import Path

import numpy as np

VERSIONS = ("2.0.0", "1.0.0", "0.6.1")


def write(folder: Path) -> None:
    import jax.numpy as jnp

    import jaxmet as jm
    from jaxmet.demo import data
    from jaxmet.demo.network import Network

    images = jnp.asarray(data.load()[0])
    apply, known, new = Network().apply, images[:256], images[256:1280]
    params = data.weights()
    graph = jm.trace(apply, params, known[:1])
    params = jm.fold_batch_norm(params, graph)
    config = jm.QuantConfig(bias="int32")
    batches = jm.batched(known, batch_size=32)
    quantizers = jm.calibrate(params, graph, batches, config)
    model = (apply, params, quantizers, known[:1])
    jm.export.onnx(folder / "ours.onnx", *model, overwrite=True)
    for version in VERSIONS:
        (folder / version).mkdir(exist_ok=True)
        jm.export.encodings(folder / version, *model, version=version, overwrite=True)
    np.save(folder / "images.npy", np.asarray(new))


def ran(model: bytes, images: np.ndarray, *, fused: bool) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not fused:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def compare(folder: Path) -> None:
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel, load_encodings_to_sim

    images = np.load(folder / "images.npy")
    ours = (folder / "ours.onnx").read_bytes()
    print("| encodings | as the file says, equal (%) | fused, equal (%) |")
    print("|---|---|---|")
    for version in VERSIONS:
        model = onnx.load(folder / version / "model.onnx")
        sim = QuantizationSimModel(
            model, dummy_input={model.graph.input[0].name: images[:1]}
        )
        path = str(folder / version / "model.encodings")
        load_encodings_to_sim(sim, path, strict=False)
        theirs = sim.to_onnx_qdq(export_int32_bias=True, prequantize_constants=True)
        shares = []
        for fused in (False, True):
            made = ran(theirs.SerializeToString(), images, fused=fused)
            shares.append(100 * np.mean(made == ran(ours, images, fused=fused)))
        print(f"| {version} | {shares[0]:.2f} | {shares[1]:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("write", "compare"))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True)
    {"write": write, "compare": compare}[given.step](given.folder)
