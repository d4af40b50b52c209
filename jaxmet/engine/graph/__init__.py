"""What is static about a model.

node             a node, its edges, and what only nodes of its kind have
analyse          from a call to its named nodes
operand_sources  where the operands of nodes come from
describe_norms   the parameters of a norm by role
describe         from groups of equations to nodes
channel_groups   channel groups, and the parameter axes along which they run
factor_names     the nodes of a model and of the same with factorized layers
node_table       a graph as a table
graph            `jm.trace` and the graph that it returns
operations       how much work the products of a program are
"""
