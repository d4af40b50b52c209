"""What each layer's compression costs in score, and which ratios a budget asks for."""

from jaxmet.analysis.ratios.score import score_ratios as score_ratios
from jaxmet.analysis.ratios.select import select_ratios as select_ratios
