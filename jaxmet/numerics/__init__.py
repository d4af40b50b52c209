"""The formulas, on arrays alone: no tree, no model.

fake_quant         rounding to a grid and back, with straight-through gradients
grid               how many bits, and where the integers start and end
ranges             from the range of a tensor to the scale and zero point of its grid
histogram          a histogram of a stream, the same in whatever order it comes
calibrators/       the range that serves values best: percentile, MSE, SQNR, entropy
learned_ranges     ranges that are trained, and stay valid after any step
rounding/          which way each weight is rounded: AdaRound, GPTQ, descent over integers
norm               the gain of a norm with stored statistics, and how it moves
scaling            scales that move range from one layer to the next
hadamard           rotations that spread outliers over all channels
smoothing          scales that move the range of activations into weights
rounding_noise     channel scales that keep the noise of rounding small beside the signal
moments            mean, variance and range: measured, merged, and through activations
absorb             what a rectifier never takes away, moved after it
low_rank           a matrix as a product of two thin ones, best for given inputs
channel_selection  which input channels a layer can best do without
lasso              few coefficients that do the work of many
least_squares      weights from products of inputs, which may say little or nothing
ratios             which ratio each layer is compressed to, from a table of scores
knapsack           one option for each layer, the best within a budget
minimise           a quasi-Newton method with the function in one place of its program
fixed_point        fixed points of maps that bring points no further apart
drawn_order        positions in a random order that is quick to compile
packed             matrices of many layers in two arrays
precision          the dtype to compute in
xp                 array functions in NumPy or `jax.numpy`, by what they are given
"""
