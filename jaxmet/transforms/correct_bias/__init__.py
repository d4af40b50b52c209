"""Bias correction."""

from jaxmet.transforms.correct_bias.correct_bias import correct_bias as correct_bias
