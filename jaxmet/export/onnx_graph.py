"""An ONNX graph with its nodes by what they make and by what they read, and changes of it."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

INTEGERS = "/integers"
"""What follows the name of a node in that of its integers."""


SAME_NUMBERS = ("Reshape", "Identity", "Unsqueeze", "Expand")
LAYOUT = (
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Expand", "Gather", "Tile",
)  # fmt: skip
"""Operations whose results have no values but those of their input."""


class OnnxGraph:
    """A graph with its nodes by what they make and by what they read."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.read()

    def read(self) -> None:
        """Look again, after a change."""
        self.producers = {out: n for n in self.graph.node for out in n.output}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        self.outputs = {o.name for o in self.graph.output}
        self.arrays = {i.name: i for i in self.graph.initializer}
        values = (*self.graph.value_info, *self.graph.input, *self.graph.output)
        self.types = {v.name: v.type.tensor_type.elem_type for v in values}

    def constant(self, name: str) -> np.ndarray | None:
        """The numbers of an initializer, also through a Reshape, or one number spread out."""
        from onnx import numpy_helper

        if name in self.arrays:
            return numpy_helper.to_array(self.arrays[name])
        node = self.producers.get(name)
        if node is None or node.op_type not in SAME_NUMBERS:
            return None
        found = self.constant(node.input[0])
        if node.op_type == "Expand" and found is not None and found.size != 1:
            return None
        return found

    def add_constant(self, name: str, array: np.ndarray) -> str:
        """A new initializer; the name that it got."""
        from onnx import numpy_helper

        while name in self.arrays:
            name += "_"
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        self.graph.initializer.append(tensor)
        self.arrays[name] = self.graph.initializer[-1]
        return name

    def is_float(self, name: str) -> bool:
        """Whether a value holds floats, as far as is known."""
        from onnx import TensorProto

        if name in self.arrays:
            return self.arrays[name].data_type == TensorProto.FLOAT
        kind = self.types.get(name, TensorProto.FLOAT)
        return bool(name) and kind == TensorProto.FLOAT

    def only_consumer(self, name: str) -> Any | None:
        """The one node that reads a value, where no other and no output does."""
        found = self.consumers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outputs else None

    def replace(self, old: str, new: str) -> None:
        """Whoever reads `old` reads `new`."""
        for node in self.consumers.pop(old, []):
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new
                    self.consumers[new].append(node)

    def insert(self, before: Any, kind: str, *inputs: str, **options: Any) -> str:
        """A new node in front of another; the name of what it makes."""
        from onnx import helper

        name = f"{before.output[0]}_{kind.lower()}"
        while name in self.producers:
            name += "_"
        node = helper.make_node(kind, list(inputs), [name], name=name, **options)
        at = next(i for i, n in enumerate(self.graph.node) if n is before)
        self.graph.node.insert(at, node)
        self.read()
        return name

    def rename(self, old: str, new: str) -> str:
        """Another name for a value that is no input or output; the name that it got."""
        taken = {i.name for i in (*self.graph.input, *self.graph.initializer)}
        taken |= set(self.producers) | self.outputs
        if old not in self.producers or old in self.outputs or not new or new == old:
            return old
        while new in taken:
            new += "_"
        for node in self.graph.node:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == old:
                        names[i] = new
        for value in self.graph.value_info:
            if value.name == old:
                value.name = new
        self.read()
        return new

    def prune(self) -> None:
        """Drop what nothing reads."""
        while True:
            self.read()
            used = set(self.consumers) | self.outputs
            dead = [n for n in self.graph.node if not used & set(n.output)]
            if not dead:
                break
            for node in dead:
                self.graph.node.remove(node)
        for tensor in [
            t for t in self.graph.initializer if t.name not in self.consumers
        ]:
            self.graph.initializer.remove(tensor)
        self.read()


def nodes_of(graph: OnnxGraph, *kinds: str) -> Iterator[Any]:
    return iter([n for n in graph.graph.node if n.op_type in kinds])


def attribute(node: Any, name: str, default: Any = None) -> Any:
    from onnx import helper

    found = [helper.get_attribute_value(a) for a in node.attribute if a.name == name]
    return found[0] if found else default


def set_attributes(node: Any, **options: Any) -> None:
    from onnx import helper

    for name, value in options.items():
        for old in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(old)
        node.attribute.append(helper.make_attribute(name, value))


def redirect(graph: OnnxGraph, old: str, new: str) -> None:
    """Whoever reads `old`, an output of the model too, gets `new`."""
    if old not in graph.outputs:
        graph.replace(old, new)
        return
    graph.graph.node.remove(graph.producers[old])
    producer = graph.producers[new]
    producer.output[list(producer.output).index(new)] = old
    graph.read()
    graph.replace(new, old)


def value_info(graph: OnnxGraph, name: str) -> Any | None:
    every = (*graph.graph.value_info, *graph.graph.input, *graph.graph.output)
    return next((v for v in every if v.name == name), None)


def rank_of(graph: OnnxGraph, name: str) -> int | None:
    value = value_info(graph, name)
    return None if value is None else len(value.type.tensor_type.shape.dim)


def sizes_of(graph: OnnxGraph, name: str) -> list[int] | None:
    """The sizes of a value, 0 for those that are no numbers; None where nothing is known."""
    value = value_info(graph, name)
    if value is None:
        return None
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def size_of(graph: OnnxGraph, name: str, axes: Any) -> float | None:
    value = value_info(graph, name)
    if value is None:
        return None
    sizes = [value.type.tensor_type.shape.dim[i].dim_value for i in axes]
    return float(np.prod(sizes)) if all(sizes) else None
