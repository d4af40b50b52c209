"""What rules reach: each must say something to a tensor, and the same to calls of one weight."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmet.engine.graph.graph import Graph
from jaxmet.engine.graph.node import Node
from jaxmet.tree.config import QuantConfig
from jaxmet.tree.config_fields import FIELDS, Kind, Settings
from jaxmet.tree.globs import match
from jaxmet.tree.rule import Rule

OPTION_OF = {
    "quantize": "quantize_weights",
    "bits": "weight_bits",
    "symmetric": "symmetric_weights",
    "calibrator": "weight_range",
}
"""The field of a rule that a weight's setting comes from, where it has another name."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that has, or could have, a quantizer, and what a rule may call it.

    `owner` is the node whose quantizer an activation shares; `blocks` says that a weight can
    have blocks, `ignores` are fields that say nothing of this one.
    """

    name: str
    kind: Kind
    names: tuple[str, ...]
    settings: Settings
    owner: str | None = None
    blocks: bool = True
    ignores: frozenset[str] = frozenset()


def says_float(config: QuantConfig, names: str | Iterable[str], kind: Kind) -> str:
    """The reason of a tensor that a rule leaves in float, with that rule."""
    switch = f"quantize_{kind}s"
    rules = [r for r in config.rules_for(names, kind) if switch in r.says()]
    return f"a rule says so: {rules[-1]!r}"


def agreed(
    config: QuantConfig, calls: Sequence[tuple[str, ...]], kind: Kind, caller: str
) -> Settings:
    """What holds for a weight or bias, given its names in each of its calls: (parameter, …, node).

    Raises ValueError where rules for its calls disagree: it has one quantizer.
    """
    first, *others = (config.resolve(names, kind) for names in calls)
    for names, settings in zip(calls[1:], others, strict=True):
        differ = (
            f.name
            for f in dataclasses.fields(Settings)
            if getattr(settings, f.name) != getattr(first, f.name)
        )
        field = next(differ, None)
        if field is None:
            continue
        option, values = OPTION_OF.get(field, field), [first, settings]
        values = [getattr(s, field) for s in values]
        if kind == "bias":
            option, values = "bias", ["int32" if v else "float" for v in values]
        plain = getattr(config.resolve((), kind), field)
        wanted = values[0] if getattr(settings, field) == plain else values[1]
        raise ValueError(
            f"jaxmet.{caller}: {calls[0][-1]!r} and {names[-1]!r} are calls of one shared "
            f"{kind}, {names[0]!r}, which has one quantizer, but the rules say "
            f"{option}={values[0]!r} of the first and {option}={values[1]!r} of the second. "
            f"Write jm.Rule({names[0]!r}, {option}={wanted!r}), which holds for all its calls "
            "(quantize_activations switches what comes out of a single one)."
        )
    return first


def check_rules(
    graph: Graph, config: QuantConfig, tensors: Sequence[Tensor], caller: str
) -> None:
    """Refuse a rule with a field that reaches no tensor of its kind.

    Later rules may override it, it may repeat what holds already, and what it leaves in float
    may be in float for other reasons.
    """
    for number, rule in enumerate(config.rules):
        until = dataclasses.replace(config, rules=config.rules[: number + 1])
        for field, value in rule.overrides().items():
            meant = [t for t in tensors if any(match(rule.glob, n) for n in t.names)]
            if any(_reaches(field, value, t, until) for t in meant):
                continue
            nodes = [n for n in graph.nodes if match(rule.glob, n.name)]
            off = {"quantize": True, "quantize_activations": bool(nodes)}
            if value is False and off.get(field):
                continue  # a result without a quantizer is in float
            what = _what(graph, config, rule, field, tensors, nodes, meant)
            raise ValueError(
                f"jaxmet.{caller}: {field}={value!r} of {rule!r} reaches nothing: {what}"
            )


def _reaches(field: str, value: Any, tensor: Tensor, until: QuantConfig) -> bool:
    """Whether a field of a rule says something about a tensor."""
    if field == "quantize":
        return True
    if field not in FIELDS[tensor.kind] or _is_off(field, tensor, until):
        return False
    if field in tensor.ignores:
        return False
    if field == "block":
        return tensor.blocks or value is None
    if field == "percentile":
        early = until.resolve(tensor.names, tensor.kind)
        methods = early.calibrator, tensor.settings.calibrator
        reads = any(m == "percentile" or callable(m) for m in methods)
        return tensor.owner is None and reads
    return tensor.owner is None or field == "quantize_activations"


def _is_off(field: str, tensor: Tensor, until: QuantConfig) -> bool:
    """Whether an earlier rule leaves a tensor in float, so that a field says nothing of it."""
    if tensor.kind == "bias" or field.startswith("quantize"):
        return False
    return not until.resolve(tensor.names, tensor.kind).quantize


def check_int32(
    config: QuantConfig,
    tensors: Sequence[Tensor],
    rounded: Iterable[str],
    left: Mapping[str, str],
    caller: str,
) -> None:
    """Refuse a rule that asks for int32 biases where all that it means stay in float."""
    rounded = set(rounded)
    for rule in config.rules:
        asked = [
            t.name
            for t in tensors
            if rule.overrides().get("bias") == "int32"
            and t.kind == "bias"
            and t.settings.quantize
            and any(match(rule.glob, n) for n in t.names)
        ]
        whys = [left[name] for name in asked if name in left]
        if whys and not rounded & set(asked):
            raise ValueError(
                f"jaxmet.{caller}: bias='int32' of {rule!r} reaches nothing: {asked[0]!r} is "
                f"no integer, since {whys[0]}. Drop it, or quantize what that names."
            )


# Saying what a name is instead


def _what(
    graph: Graph,
    config: QuantConfig,
    rule: Rule,
    field: str,
    tensors: Sequence[Tensor],
    nodes: Sequence[Node],
    meant: Sequence[Tensor],
) -> str:
    """What a rule's name is, and what to write instead."""
    kinds = [kind for kind, fields in FIELDS.items() if field in fields]
    value = rule.overrides()[field]
    if field == "percentile" and any(t.kind in kinds for t in meant):
        return (
            "no range there is a 'percentile'. Add weight_range='percentile' or "
            "activation_range='percentile' to the rule."
        )
    off = next((t for t in meant if _is_off(field, t, config)), None)
    if off is not None and off.kind in kinds:
        return f"{off.name!r} is in float: {says_float(config, off.names, off.kind)}."
    if field == "block" and any(t.kind == "weight" for t in meant):
        first = next(t for t in meant if t.kind == "weight")
        return f"the weight {first.name!r} has no single input axis. Drop block."
    sharing = next((t for t in meant if t.kind in kinds and t.owner), None)
    if sharing is not None:
        return (
            f"{sharing.name!r} shares the quantizer of "
            f"{sharing.owner!r}. Write jm.Rule({sharing.owner!r}, {field}={value!r})."
        )
    stream = next((t for t in meant if field in t.ignores and t.kind in kinds), None)
    if stream is not None and field != "residual_bits":
        if field == "activation_bits":
            return (
                f"{stream.name!r} is in a residual stream. Write "
                f"jm.Rule({rule.glob!r}, residual_bits={value!r})."
            )
        return (
            f"{stream.name!r} is in a residual stream, which stays in float. Write "
            f"jm.Rule({rule.glob!r}, residual_bits=16, {field}={value!r})."
        )
    direction = "after" if kinds == ["activation"] else "before"
    is_a, near = _described(graph, config, rule, tensors, nodes, direction)
    near = [t for t in near if t.kind in kinds and t.owner is None]
    near = [t for t in near if t.blocks or field != "block"]
    near = [t for t in near if field not in t.ignores]
    wanted = " or ".join(f"{'an' if k == 'activation' else 'a'} {k}" for k in kinds)
    if not near:
        return f"{is_a}; {field} is for {wanted}. Drop it, or name another node."
    write = f"jm.Rule({near[0].name!r}, {field}={value!r})"
    return f"{is_a}; {field} is for {wanted} with a quantizer. Write {write}."


def _described(
    graph: Graph,
    config: QuantConfig,
    rule: Rule,
    tensors: Sequence[Tensor],
    nodes: Sequence[Node],
    direction: str,
) -> tuple[str, list[Tensor]]:
    """What the first thing is that a rule names, and the tensors around it, nearest first."""
    owner, is_a = None, ""
    if nodes:
        node = owner = nodes[0]
        is_a = f"{node.name!r} is {_kind(node)}"
        if not any(t.kind == "activation" and t.name == node.name for t in tensors):
            is_a += " whose output has no quantizer"
            if config.placement == "products":
                is_a += " (placement='products' quantizes what enters a product)"
    else:
        name = next(
            (p for n in graph.nodes for p in n.parameters if match(rule.glob, p)), None
        )
        owner = next((n for n in graph.nodes if name in n.parameters), None)
        if name is None or owner is None:
            reasons = [
                f"{n!r} is {why}" for n, why in graph.unread if match(rule.glob, n)
            ]
            return (reasons or [f"{rule.glob!r} is a parameter that no layer reads"])[
                0
            ], []
        part = (
            "a weight"
            if owner.weight and name in owner.weight.parameters
            else "the bias"
        )
        part = "a parameter" if part == "the bias" and name != owner.bias else part
        is_a = f"{name!r} is {part} of {owner.name!r}"
    return is_a, _around(graph, owner, tensors, direction)


def _kind(node: Node) -> str:
    kind = "layer" if node.is_layer else node.kind
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _around(
    graph: Graph, node: Node, tensors: Sequence[Tensor], direction: str
) -> list[Tensor]:
    """The tensors of a node, then of those in one direction, then in the other, by distance."""
    seen, queue = {node.name}, [node]
    for step in sorted(("after", "before"), key=lambda step: step != direction):
        row = [node]
        while row:
            if step == "after":
                names = [r.name for n in row for r in graph.consumers(n.name)]
            else:
                names = [e.node for n in row for e in n.inputs if e.node is not None]
            names = [n for n in dict.fromkeys(names) if n not in seen]
            seen |= set(names)
            row = [graph[n] for n in names]
            queue += row
    return [t for n in queue for t in tensors if n.name in t.names]
