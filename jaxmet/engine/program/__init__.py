"""From one call of a model to a flat program.

compat    what changed between JAX releases
calls     one call of a model: its arrays, and what is static
bound_model
          a model with its static keyword arguments filled in
known     equations of known values, computed once
program   a jaxpr as a flat list of equations, calls inlined, loops as regions
scopes    whose equation it is, in the name scopes of a trace
"""
