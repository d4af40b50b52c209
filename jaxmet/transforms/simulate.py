"""The model as an integer device would compute it: every quantizer in its place."""

from typing import Any

import jax

from jaxmet.engine.frontends import check_apply
from jaxmet.engine.graph.graph import Graph, trace
from jaxmet.engine.graph.node import Node
from jaxmet.engine.program.calls import Apply
from jaxmet.engine.run.replay import Run, evaluate
from jaxmet.layers.fake_quantized import (
    fake_quantize_operands,
    fake_quantize_output,
    fake_quantize_params,
)
from jaxmet.transforms.dynamic import Dynamic
from jaxmet.tree.checks import check_flags, check_type, is_concrete, tested
from jaxmet.tree.globs import suggestion
from jaxmet.tree.grids import Grids
from jaxmet.tree.named_leaves import named_leaves
from jaxmet.tree.quantizers import Quantizers, check_are_quantizers
from jaxmet.tree.types import P


def simulate(
    apply: Apply,
    quantizers: Quantizers | Dynamic,
    *,
    grids: Grids | None = None,
    weights: bool = True,
    fold: Graph | None = None,
    cpu_formulations: bool = True,
) -> Apply:
    r"""The same model with weights and activations quantized by `quantizers`.

    The result is called like `apply`, gives what `apply` gives (any pytree), and trains:
    rounding passes gradients straight through to `params` where nothing is clipped, and the
    quantizers get theirs as `Quantizer.learn` says. It runs trees with `Compressed` leaves.
    `grids` (from
    `jm.grids`) overrides grid ends and switches as data, so that a sweep over bit-widths
    compiles once. `weights=False` expects a tree of `jm.round_weights` and rounds
    no parameter again. Each call traces `apply` again: wrap the result in `jax.jit`.

    `fold`, the graph in inference mode, rounds each weight as it will be when its norm is
    folded into it: $Q(W g)/g$ with $g = \gamma/\sqrt{\sigma^2+\varepsilon}$ from the
    running variance. The norm itself runs as the model says, on batch statistics in
    training. `quantizers` are those of the folded tree then.

    `jm.dynamic(bits=8)` in place of quantizers finds every range on the fly.

    Jacob et al., [Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference](https://arxiv.org/abs/1712.05877), CVPR 2018;
    Krishnamoorthi, [Quantizing Deep Convolutional Networks for Efficient
    Inference](https://arxiv.org/abs/1806.08342), 2018, section 3.2, for `fold`.

    Args:
        apply: the model, a pure function `apply(params, *inputs, **kwargs)`.
        quantizers: the quantizers of `jm.calibrate`, or `jm.dynamic(…)`.
        grids: what `jm.grids(quantizers)` returned: other grid ends and switches, as data;
            default None: those of the quantizers.
        weights: whether parameters are rounded at each call; False for a tree of
            `jm.round_weights`. Default True.
        fold: the graph in inference mode: round each weight as it will be when its norm is
            folded; default None.
        cpu_formulations: whether convolutions that XLA:CPU runs slowly are computed in an equal
            form there, as in `jm.evaluate`; default True.

    Returns:
        A function like `apply`, differentiable by `params`.

    Raises:
        ValueError: where `quantizers` names a node that the model does not run, where a
            quantizer holds NaN, and, with `fold`, where statistics are missing in `params`.

    >>> device = jax.jit(jm.simulate(model.apply, quantizers))
    >>> logits = device(params, images)
    """
    check_flags("simulate", weights=weights, cpu_formulations=cpu_formulations)
    check_apply(apply, "simulate")
    if not isinstance(quantizers, Dynamic):
        cure = "Pass apply first, and then what jm.calibrate or jm.dynamic returned."
        check_type("simulate", "quantizers", quantizers, Quantizers, cure)
    if grids is not None and isinstance(quantizers, Dynamic):
        raise ValueError(
            "jaxmet.simulate: jm.dynamic finds its quantizers at every call, so grids= has nothing "
            "to override. Calibrate, and pass the Quantizers that grids= is of."
        )
    _check_grids_and_fold("simulate", grids, fold)
    if isinstance(quantizers, Quantizers):
        _check_stated(quantizers)

    def simulated(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        seen: set[str] = set()
        found = quantizers
        if isinstance(found, Dynamic):
            graph = trace(apply, params, *inputs, **kwargs)
            found = found.quantizers(graph, named_leaves(params))

        def hook(node: Node, run: Run, operands: tuple[Any, ...]) -> tuple[Any, None]:
            seen.add(node.name)
            operands = fake_quantize_operands(node, run, operands, found, grids)
            return fake_quantize_output(node, run, run(*operands), found, grids), None

        if weights:
            params = fake_quantize_params(params, found, grids, fold)
        run = evaluate(apply, hook, cpu_formulations=cpu_formulations)
        outputs, _ = run(params, *inputs, **kwargs)
        known = seen | named_leaves(params).keys()
        missing = [name for name in found.activations if name not in seen]
        missing += [name for name in found.weights if name not in known]
        for name in missing[:1]:
            raise ValueError(
                f"jaxmet.simulate: the quantizers have one for {name!r}, which this "
                f"model does not run. {suggestion(name, known)} Calibrate again for it."
            )
        return outputs

    return simulated


def _check_grids_and_fold(caller: str, grids: Any, fold: Any) -> None:
    if grids is not None:
        cure = "Pass what jm.grids(quantizers) returns."
        check_type(caller, "grids", grids, Grids, cure)
    if fold is not None:
        cure = "Pass what jm.trace returned for the model in inference mode."
        check_type(caller, "fold", fold, Graph, cure)


def _check_stated(quantizers: Quantizers) -> None:
    """Refuse quantizers that training has lost, where their numbers are known."""
    for group in (quantizers.weights, quantizers.activations):
        for name, q in group.items():
            leaves = [a for a in jax.tree.leaves(q) if is_concrete(a)]
            if any(tested("isnan", a).any() for a in leaves):
                raise ValueError(
                    f"jaxmet.simulate: the quantizer of {name!r} is NaN, as a step with NaN "
                    "gradients leaves it. Go back to a checkpoint, and wrap the optimizer "
                    "in optax.apply_if_finite."
                )


def round_weights(
    params: P,
    quantizers: Quantizers,
    *,
    grids: Grids | None = None,
    fold: Graph | None = None,
) -> P:
    """The same tree with every quantized parameter on its grid.

    What `simulate` does at each call, with `fold` too, done once: pass the result to
    `simulate(…, weights=False)`. Weights that the model derives from several parameters
    are not in the tree and are still rounded where they are used.

    Args:
        params: the parameter tree, whatever the model takes first; not changed.
        quantizers: the quantizers of `jm.calibrate` for this tree.
        grids: what `jm.grids(quantizers)` returned: other grid ends and switches, as data;
            default None: those of the quantizers.
        fold: the graph in inference mode: round each weight as it will be when its norm is
            folded; default None.

    Returns:
        The same tree with rounded weights.

    Raises:
        ValueError: for a quantizer of a parameter that the tree does not have.

    >>> rounded = jm.round_weights(params, quantizers)
    >>> fast = jax.jit(jm.simulate(model.apply, quantizers, weights=False))
    """
    check_are_quantizers(quantizers, "round_weights")
    _check_grids_and_fold("round_weights", grids, fold)
    quantizers.leaves(params, "round_weights")
    return fake_quantize_params(params, quantizers, grids, fold)
