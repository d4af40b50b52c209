"""Programs on arrays of which only some channels are left.

partial           an array some of whose channels are not computed
part_moves        views, slices, concatenations and padding of parts
part_arithmetic   pointwise equations, sums, dots and convolutions of parts
factor_views      two factors seen through the views that a model takes of their weight
opened_leaves     leaves as equations meet them: arrays, parts, or two factors
expand            the program that a pruned or factorized tree stands for
"""
