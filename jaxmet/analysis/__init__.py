"""Functions over transforms and scores.

ptq                `jm.ptq`: fold, equalize, calibrate, round, correct
cost               `jm.cost` and `jm.widths`
compare            `jm.compare`: the error of each node
noise              `jm.noise`: the predicted effect of each quantizer
noise_sums         its sums over examples
costliest          the quantizers that it finds to cost most
sensitivity        `jm.sensitivity`: the measured effect of each quantizer
scored_quantizers  the quantizers of a model by layer
scoring            a user's score of many variants of a model
ratios/            `jm.score_ratios` and `jm.select_ratios`
"""
