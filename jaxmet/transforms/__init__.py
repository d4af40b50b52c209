"""The public transforms: params and graph in, params or quantizers out.

`docs/new-transform.md` shows how one is added.

fold/             batch norms into the products beside them
equalize/         cross-layer equalization
rotate            outliers of what dense layers read, spread by Hadamard transforms
smooth/           the range of activations into weights, across attention too
absorb_bias       high biases into the layer after a rectifier
calibrate         quantizers, with ranges from data or norms
data_free_ranges  ranges of activations from the statistics of norms
dynamic           quantizers that follow the tensor at hand
simulate          fake quantization of a model
plan              what will be quantized, before any data
correct_bias/     bias correction, with data and without
rounding/         AdaRound, GPTQ, and searched weight scales
quantize          weights as integers
lift              a model that runs any tree, and in integers
factorize         weights as two factors of lower rank
factors           how the two factors of a weight are laid out
prune/            channel pruning
reestimate        batch norm statistics, measured again
optimizer_labels  labels for `optax.multi_transform`
"""
