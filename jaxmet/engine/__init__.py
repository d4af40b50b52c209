"""The only floor that knows jaxprs: trace, graph, evaluate, segments, lift.

    program   a jaxpr as a flat list of equations, calls inlined, loops as regions
    labels    which axis of what is which channel: union-find over axis atoms
    rules     how each primitive carries labels from its operands to its results
    grouping  equations gathered into nodes: products, norms, activations, …
    naming    what each node is called
    graph     the result without equations or values, and `trace` that makes it
    replay    run a program again with a hook at every node
    segments  the same program cut at named nodes
    lift      run trees with `Compressed` leaves
    depthwise what XLA:CPU does badly, said otherwise
    nnx       the one file that knows flax
"""
