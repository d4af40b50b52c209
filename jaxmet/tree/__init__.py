"""What passes between the floors: leaf types, quantizers, names, tables, files.

leaves         `jm.Compressed`, the leaf that says what a plain array cannot
structures     `jm.LowRank` and `jm.Pruned`
quantized      `jm.Quantized`, a weight as integers
plain_arrays   `jm.densify` and `jm.rebuild`
named_leaves   a tree as leaves by name, and back; how each of them is stored
globs          the globs that select names of parameters and nodes
quantizer      `jm.Quantizer`, the quantizer of one tensor
quantizers     `jm.Quantizers`, the tree beside `params`
bias_scales    the scales of int32 biases
grids          `jm.grids`: the ends of quantizers and their switches as data
host_rounding  weights rounded in NumPy, as `Quantizer` rounds them
config         `jm.QuantConfig`
rule           `jm.Rule`
config_fields  what their fields mean, and which values they have
presets        configurations that have a name in the field
targets/       `jm.Target`, the runtimes that a configuration can be for
aimet_config   AIMET's configuration files
batched_data   `jm.batched`
batches        one form of all batches, and masks of where values count
examples       single examples out of batches
table          `jm.Table`
files          `jm.save` and `jm.load`
stored_trees   trees, quantizers and tables as arrays and a manifest
writing        paths that are checked, and files that appear when they are complete
checks         checks of arguments, in one wording
packages       optional packages, refused in one wording
types          types that public signatures share
version        the version of the package
"""
