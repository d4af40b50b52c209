"""The only floor that knows jaxprs: trace, graph, evaluate, segments, lift.

A call becomes a program, its equations are gathered into named nodes, and two things
are made of those: a graph, which keeps what is static, and replays, which run them.

    compat        what changed between JAX releases
    calls         one call of a model: its arrays, and what is static
    program       a jaxpr as a flat list of equations, calls inlined, loops as regions
    labels        which axis is which: union-find over axis atoms
    views         equations that only look at an array differently
    rules         how labels pass through every other equation
    cluster       a group of equations: what it holds and how far it reaches
    products, norms/, softmax, pointwise, activations, grouping     how groups are found
    liveness      which values reach an output of the model
    naming        what each node is called
    analyse       all of the above, in order
    node, describe, channels, graph     what is static about nodes, and `trace`
    elementwise   an activation as a function of numbers
    arrivals      where a constant arrives that an activation's channels lose
    origins       where the operands of nodes come from
    attention_masks     which values hold masked entries, and which decide as a mask or index
    divisors      what something is divided by
    token_masks, token_mask_rules     where values count: `mask=` followed through a program
    replay        run a program again with a hook at every node
    collect       what a hook observes, merged over many batches
    once          a program that runs once
    rows          a product as one of matrices
    segments      the same program cut behind named nodes
    offset        what the padding of a convolution holds instead of zero
    lift          run trees with `Compressed` leaves
    cpu           what XLA:CPU does badly, said otherwise
    frontends     the one folder that knows flax and equinox
"""
