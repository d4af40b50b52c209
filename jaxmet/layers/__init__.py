"""What transforms share: layers, channels, statistics and placement; no equation.

Read first, for a new transform: `docs/new-transform.md`, which names the function of each idea.

eligibility      may a layer or norm be changed, and the one wording of each reason
layer            a weight as (groups, inputs, outputs), and back
channels         values along the channel axes of a weight, grouped and joined ones too
leaf_math        a leaf times, plus or replaced by an array, in wide precision
once             work on weights that runs once, in NumPy
collect          statistics of nodes over batches: a hook and a merge
inputs           what a layer reads, as rows
grams            products of what layers read, over all data
gradients        gradients of the outputs by weights and by inputs of products
moments/         mean and variance of every tensor, from the statistics of norms
lockstep         a float and a quantized copy of a model, run piece by piece
observed_ranges  ranges of activations over batches
entering_values  values that layers divide or rotate, as values of the nodes that made them
transformed_layers  which layers can divide or rotate what they read
placement/       which weights and values get a quantizer
new_quantizers   quantizers of a configuration, before they hold a range
fake_quantized   values and weights quantized while a model is replayed
matching         whether quantizers belong to a graph
reference        the float model that a quantized one is compared with
deployed         what a target runs: the simulation without folded norms
folds/           which norm can be folded into which products, and what the fold leaves
arguments        keys, keyword arguments and batches, checked before any work
asked_ratios     one ratio for all layers, or one by name
checkpoint       steps of a long run on disk, so that it can resume
"""
