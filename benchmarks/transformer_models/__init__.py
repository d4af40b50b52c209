"""A trained sentence encoder: the network, its weights, its sentences and figures of merit."""
