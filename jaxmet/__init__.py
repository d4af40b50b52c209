"""Quantize and compress trained JAX networks while preserving accuracy.

jaxmet traces `apply(params, *inputs)` to a jaxpr to find the layers of a model, and offers
pure functions over the parameter tree. A short tour:

    graph      = jm.trace(model.apply, params, images[:1])
    params     = jm.fold_batch_norm(params, graph)
    params     = jm.equalize(params, graph)
    quantizers = jm.calibrate(params, graph, jm.batched(images, batch_size=32))
    device     = jax.jit(jm.simulate(model.apply, quantizers))
    logits     = device(params, images)

or all of it at once: `params, quantizers, table = jm.ptq(model.apply, params, batches)`.
"""

from jaxmet import export as export
from jaxmet import numerics as numerics
from jaxmet import plot as plot
from jaxmet.analysis.compare import compare as compare
from jaxmet.analysis.cost import cost as cost
from jaxmet.analysis.cost import widths as widths
from jaxmet.analysis.noise import noise as noise
from jaxmet.analysis.ptq import ptq as ptq
from jaxmet.analysis.ratios import score_ratios as score_ratios
from jaxmet.analysis.ratios import select_ratios as select_ratios
from jaxmet.analysis.sensitivity import sensitivity as sensitivity
from jaxmet.engine.frontends import functional as functional
from jaxmet.engine.graph.graph import Graph as Graph
from jaxmet.engine.graph.graph import trace as trace
from jaxmet.engine.run.replay import evaluate as evaluate
from jaxmet.engine.run.segments import segments as segments
from jaxmet.numerics.fake_quant import fake_quant as fake_quant
from jaxmet.plot.html_report import report as report
from jaxmet.transforms.absorb_bias import absorb_bias as absorb_bias
from jaxmet.transforms.calibrate import calibrate as calibrate
from jaxmet.transforms.correct_bias import correct_bias as correct_bias
from jaxmet.transforms.dynamic import dynamic as dynamic
from jaxmet.transforms.equalize import equalize as equalize
from jaxmet.transforms.factorize import factorize as factorize
from jaxmet.transforms.fold import fold_batch_norm as fold_batch_norm
from jaxmet.transforms.lift import lift as lift
from jaxmet.transforms.optimizer_labels import optimizer_labels as optimizer_labels
from jaxmet.transforms.plan import plan as plan
from jaxmet.transforms.prune import prune as prune
from jaxmet.transforms.quantize import quantize as quantize
from jaxmet.transforms.reestimate import reestimate_batch_norm as reestimate_batch_norm
from jaxmet.transforms.rotate import rotate as rotate
from jaxmet.transforms.rounding import adaround as adaround
from jaxmet.transforms.rounding import search_scales as search_scales
from jaxmet.transforms.rounding.methods import Adam as Adam
from jaxmet.transforms.rounding.methods import Coordinate as Coordinate
from jaxmet.transforms.rounding.methods import Gptq as Gptq
from jaxmet.transforms.rounding.methods import Gram as Gram
from jaxmet.transforms.simulate import round_weights as round_weights
from jaxmet.transforms.simulate import simulate as simulate
from jaxmet.transforms.smooth import smooth as smooth
from jaxmet.tree import targets as targets
from jaxmet.tree.batched_data import batched as batched
from jaxmet.tree.config import QuantConfig as QuantConfig
from jaxmet.tree.files import load as load
from jaxmet.tree.files import save as save
from jaxmet.tree.grids import grids as grids
from jaxmet.tree.leaves import Compressed as Compressed
from jaxmet.tree.plain_arrays import densify as densify
from jaxmet.tree.plain_arrays import rebuild as rebuild
from jaxmet.tree.quantized import Quantized as Quantized
from jaxmet.tree.quantizers import Quantizer as Quantizer
from jaxmet.tree.quantizers import Quantizers as Quantizers
from jaxmet.tree.rule import Rule as Rule
from jaxmet.tree.structures import LowRank as LowRank
from jaxmet.tree.structures import Pruned as Pruned
from jaxmet.tree.table import Table as Table
from jaxmet.tree.targets.target import Target as Target
from jaxmet.tree.version import __version__ as __version__
