"""Which way each weight is rounded: arrays alone, all groups of a product at once.

A layer is its weight (groups, ins, outs), with ins the window times the input channels of
one group; layers of one shape are concatenated along groups. Inputs come as Gram matrices
(groups, ins, ins), means over rows of products of two inputs, or as rows themselves.

levels         the grid of a layer, and its integers
quadratic      the error of the output as a quadratic form; the best real weights; the bias
search         which share of its range each channel, block or tensor had best cover
coordinate     descent over the integers, one input at a time, from nearest or by GPTQ
scales         the best scales for given integers
soft_rounding  AdaRound: a smooth choice between up and down, learnt by Adam
"""
