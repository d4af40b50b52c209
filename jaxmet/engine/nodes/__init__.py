"""Equations gathered into nodes: what each computes, what it holds, what it is called.

records           what the finder of each kind knows of its group
cluster           a group of equations, and how far it reaches
products          products with their bias, ragged products and lookups
norms/            norms by what they compute
softmax           softmax, log-softmax and logsumexp
activations       the name and form of a pointwise group
pointwise         the largest cones of pointwise equations
grouping          all finders in their order, and what is left over
naming            what each node is called
scalar_function   an activation as a function of one number
attention_masks   which values hold masked entries, and which decide as a mask or index
divisors          which values something is divided by
"""
