"""A copy of a network whose channels were rescaled by random factors: same function.

What a convolution makes may be multiplied by any factor a channel if the norm after it
expects that: its mean grows with the factor, the root of its variance plus epsilon too.
What a linear bottleneck makes may be multiplied by any factor a channel if all that
reads it, over residual additions too, divides by it. A ReLU6 stands after every other
norm, and of its inputs no factor is free.
"""

import copy
from typing import Any

import numpy as np

import jaxmet as jm
from dfq.networks import Tree

Array = np.ndarray[Any, Any]


def rescaled(
    variables: Tree, graph: jm.Graph, *, most: float = 100.0, seed: int = 0
) -> Tree:
    """The same function with factors between 1 and `most`, even in their logarithm."""
    rng, stress = np.random.default_rng(seed), _Leaves(variables)

    def factors(size: int) -> Array:
        return np.exp(rng.uniform(0, np.log(most), size))

    norms = {n.inputs[0].node: n.norm for n in graph.nodes if n.norm is not None}
    for layer, norm in norms.items():
        kernel = graph[layer].weight.name
        factor = factors(stress[kernel].shape[-1])
        stress[kernel] *= factor
        stress[norm.mean] *= factor
        grown = (stress[norm.variance] + norm.epsilon) * factor**2
        stress[norm.variance] = grown - norm.epsilon
    for group in graph.groups:
        if not group.free or group.clips:
            continue
        factor = factors(group.size)
        for layer in group.producers:
            stress[norms[layer].scale] *= factor
            stress[norms[layer].bias] *= factor
        for layer in group.consumers:
            kernel = graph[layer].weight.name
            depthwise = graph[layer].convolution.groups > 1
            stress[kernel] /= factor if depthwise else factor[:, None]
    return stress.tree()


class _Leaves:
    """The leaves of linen's variables by jaxmet's names, in float64 until the end."""

    def __init__(self, variables: Tree) -> None:
        self.variables = copy.deepcopy(variables)
        self.values: dict[str, Array] = {}

    def _branch(self, name: str) -> tuple[Tree, str]:
        *path, leaf = name.split("/")
        for collection in self.variables.values():
            branch = collection
            for key in path:
                branch = branch.get(key, {})
            if leaf in branch:
                return branch, leaf
        raise KeyError(name)

    def __getitem__(self, name: str) -> Array:
        if name not in self.values:
            branch, leaf = self._branch(name)
            self.values[name] = np.asarray(branch[leaf], np.float64)
        return self.values[name]

    def __setitem__(self, name: str, value: Array) -> None:
        self.values[name] = value

    def tree(self) -> Tree:
        for name, value in self.values.items():
            branch, leaf = self._branch(name)
            branch[leaf] = value.astype(np.float32)
        return self.variables
