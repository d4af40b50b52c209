"""Channels removed from every parameter that runs along them.

prune             `jm.prune`
coupled_channels  channels that can only be removed together
select_channels   which channels are removed first, and how many
uniform_ratio     the one ratio that leaves a share of the multiplications
refit             weights of the consumers, refitted by least squares
pruned_leaves     leaves of which only some entries are kept
prune_report      the table of a report
"""

from jaxmet.transforms.prune.prune import prune as prune
