"""What each layer's compression costs in score, and which ratios a budget asks for.

score     `jm.score_ratios`
masked    a compressed model in the original shapes: one program for all ratios
select    `jm.select_ratios`
spending  what compressed layers cost, alone and together
"""

from jaxmet.analysis.ratios.score import score_ratios as score_ratios
from jaxmet.analysis.ratios.select import select_ratios as select_ratios
