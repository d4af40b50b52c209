"""Bias correction.

correct_bias           `jm.correct_bias`
sequential_correction  with data, layer after layer
analytic               without data, from the statistics of norms
bias_parameters        the parameter that takes the correction of a layer
shared_biases          one correction for a bias that several layers add
"""

from jaxmet.transforms.correct_bias.correct_bias import correct_bias as correct_bias
