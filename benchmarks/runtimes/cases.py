"""Networks, the ways to quantize them, and what the simulation says of each.

A case is made once and kept in a folder, so that runtimes whose packages do not install beside
each other compare the same numbers.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dfq.networks import NETWORKS as DFQ
from dfq.networks import trained
from dfq.scenes import Composer
from lite.network import FAMILY, LinenLite
from residual import load as load_residual
from residual.networks import NETWORKS as RESIDUAL

import jaxmet as jm
from jaxmet.demo import data
from jaxmet.demo.network import Network as Demo
from runtimes.transformer import TransformerBlock, drawn

BATCH = 32
LITE = "EfficientNet-Lite0"
PICTURES = "EfficientNet-Lite0, 512 pictures"
LITE_MODEL = FAMILY["lite0"]


class Loaded(NamedTuple):
    """The tree of a network, inputs to calibrate on, inputs to compare."""

    params: Any
    known: Any
    new: Any


WAYS: dict[str, dict[str, Any]] = {
    "W8A8, a scale per channel": {},
    "W8A8, one per tensor, equalized": {"per_channel": False},
    "W4A8, a scale per channel": {"weight_bits": 4},
}
WIDE: dict[str, dict[str, Any]] = {
    "W8A16, a scale per channel": {"activation_bits": 16},
    "W4A16, a scale per block of 32": {
        "activation_bits": 16,
        "weight_bits": 4,
        "block": 32,
    },
    "W4, a scale per block of 32, activations in float": {
        "activation_bits": 32,
        "bias": "float",
        "weight_bits": 4,
        "block": 32,
    },
}
"""More bits for activations, and weights alone, of networks that are `wide`."""
CORRECTED: dict[str, dict[str, Any]] = {"W8A8, a scale per channel, corrected": {}}


class Network(NamedTuple):
    """A model, and what reads its tree and inputs; `load` takes the folder of pictures."""

    module: Callable[[], Any]
    load: Callable[[Path | None], Loaded]
    ways: dict[str, dict[str, Any]] = WAYS
    target: str | None = None
    wide: bool = False


def _garments(params: Any) -> Loaded:
    known, new, _ = data.load()
    return Loaded(params, known[:256], new[:1024])


def _scenes() -> Loaded:
    known, new = (
        jnp.asarray(Composer.read(split).scenes(range(count)).images)
        for split, count in (("calibration", 256), ("test", 64))
    )
    return Loaded(trained("deeplab"), known, new)


def _tokens() -> Loaded:
    params, tokens = drawn(512)
    return Loaded(params, tokens[:256], tokens[256:])


def _pictures(images: Path | None, count: int) -> Loaded:
    from lite.pictures import read_folder
    from lite.weights import find_weights, load_weights

    if images is None:
        raise ValueError(f"{LITE} needs --images, a folder of pictures.")
    folders = (images / n for n in ("calibration", "evaluation"))
    known, new = (read_folder(f, LITE_MODEL.pixels) for f in folders)
    params = load_weights(find_weights("lite0"), LITE_MODEL)
    return Loaded(params, jnp.asarray(known[:256]), jnp.asarray(new[:count]))


NETWORKS = {
    "demo": Network(Demo, lambda _: _garments(data.weights()), wide=True),
    "ResNet18": Network(
        RESIDUAL["resnet18"],
        lambda _: _garments(load_residual("resnet18")[1]),
        wide=True,
    ),
    "ResNet50": Network(
        RESIDUAL["resnet50"], lambda _: _garments(load_residual("resnet50")[1])
    ),
    "DeepLab": Network(DFQ["deeplab"], lambda _: _scenes()),
    # LiteRT has a softmax in integers for one range alone.
    "transformer block": Network(
        TransformerBlock, lambda _: _tokens(), target="litert", wide=True
    ),
    LITE: Network(lambda: LinenLite(LITE_MODEL), lambda f: _pictures(f, 256)),
    PICTURES: Network(
        lambda: LinenLite(LITE_MODEL), lambda f: _pictures(f, 512), CORRECTED
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a way to quantize it, as files in a folder of its own."""

    network: str
    way: str
    folder: Path
    images: Path | None = None

    def load(self) -> Loaded:
        return NETWORKS[self.network].load(self.images)

    @cached_property
    def apply(self) -> Any:
        return NETWORKS[self.network].module().apply

    @cached_property
    def saved(self) -> Any:
        """Its tree and quantizers."""
        return jm.load(self.folder / "model.npz")

    @cached_property
    def floats(self) -> Any:
        """The folded float tree that files of the float model are of."""
        return jm.load(self.folder.parent / "float.npz").params

    @cached_property
    def inputs(self) -> np.ndarray:
        return np.load(self.folder.parent / "inputs.npy")

    @property
    def example(self) -> np.ndarray:
        return self.inputs[:1]

    def table(self, file: Path) -> Any:
        """What `exported` kept of the export of a file."""
        return jm.load(file.with_name(f"{file.name}_table.npz")).table

    @property
    def exact(self) -> np.ndarray:
        """Outputs of the float model."""
        return np.load(self.folder.parent / "exact.npy")

    def outputs(self, name: str) -> np.ndarray | None:
        """What `keep` kept under this name, None where it was not run."""
        path = self.folder / f"{name}.npy"
        return np.load(path) if path.is_file() else None

    @property
    def simulated(self) -> np.ndarray:
        return np.load(self.folder / "simulated.npy")

    def keep(self, name: str, outputs: np.ndarray) -> np.ndarray:
        np.save(self.folder / f"{name}.npy", outputs)
        return outputs

    @cached_property
    def step(self) -> float:
        """Of the grid of the outputs, where they lie on one."""
        last = list(self.saved.quantizers.activations.values())[-1]
        return float(np.ravel(last.scale)[0])

    def exported(
        self, name: str, export: Callable[..., Any], count: int = 1, **options: Any
    ) -> Path:
        """The file that `export` writes of its tree for so many inputs, once, and its table."""
        path, saved = self.folder / name, self.saved
        if not path.is_file():
            x = self.inputs[:count]
            model = (self.apply, saved.params, saved.quantizers, x)
            table = export(path, *model, **options)
            jm.save(path.with_name(f"{name}_table.npz"), table=table)
        return path

    def exported_float(
        self, name: str, export: Callable[..., Any], count: int = 1, **options: Any
    ) -> Path:
        """The same of the float model, beside the network."""
        path = self.folder.parent / name
        if not path.is_file():
            export(path, self.apply, self.floats, None, self.inputs[:count], **options)
        return path

    @property
    def label(self) -> list[str]:
        return [self.network, self.way]


def cases(
    folder: Path, images: Path | None, only: str, *, wide: bool = False
) -> Iterator[Case]:
    """The cases whose names have `only` in them, made where they are not yet."""
    for network, about in NETWORKS.items():
        ways = about.ways if not wide else WIDE if about.wide else {}
        for way in ways:
            if only not in f"{network}, {way}":
                continue
            place = folder / _plain(network) / _plain(way)
            case = Case(network, way, place, images)
            if not (case.folder / "model.npz").is_file():
                if network in (LITE, PICTURES) and images is None:
                    continue
                _make(case)
            if not (case.folder / "simulated.npy").is_file():
                _simulate(case)
            yield case


def _plain(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def _make(case: Case) -> None:
    """Its tree and quantizers."""
    case.folder.mkdir(parents=True, exist_ok=True)
    params, known, new = case.load()
    graph = jm.trace(case.apply, params, known[:1])
    batches = jm.batched(known, batch_size=BATCH)
    tree = folded = jm.fold_batch_norm(params, graph)
    place, network = case.folder.parent, NETWORKS[case.network]
    if not (place / "exact.npy").is_file():
        jm.save(place / "float.npz", params=folded)
        np.save(place / "inputs.npy", np.asarray(new))
        np.save(place / "exact.npy", run(jm.lift(case.apply), folded, new))
    if "equalized" in case.way:
        tree = jm.equalize(folded, graph, batches=batches, progress=False)
    options = {"bias": "int32"} | (WIDE | network.ways)[case.way]
    config = jm.QuantConfig(**options)
    if network.target is not None:
        config = jm.QuantConfig.for_target(network.target, **options)
    quantizers = jm.calibrate(tree, graph, batches, config, progress=False)
    if "corrected" in case.way:
        tree = jm.correct_bias(tree, graph, quantizers, batches, progress=False)
        quantizers = jm.calibrate(tree, graph, batches, config, progress=False)
    jm.save(case.folder / "model.npz", params=tree, quantizers=quantizers)


def _simulate(case: Case) -> None:
    """The outputs of the simulation, weights rounded once."""
    tree, quantizers = case.saved.params, case.saved.quantizers
    rounded = jm.round_weights(tree, quantizers)
    program = jm.simulate(case.apply, quantizers, weights=False)
    simulated = run(program, rounded, case.inputs)
    if quantizers.activations:
        levels = simulated / case.step
        if np.max(np.abs(levels - np.rint(levels))) > 1e-2:
            raise ValueError(f"{case.network}: its outputs are not on its last grid.")
    case.keep("simulated", simulated)


def run(apply: Any, params: Any, inputs: Any) -> np.ndarray:
    """All outputs, in batches of one size."""
    compiled = jax.jit(apply)
    parts = [
        compiled(params, inputs[i : i + BATCH]) for i in range(0, len(inputs), BATCH)
    ]
    return np.concatenate([np.asarray(p) for p in parts])
