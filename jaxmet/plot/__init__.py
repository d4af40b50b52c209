"""Pictures of tables, weights and graphs, on Altair.

`pip install altair vl-convert-python`, or the extra `plot`, installs what they need.

Each function takes what another one computed and returns a chart, which shows itself in a
notebook and can be changed like any other; `save` writes it to a file.

    chart = jm.plot.weight_ranges(params, graph, after=equalized)
    jm.plot.save(chart, "ranges.svg")

weight_ranges     `weight_ranges`
relative_ranges   `relative_weight_ranges`
channel_ranges    the numbers of both
histograms        `histograms`
counts            histograms of activations, in one pass over the data
compare_plot      `compare`
noise_plot        `noise`
sensitivity_plot  `sensitivity`
rounding_loss     `rounding_loss`
ratio_scores      `ratio_scores`
pareto            `pareto`
graph_plot        `graph`
node_positions    where its nodes stand
states            what was done to each of them
drawing           what all charts share
tables            tables as charts read them
picture_files     `save`
html_report       `jm.report`
verdict           its first lines
page              its page, which opens offline
"""

from jaxmet.plot.compare_plot import compare as compare
from jaxmet.plot.graph_plot import graph as graph
from jaxmet.plot.histograms import histograms as histograms
from jaxmet.plot.noise_plot import noise as noise
from jaxmet.plot.pareto import pareto as pareto
from jaxmet.plot.picture_files import save as save
from jaxmet.plot.ratio_scores import ratio_scores as ratio_scores
from jaxmet.plot.relative_ranges import relative_weight_ranges as relative_weight_ranges
from jaxmet.plot.rounding_loss import rounding_loss as rounding_loss
from jaxmet.plot.sensitivity_plot import sensitivity as sensitivity
from jaxmet.plot.weight_ranges import weight_ranges as weight_ranges
