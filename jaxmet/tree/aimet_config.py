"""AIMET's configuration files of quantization simulation, read into fields of `QuantConfig`.

What a file says of an operation type becomes a target: which outputs are quantized, what is fused,
which ranges are fixed. Booleans are the texts "True" and "False" there.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxmet.tree.checks import shown
from jaxmet.tree.targets.target import NORMS, UNSTATED, Target

CALLER = "jaxmet.QuantConfig.from_aimet"
LARGEST = 2**20
"""The size in bytes above which a file is refused; AIMET's own have a few thousand."""

OPERATIONS: dict[str, tuple[str, ...]] = {
    "Conv": ("conv",), "ConvTranspose": ("conv",), "Gemm": ("dense",),
    "MatMul": ("dense", "matmul"), "Add": ("add",), "Mul": ("multiply",),
    "Concat": ("concat",), "Resize": ("resize",), "Upsample": ("resize",),
    "AveragePool": ("avg_pool",), "GlobalAveragePool": ("mean",), "ReduceMean": ("mean",),
    "Mean": ("mean",), "ReduceSum": ("sum",), "MaxPool": ("max_pool",),
    "BatchNormalization": ("norm",), "LayerNormalization": ("norm",),
    "InstanceNormalization": ("norm",), "GroupNormalization": ("norm",),
    "RMSNormalization": ("norm",), "Relu": ("relu",), "Clip": ("clip",),
    "LeakyRelu": ("leaky_relu",), "PRelu": ("prelu",), "HardSwish": ("hard_swish",),
    "Sigmoid": ("sigmoid", "logistic"), "Tanh": ("tanh",), "Softmax": ("softmax",),
    "Gelu": ("gelu",), "Elu": ("elu",), "Softplus": ("softplus",), "Sin": ("sin",),
    "Cos": ("cos",), "Exp": ("exp",), "Erf": ("erf",),
}  # fmt: skip
"""What ONNX calls the operations of a `Target`."""

UNNAMED = frozenset(
    "Cast Dropout Expand Squeeze Unsqueeze Pad Gather Reshape Transpose Flatten Slice Split "
    "Identity Tile DepthToSpace SpaceToDepth".split()
)
"""Operations that move values: they keep the quantizer of their input whatever a file says."""

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SECTIONS = (
    "defaults",
    "params",
    "op_type",
    "supergroups",
    "model_input",
    "model_output",
)
OPTIONAL = ("supergroup_pass_list",)


class _Reader:
    """A file's entries, read one by one: what was not asked for is what cannot be expressed."""

    def __init__(self, ignore: frozenset[str]) -> None:
        self.ignore = ignore
        self.unread: list[str] = []

    def refuse(self, entry: str) -> None:
        """Note an entry that has no counterpart, unless it is to be ignored."""
        parts = entry.split(".")
        names = {".".join(parts[: n + 1]) for n in range(len(parts))}
        if not names & self.ignore:
            self.unread.append(entry)

    def flag(self, entries: Mapping[str, Any], key: str, where: str) -> bool | None:
        """A boolean, None where the key is absent."""
        if key not in entries:
            return None
        value = entries[key]
        if isinstance(value, bool):
            return value
        if not isinstance(value, str) or value not in ("True", "False"):
            raise ValueError(
                f"{CALLER}: {where}.{key} is {shown(value)}. It is 'True' or 'False'."
            )
        return value == "True"

    def known(self, entries: Any, keys: Iterable[str], where: str) -> dict[str, Any]:
        """A dict that has these keys only, apart from what is to be ignored."""
        found = _dict(entries, where)
        for key in found:
            if key not in keys:
                self.refuse(f"{where}.{key}")
        return found


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ValueError(
            f"{CALLER}: {where} is {shown(value)}. It is an object of entries."
        )
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{CALLER}: {where} is {shown(value)}. It is a list.")
    return list(value)


def _loaded(source: Any) -> Any:
    """The content of a file, or the dict that was given."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"{CALLER}: the configuration is {shown(source)}. Give the path of a JSON file, or "
            "its content as a dict."
        )
    path = Path(source)
    with path.open("rb") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ValueError(
            f"{CALLER}: {path.name} has more than {LARGEST} bytes. Pass a configuration of "
            "quantsim: encodings are another file."
        )
    try:
        # as floats: an integer of many digits takes long, and none is needed
        return json.loads(text, object_pairs_hook=_once, parse_int=float)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{CALLER}: {path.name} is no JSON file ({error}). Pass a configuration of quantsim."
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(
            f"{CALLER}: the file says {shown(twice)} twice. Keep one of them."
        )
    return found


def aimet_fields(source: Any, ignore: Iterable[str]) -> dict[str, Any]:
    """The fields of a `QuantConfig`, from a path or a dict.

    Raises ValueError for a malformed file, and for entries without a counterpart unless
    `ignore` names them or a section around them.
    """
    given = isinstance(ignore, Iterable) and not isinstance(ignore, str)
    if not given or not all(isinstance(i, str) for i in ignore):
        raise ValueError(
            f"{CALLER}: ignore is {shown(ignore)}. Give a list of entries, as "
            "['supergroup_pass_list']."
        )
    content = _dict(_loaded(source), "the configuration")
    absent = [s for s in SECTIONS if s not in content]
    if absent:
        raise ValueError(
            f"{CALLER}: the configuration has no {absent[0]!r}. It has the sections "
            f"{', '.join(SECTIONS)}; an empty one is {{}} or []."
        )
    read = _Reader(frozenset(ignore))
    for key in content:
        if key not in SECTIONS:
            read.refuse(key)
    fields, off, channels = _defaults(read, content["defaults"])
    _params(read, content["params"], fields)
    fixed = _op_types(read, content["op_type"], off, channels, fields)
    fuses = _supergroups(read, content["supergroups"])
    entries = read.known(content["model_input"], ["is_input_quantized"], "model_input")
    if not read.flag(entries, "is_input_quantized", "model_input"):
        off.add("input")
    entries = read.known(
        content["model_output"], ["is_output_quantized"], "model_output"
    )
    if read.flag(entries, "is_output_quantized", "model_output") is False:
        read.refuse("model_output.is_output_quantized")
    fields["per_channel"] = _agreed(read, channels)
    if read.unread:
        raise ValueError(
            f"{CALLER}: {', '.join(map(repr, read.unread[:10]))} cannot be expressed. Remove "
            "these entries, or name them in ignore= to read the rest."
        )
    fields["residual_bits"] = None  # AIMET's quantizers have the bits of activations
    fields["target"] = Target(
        "aimet",
        bias=fields["bias"],
        symmetric_activations=fields["symmetric_activations"],
        unsigned_symmetric=fields["unsigned_symmetric"],
        per_channel=fields["per_channel"],
        symmetric_weights=fields["symmetric_weights"],
        fuses=NORMS | fuses,
        shares=UNSTATED.shares,
        fixed=tuple(fixed),
        no_output=frozenset(off),
    )
    return fields


def _defaults(
    read: _Reader, section: Any
) -> tuple[dict[str, Any], set[str], dict[str, bool]]:
    """Fields, the operations without a quantizer, and per-channel scales by operation type."""
    keys = ("ops", "params", "strict_symmetric", "unsigned_symmetric")
    where = "defaults"
    entries = read.known(section, (*keys, "per_channel_quantization"), where)
    ops = read.known(
        entries.get("ops", {}), ("is_output_quantized", "is_symmetric"), f"{where}.ops"
    )
    params = read.known(
        entries.get("params", {}), ("is_quantized", "is_symmetric"), f"{where}.params"
    )
    symmetric = bool(read.flag(ops, "is_symmetric", f"{where}.ops"))
    weights = bool(read.flag(params, "is_symmetric", f"{where}.params"))
    strict = read.flag(entries, "strict_symmetric", where)
    if strict and symmetric:
        # Symmetric activations here have the lowest integer: −128 of 8 bits.
        read.refuse(f"{where}.strict_symmetric")
    unsigned = read.flag(entries, "unsigned_symmetric", where)
    on = bool(read.flag(ops, "is_output_quantized", f"{where}.ops"))
    every = {o for names in OPERATIONS.values() for o in names}
    channels = bool(read.flag(entries, "per_channel_quantization", where))
    quantized = bool(read.flag(params, "is_quantized", f"{where}.params"))
    fields: dict[str, Any] = {
        "symmetric_activations": symmetric,
        "symmetric_weights": weights,
        "unsigned_symmetric": unsigned is not False,
        "weights": quantized,
        "bias": "int32" if quantized else "float",
    }
    return fields, set() if on else every, dict.fromkeys(LAYERS, channels)


def _params(read: _Reader, section: Any, fields: dict[str, Any]) -> None:
    for name, entries in _dict(section, "params").items():
        where = f"params.{name}"
        if name not in ("weight", "bias"):
            _dict(entries, where)
            read.refuse(where)
            continue
        found = read.known(entries, ("is_quantized", "is_symmetric"), where)
        quantized = read.flag(found, "is_quantized", where)
        symmetric = read.flag(found, "is_symmetric", where)
        if name == "weight":
            fields["weights"] = fields["weights"] if quantized is None else quantized
            if symmetric is not None:
                fields["symmetric_weights"] = symmetric
        else:
            if quantized is not None:
                fields["bias"] = "int32" if quantized else "float"
            if symmetric is False and fields["bias"] == "int32":
                read.refuse(f"{where}.is_symmetric")


def _op_types(
    read: _Reader,
    section: Any,
    off: set[str],
    channels: dict[str, bool],
    fields: Mapping[str, Any],
) -> list[tuple[str, float, float]]:
    """Read what each operation type says into `off` and `channels`; returns fixed ranges."""
    fixed: dict[str, tuple[float, float]] = {}
    switched: dict[str, bool] = {}
    keys = ("is_output_quantized", "is_symmetric", "per_channel_quantization")
    for name, entries in _dict(section, "op_type").items():
        where = f"op_type.{name}"
        found = read.known(entries, (*keys, "encoding_constraints"), where)
        on = read.flag(found, "is_output_quantized", where)
        symmetric = read.flag(found, "is_symmetric", where)
        if symmetric is not None and symmetric != fields["symmetric_activations"]:
            read.refuse(f"{where}.is_symmetric")
        per_channel = read.flag(found, "per_channel_quantization", where)
        operations = OPERATIONS.get(name, ())
        if per_channel is not None and name in channels:
            channels[name] = per_channel
        elif per_channel is not None and name != "PRelu":
            read.refuse(f"{where}.per_channel_quantization")
        if not operations and (name not in UNNAMED or on):
            read.refuse(where)
        if on is not None:
            for operation in operations:
                if switched.setdefault(operation, on) != on:
                    read.refuse(f"{where}.is_output_quantized")
                (off.discard if on else off.add)(operation)
        if "encoding_constraints" in found:
            between = _constraints(read, found["encoding_constraints"], where)
            lower = between is not None and between[1] == math.inf
            if lower and not (name == "Relu" and between == (0.0, math.inf)):
                read.refuse(f"{where}.encoding_constraints")
            elif between is not None and not lower:
                fixed |= dict.fromkeys(operations, between)
    return [(name, *between) for name, between in fixed.items()]


def _constraints(read: _Reader, entries: Any, where: str) -> tuple[float, float] | None:
    """The range of an output, infinite where there is only a lowest value."""
    where = f"{where}.encoding_constraints"
    found = read.known(entries, ("min", "max"), where)
    for key, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in ("min", "max") and not (number and abs(value) <= 1e30):
            raise ValueError(
                f"{CALLER}: {where}.{key} is {shown(value)}. It is a number."
            )
    if "min" not in found:
        read.refuse(where)
        return None
    low, high = float(found["min"]), float(found.get("max", math.inf))
    if not low <= 0 <= high or low == high:
        raise ValueError(
            f"{CALLER}: {where} is {low:g} to {high:g}. A range has zero in it."
        )
    return low, high


def _supergroups(read: _Reader, section: Any) -> frozenset[tuple[str, str]]:
    """The pairs of neighbours of each list, of which only the last has a quantizer."""
    pairs: set[tuple[str, str]] = set()
    for number, entry in enumerate(_list(section, "supergroups")):
        where = f"supergroups[{number}]"
        found = read.known(entry, ("op_list",), where)
        names = _list(found.get("op_list"), f"{where}.op_list")
        if len(names) < 2 or not all(isinstance(n, str) for n in names):
            raise ValueError(
                f"{CALLER}: {where}.op_list is {shown(names)}. It has two names or more."
            )
        if any(n not in OPERATIONS for n in names):
            read.refuse(where)
            continue
        for first, second in zip(names, names[1:], strict=False):
            both = ((a, b) for a in OPERATIONS[first] for b in OPERATIONS[second])
            pairs |= set(both)
    return frozenset(pairs)


def _agreed(read: _Reader, channels: Mapping[str, bool]) -> bool:
    """Whether weights have a scale per channel: the same of all layers."""
    for name, value in channels.items():
        if value != channels["Conv"]:
            read.refuse(f"op_type.{name}.per_channel_quantization")
    return channels["Conv"]
