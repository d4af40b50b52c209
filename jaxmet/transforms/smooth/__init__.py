"""The range of activations moved into weights.

smooth          `jm.smooth`
eligible_paths  which channels can be smoothed, and why the others cannot
path_scales     the scales, from what products read and from their weights
carried_scales  which layers can divide what they read themselves
"""

from jaxmet.transforms.smooth.smooth import smooth as smooth
