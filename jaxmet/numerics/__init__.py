"""The formulas, on arrays alone: no tree, no model.

fake_quant         rounding to a grid and back, with straight-through gradients
grid               how many bits, and where the integers start and end
ranges             from the range of a tensor to the scale and zero point of its grid
histogram          a histogram of a stream, the same in whatever order it comes
calibrators/       the range that serves values best: percentile, MSE, SQNR, entropy
norm               the gain of a norm with stored statistics, and how it moves
scaling            scales that move range from one layer to the next
moments            mean, variance and range: measured, merged, and through activations
absorb             what a rectifier never takes away, moved after it
low_rank           a matrix as a product of two thin ones, best for given inputs
channel_selection  which input channels a layer can best do without
lasso              few coefficients that do the work of many
least_squares      weights from products of inputs, which may say little or nothing
ratios             which ratio each layer is compressed to, from a table of scores
knapsack           one option for each layer, the best within a budget
"""
