"""The only floor that knows jaxprs: trace, graph, evaluate, segments, lift.

A call becomes a program, its equations are gathered into named nodes, and two things are
made of those: a graph, which keeps what is static, and replays, which run them. Each folder
imports only from those above it; front-ends stand beside them.

program/     a call as a flat list of equations
axes/        labels that follow an axis, and views
backend/     what XLA:CPU does badly, in an equal form
integers/    equations on integers of grids, in place of floats
nodes/       groups of equations: products, norms, activations, masks, names
flow/        what is followed through a program: axes, live values, token masks
pruned/      the program of a pruned or factorized tree
graph/       what is static about nodes, their edges and channel groups
run/         a program run again with a hook at every node, whole or in segments
frontends/   flax nnx and equinox modules as pure functions
"""
