"""Graph networks of jraph: a batch of graphs, and one large graph made of small ones."""

from typing import Any

import jax
import jax.numpy as jnp

from outside.model import Built, keys, model

NODES, EDGES, FEATURES = 8, 20, 6


def graphs(key: jax.Array, n: int) -> tuple[Any, ...]:
    """Nodes, senders and receivers of n graphs; every node has an edge to itself."""
    a, b = jax.random.split(key)
    nodes = jax.random.uniform(a, (n, NODES, FEATURES), minval=-1.0)
    ends = jax.random.randint(b, (n, EDGES, 2), 0, NODES)
    loops = jnp.broadcast_to(jnp.arange(NODES)[None, :, None], (n, NODES, 2))
    ends = jnp.concatenate([ends, loops], 1)
    return nodes, ends[..., 0], ends[..., 1]


def joined(key: jax.Array, n: int) -> tuple[Any, ...]:
    """The same graphs as one: node features, and edges as rows of two node numbers."""
    nodes, senders, receivers = graphs(key, n)
    offset = NODES * jnp.arange(n)[:, None]
    ends = jnp.stack([senders + offset, receivers + offset])
    return nodes.reshape(-1, FEATURES), ends.reshape(2, -1)


def tuple_of(nodes: Any, senders: Any, receivers: Any, edges: Any = None) -> Any:
    import jraph

    return jraph.GraphsTuple(
        nodes=nodes,
        edges=edges,
        senders=senders,
        receivers=receivers,
        globals=None,
        n_node=jnp.array([nodes.shape[0]]),
        n_edge=jnp.array([senders.shape[0]]),
    )


def dense(key: jax.Array, *sizes: int) -> list[Any]:
    source = keys(key)
    return [
        {
            "w": jax.random.normal(next(source), (m, n)) / m**0.5,
            "b": 0.1 * jax.random.normal(next(source), (n,)),
        }
        for m, n in zip(sizes, sizes[1:], strict=False)
    ]


def linear(p: Any, x: Any) -> Any:
    return x @ p["w"] + p["b"]


def mlp(p: Any, *x: Any) -> Any:
    x = jnp.concatenate([a for a in x if a is not None], -1)
    return linear(p[1], jax.nn.relu(linear(p[0], x)))


def gcn(params: Any, nodes: Any, senders: Any, receivers: Any) -> Any:
    import jraph

    graph = tuple_of(nodes, senders, receivers)
    for i, p in enumerate(params):
        graph = jraph.GraphConvolution(lambda x, p=p: linear(p, x))(graph)
        if i + 1 < len(params):
            graph = graph._replace(nodes=jax.nn.relu(graph.nodes))
    return graph.nodes


def gat(params: Any, nodes: Any, senders: Any, receivers: Any) -> Any:
    import jraph

    graph = tuple_of(nodes, senders, receivers)
    for query, logit in params:
        score = lambda s, r, e, p=logit: jax.nn.leaky_relu(
            linear(p, jnp.concatenate([s, r], -1))
        )
        graph = jraph.GAT(lambda x, p=query: linear(p, x), score, jax.nn.elu)(graph)
    return graph.nodes


def interaction(params: Any, nodes: Any, senders: Any, receivers: Any) -> Any:
    import jraph

    graph = tuple_of(nodes, senders, receivers, nodes[senders] - nodes[receivers])
    for edge, node in params:
        graph = jraph.InteractionNetwork(
            lambda e, s, r, p=edge: mlp(p, e, s, r), lambda n, r, p=node: mlp(p, n, r)
        )(graph)
    return graph.nodes


def network(params: Any, nodes: Any, senders: Any, receivers: Any) -> Any:
    import jraph

    graph = tuple_of(nodes, senders, receivers, nodes[senders] - nodes[receivers])
    graph = graph._replace(globals=jnp.zeros((1, 4)))
    edge, node, whole = params
    return jraph.GraphNetwork(
        lambda e, s, r, g: mlp(edge, e, s, r, g),
        lambda n, s, r, g: mlp(node, n, s, r, g),
        lambda n, e, g: mlp(whole, n, e, g),
    )(graph).globals[0]


def mapped(function: Any, params: Any) -> Built:
    """One function of a graph over a batch of graphs."""
    return Built(jax.vmap(function, (None, 0, 0, 0)), params, graphs)


def whole(function: Any, params: Any) -> Built:
    """A batch as one large graph with `edge_index`, as most code has it."""
    return Built(lambda p, x, e: function(p, x, e[0], e[1]), params, joined, whole=True)


def gcn_params(key: jax.Array) -> Any:
    return dense(key, FEATURES, 16, 16, 4)


def gat_params(key: jax.Array) -> Any:
    a, b = jax.random.split(key)
    queries = dense(a, FEATURES, 16, 8)
    return [(q, dense(b, 2 * q["w"].shape[1], 1)[0]) for q in queries]


@model("jraph GCN", "jraph")
def jraph_gcn(key):
    return mapped(gcn, gcn_params(key))


@model("jraph GCN, one graph", "jraph")
def jraph_gcn_whole(key):
    return whole(gcn, gcn_params(key))


@model("jraph GAT", "jraph")
def jraph_gat(key):
    return mapped(gat, gat_params(key))


@model("jraph GAT, one graph", "jraph")
def jraph_gat_whole(key):
    return whole(gat, gat_params(key))


@model("jraph interaction network", "jraph")
def jraph_interaction(key):
    pairs = jax.random.split(key, 4)
    edges = [dense(pairs[0], 18, 16, 8), dense(pairs[1], 24, 16, 8)]
    nodes = [dense(pairs[2], 14, 16, 8), dense(pairs[3], 16, 16, 4)]
    return mapped(interaction, list(zip(edges, nodes, strict=True)))


@model("jraph graph network", "jraph")
def jraph_network(key):
    a, b, c = jax.random.split(key, 3)
    params = dense(a, 22, 16, 8), dense(b, 26, 16, 8), dense(c, 20, 16, 4)
    return mapped(network, params)
