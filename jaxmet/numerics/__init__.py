"""The formulas, on arrays alone: no tree, no model.

fake_quant   rounding to a grid and back, with straight-through gradients
grid         how many bits, and where the integers start and end
ranges       from the range of a tensor to the scale and zero point of its grid
norm         the gain of a norm with stored statistics, and how it moves
scaling      scales that move range from one layer to the next
"""
