"""What is followed through a program from equation to equation.

axis_joins         what may be rescaled where values meet
axis_arithmetic    labels through arithmetic, norms, activations and products
axis_moves         labels through slices, concatenations, pools and gathers
axis_rules         labels through a whole program, loops and branches
example_mixing     whether examples of a batch may depend on each other
liveness           which values reach an output
bias_targets       which products a constant reaches that an activation loses
norm_gains         the gain and bias that a norm over the data stores
scale_flow         what a scale of the channels of one layer or norm reaches
scale_paths        where such a scale can be undone
token_mask_rules   where values count, by what each equation does to positions
token_masks        `mask=` followed through a program, loops and branches
"""
