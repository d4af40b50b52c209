"""What to quantize and how, as one typed value with a default for everything."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxmet.numerics.calibrators import RangeMethod
from jaxmet.tree.checks import shown
from jaxmet.tree.config_fields import FIELDS, DynamicRange, Kind, Settings, check_fields
from jaxmet.tree.globs import match, suggestion
from jaxmet.tree.presets import PRESETS
from jaxmet.tree.rule import Rule
from jaxmet.tree.targets import TARGETS, Target
from jaxmet.tree.targets.target import UNSTATED, BiasFormat, Placing


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized; the default is W8A8 with one weight scale per channel.

    `weight_range` and `activation_range` are the calibrators: they say which range a
    quantizer covers. 'minmax' goes from the smallest to the largest value; 'percentile' leaves
    out 100 − `percentile` percent of the values beyond either end; 'mse' and 'sqnr' make the
    squared error least, with clipping weighted three times as heavily in 'sqnr'; 'entropy'
    changes the histogram least. A function `(values, target) -> (low, high)` in `jax.numpy` is
    a calibrator of your own: `values` is a histogram (`left`, `right` and `number` of each
    bin), `target` what the range is for (`lowest`, `highest`, `tail`, `symmetric`); see
    `jm.numerics.calibrators`. Give the same function again, since programs are compiled for it.

    `block` neighbours along the inputs of a weight share a scale, the last block of an axis
    may be shorter. With `bias='int32'` a bias is an integer at the product of the scales of
    weight and input, as in integer accumulators; so is the shift of a folded batch norm,
    with the product's own bias in it.

    A residual stream, as of a transformer, is what blocks add their results to until a norm over
    the data (layer norm, RMS norm, group norm) reads the sum. A few of its channels are much
    larger than the others, so that 8 bits for all of it lose most of the signal. By default the
    sums, what is added up in them and the outputs of such norms stay in float, and where one of
    them enters a product it is quantized there. With `residual_bits=16` they are stored with 16
    bits.

    With `dynamic` the ranges of activations are those of the values at hand. With 'token' and
    with blocks only what enters a product is quantized, where the product reads it: a sum over
    channels has one scale for each position, that of a convolution one for each example.

    `rules` are overrides, applied in their order: the later one wins.

    Args:
        weight_bits: bit-width of weights, 2 to 16, or 32 for no rounding; default 8.
        activation_bits: bit-width of activations, 2 to 16, or 32 for no rounding; default 8.
        per_channel: whether each output channel of a weight has a scale of its own; default
            True. False: one per tensor.
        block: how many neighbours along the inputs of a weight share a scale; default None:
            all.
        symmetric_weights: whether the integers of weights are symmetric about zero, without a
            zero point; default True.
        symmetric_activations: the same for activations; default False.
        weight_range: the calibrator of weights: 'minmax' (the default), 'percentile', 'mse',
            'sqnr', 'entropy' or a function.
        activation_range: the calibrator of activations, as for weights; default 'minmax'.
        percentile: for 'percentile': how many percent of the values lie below the upper end,
            and above the lower one; default 99.99.
        bias: 'float' (the default) or 'int32'.
        placement: 'operations' (the default): a quantizer on each result that an integer device
            stores; 'products': only on what enters a product.
        embedding_bits: bit-width of weights that only lookups read, without blocks: one
            scale per row; default None: `weight_bits`. A rule's `weight_bits` is stronger.
        residual_bits: bit-width of residual streams, 2 to 16; default 32: they stay in float. None:
            `activation_bits`.
        dynamic: what has a range of its own that is found at every call: 'tensor', 'token' (all
            that a product sums over for one of its results), or the number of neighbours in such
            a sum that share one; default None: ranges come from calibration.
        rules: a list of `jm.Rule`, applied in this order; default none.
        unsigned_symmetric: whether a symmetric activation without negative values has unsigned
            integers; default True.
        target: the `jm.Target` whose shared scales, fixed ranges, fused operations and limits
            hold; default None. `QuantConfig.for_target` sets this and the fields above.

    Raises:
        ValueError: for an unknown name and an impossible value.

    >>> jm.QuantConfig(weight_bits=4, weight_range="mse")
    """

    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True
    block: int | None = None
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    weight_range: RangeMethod = "minmax"
    activation_range: RangeMethod = "minmax"
    percentile: float | int = 99.99
    bias: BiasFormat = "float"
    placement: Placing = "operations"
    embedding_bits: int | None = None
    residual_bits: int | None = 32
    dynamic: DynamicRange = None
    rules: tuple[Rule, ...] | list[Rule] = ()
    unsigned_symmetric: bool = True
    target: Target | None = None

    def __post_init__(self) -> None:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        check_fields(fields, "QuantConfig")
        if not isinstance(self.rules, list | tuple):
            raise ValueError(
                f"jaxmet.QuantConfig: rules is {self.rules!r}. Give a list of them."
            )
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise ValueError(
                    f"jaxmet.QuantConfig: {rule!r} among the rules is no Rule. Write "
                    "jm.Rule('glob', field=value)."
                )
        object.__setattr__(self, "rules", tuple(self.rules))

    @classmethod
    def for_target(cls, target: str | Target, **overrides: Any) -> "QuantConfig":
        """The configuration that simulates a runtime's integer arithmetic.

        Bits, symmetry, bias format and placement are those of the target, and so are the scales
        that it shares, the ranges that it fixes and the operations that it fuses. `jm.plan` says
        what the target computes in float.

        Args:
            target: 'onnxruntime', 'openvino', 'litert', 'xla', 'htp' or 'tensorrt', or a
                `jm.Target`.
            **overrides: other values for fields of `QuantConfig`.

        Returns:
            A configuration with `target` set.

        Raises:
            ValueError: for an unknown target or field, and for an impossible value.

        >>> jm.QuantConfig.for_target("litert", activation_range="mse")
        """
        if isinstance(target, str) and target in TARGETS:
            target = TARGETS[target]
        if not isinstance(target, Target):
            near = suggestion(target, TARGETS) if isinstance(target, str) else ""
            raise ValueError(
                f"jaxmet.QuantConfig.for_target: the target is {shown(target)}. "
                f"{near or 'Use ' + ', '.join(map(repr, TARGETS)) + ', or a jm.Target.'}"
            )
        names = _overridable(overrides, "for_target")
        given = {n: getattr(target, n) for n in names if hasattr(target, n)}
        return cls(**given | overrides, target=target)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "QuantConfig":
        """The configuration that goes by this name for transformers.

        'w8a8' has weights of 8 bits, one scale per output channel, and activations of 8 bits with
        a range for each token that is found at every call. 'w4a8' has weights of 4 bits, an
        asymmetric range for each block of 32 inputs, and embeddings of 8 bits. 'w8a16' and 'w4a16'
        have the same weights, and activations as the model computes them (float16 or bfloat16).

        Args:
            name: 'w8a8', 'w4a8', 'w8a16' or 'w4a16'.
            **overrides: other values for fields of `QuantConfig`.

        Returns:
            A configuration.

        Raises:
            ValueError: for an unknown name or field, and for an impossible value.

        >>> jm.QuantConfig.preset("w4a16", block=64)
        """
        if name not in PRESETS:
            near = suggestion(name, PRESETS) if isinstance(name, str) else ""
            raise ValueError(
                f"jaxmet.QuantConfig.preset: the name is {shown(name)}. "
                f"{near or 'Use ' + ', '.join(map(repr, PRESETS)) + '.'}"
            )
        _overridable(overrides, "preset")
        return cls(**PRESETS[name] | overrides)

    @classmethod
    def from_aimet(
        cls, source: Any, *, ignore: Iterable[str] = (), **overrides: Any
    ) -> "QuantConfig":
        """The configuration that a quantsim configuration file of AIMET describes.

        Read are `defaults`, `params`, `op_type`, `supergroups`, `model_input` and `model_output`.
        Output quantizers, supergroups and encoding constraints of operation types become those of
        a `target`. A quantized bias is 'int32'. Bit-widths are not in these sections: AIMET takes
        them as arguments, and so does this function. An entry without a counterpart raises.

        Args:
            source: the path of a JSON file of at most 1 MiB, or its content as a dict.
            ignore: entries to skip, as 'op_type.Gather' or 'supergroup_pass_list'; a section
                stands for all in it. Default none.
            **overrides: other values for fields of `QuantConfig`, as `weight_bits=4`.

        Returns:
            A configuration whose `target` is named 'aimet'.

        Raises:
            ValueError: for a malformed file, for entries that cannot be expressed, by name, and
                for an unknown field.

        >>> jm.QuantConfig.from_aimet("quantsim.json", ignore=["supergroup_pass_list"])
        """
        from jaxmet.tree.aimet_config import aimet_fields

        _overridable(overrides, "from_aimet")
        fields = aimet_fields(source, ignore)
        if not fields.pop("weights"):
            fields["rules"] = (Rule("*", quantize_weights=False),)
        return cls(**fields | overrides)

    def for_lookups(self) -> "QuantConfig":
        """The configuration of weights that only lookups read."""
        if self.embedding_bits is None:
            return self
        return dataclasses.replace(self, weight_bits=self.embedding_bits, block=None)

    @property
    def device(self) -> Target:
        """The target, or what holds without one."""
        return UNSTATED if self.target is None else self.target

    def resolve(self, names: str | Iterable[str], kind: Kind) -> Settings:
        """What holds for the 'weight', 'activation' or 'bias' that has these names.

        A weight has the name of its parameter and that of the node that reads it: a rule
        for either holds for it.
        """
        say = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        on = {"quantize", "quantize_weights", "quantize_activations"}
        say |= dict.fromkeys(on, True)
        for rule in self.rules_for(names, kind):
            say |= rule.says()
        if kind == "bias":
            quantize = say["quantize"] and say["bias"] == "int32"
            return Settings(
                quantize, 32, True, say["per_channel"], None, "minmax", 100.0
            )
        is_weight = kind == "weight"
        return Settings(
            quantize=say[f"quantize_{kind}s"],
            bits=say[f"{kind}_bits"],
            symmetric=say[f"symmetric_{kind}s"],
            per_channel=is_weight and say["per_channel"],
            block=say["block"] if is_weight else None,
            calibrator=say[f"{kind}_range"],
            percentile=float(say["percentile"]),
            unsigned_symmetric=self.unsigned_symmetric,
            residual_bits=(
                say["activation_bits"]
                if say["residual_bits"] is None
                else say["residual_bits"]
            ),
            dynamic=say["dynamic"] if kind == "activation" else None,
        )

    def rules_for(self, names: str | Iterable[str], kind: Kind) -> tuple[Rule, ...]:
        """The rules that say something about the tensor of this kind and these names."""
        if kind not in FIELDS:
            raise ValueError(
                f"jaxmet.QuantConfig.resolve: the kind is {kind!r}. It is one of "
                f"{', '.join(FIELDS)}."
            )
        names = (names,) if isinstance(names, str) else tuple(names)
        return tuple(
            rule
            for rule in self.rules
            if FIELDS[kind] & rule.says().keys()
            and any(match(rule.glob, name) for name in names)
        )

    def unused(self, names: Iterable[str]) -> list[Rule]:
        """The rules that mean none of these names."""
        names = list(names)
        return [r for r in self.rules if not any(match(r.glob, n) for n in names)]


def _overridable(overrides: Iterable[str], caller: str) -> list[str]:
    """The names of the fields that may be given beside a target; other names are refused."""
    fields = (f.name for f in dataclasses.fields(QuantConfig))
    names = [name for name in fields if name != "target"]
    for name in overrides:
        if name not in names:
            raise ValueError(
                f"jaxmet.QuantConfig.{caller}: {name!r} is no field to override. Fields are "
                f"{', '.join(names)}."
            )
    return names


OPTIONS = frozenset(
    field.name
    for kind in (QuantConfig, Rule)
    for field in dataclasses.fields(kind)
    if field.name not in ("glob", "_")
)
"""The names of all fields of a configuration and of a rule."""


def config_of(config: Any, caller: str, **default: Any) -> QuantConfig:
    """The configuration that was given, or the default one; anything else is refused."""
    if config is None:
        return QuantConfig(**default)
    if not isinstance(config, QuantConfig):
        raise ValueError(
            f"jaxmet.{caller}: config is of type {type(config).__name__}. Give a "
            "jm.QuantConfig, for example jm.QuantConfig(weight_bits=4)."
        )
    return config
