"""Norms folded into products: which, and what the fold leaves.

norm_parameters  where a norm keeps its parameters
fold_plans       which norm can be folded into which products
folded_weights   weights as a fold would leave them
folded_shift     the shift of a folded norm, as the bias of its product
"""
