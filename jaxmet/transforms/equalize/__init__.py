"""Cross-layer equalization.

equalize         `jm.equalize`
eligible_groups  which channel groups are rescaled, and why the others are skipped
channel_scales   one vector of log scales for all channel groups, and back
noise_objective  the objective 'noise' of a network
measured         what data say of the products: ranges of inputs, effects on the outputs
expected         the same from the statistics of norms
norm_statistics  what norms say of inputs and outputs of products
carried          constants that channels carry, and how much layers read of them
headroom         how far a leaf can be rescaled in its dtype
"""

from jaxmet.transforms.equalize.equalize import equalize as equalize
