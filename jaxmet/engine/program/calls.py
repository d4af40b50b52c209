"""One call of a model: what of it is traced, what is static, and how to put it back."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax

from jaxmet.engine.program import compat
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.named_leaves import flatten, parameter_names

Apply = Callable[..., Any]


def is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


@dataclasses.dataclass(frozen=True, repr=False)
class Call:
    """The arrays of `apply(params, *args, **kwargs)`, apart from what is static."""

    apply: Apply
    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    inputs: tuple[Any, ...]
    input_paths: tuple[str, ...]
    rebuild: Callable[[Sequence[Any], Sequence[Any]], tuple[Any, tuple, dict]]

    def run(self, leaves: Sequence[Any], inputs: Sequence[Any]) -> Any:
        """The model on other arrays."""
        params, args, kwargs = self.rebuild(leaves, inputs)
        return self.apply(params, *args, **kwargs)

    def jaxpr(self) -> tuple[Any, Any]:
        """The closed jaxpr over leaves then inputs, and the shapes of the outputs."""
        abstract = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            if is_compressed(leaf)
            else leaf
            for leaf in self.leaves
        ]
        return jax.make_jaxpr(self.run, return_shape=True)(abstract, list(self.inputs))

    def other_batches(self) -> Iterator["Call"]:
        """The same call with batches of other sizes, the likeliest to run first.

        A batch of one, or one that is as long as another axis, leaves open which axis is
        which. The size is a prime that divides no other one, or a multiple of it where the
        model takes the batch apart (several crops of one image).
        """
        sizes = [x.shape[0] if _has_batch(x) else None for x in self.inputs]
        first = next((i for i, n in enumerate(sizes) if n is not None), None)
        every = [n for x in (*self.leaves, *self.inputs) for n in x.shape]
        if first is None or not all(isinstance(n, int) for n in every):
            return
        given, prime = self.inputs[first].shape[0], _prime_beside(every)
        same = {i for i, n in enumerate(sizes) if n == given}
        yield self.with_batch(prime, same)
        if given > 1:
            yield self.with_batch(prime * given, same)
        if same != {first}:
            yield self.with_batch(prime, {first})

    def with_batch(self, size: int, which: Collection[int]) -> "Call":
        """The same call where axis 0 of some inputs has another size."""
        inputs = [
            jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) if i in which else x
            for i, x in enumerate(self.inputs)
        ]
        return dataclasses.replace(self, inputs=tuple(inputs))


def _has_batch(x: Any) -> bool:
    return len(x.shape) > 0 and not compat.is_key(x)


def _prime_beside(sizes: Collection[int]) -> int:
    """A prime of which none of these sizes is a multiple."""
    number = 11  # small primes are sizes of windows and numbers of heads
    while any(number % k == 0 for k in range(2, number)) or any(
        n and n % number == 0 for n in sizes
    ):
        number += 1
    return number


def make_call(
    apply: Apply,
    params: Any,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    whole: bool = False,
) -> Call:
    """Tell the arrays of a call from its static arguments.

    Arrays, tracers and `jax.ShapeDtypeStruct`s are traced; everything else (flags, strings,
    Python numbers, functions) is static. A `Compressed` leaf counts as one array, a
    structured one as each of its parts, or with `whole` as the array it stands for.
    """
    _, all_leaves, tree = flatten(params, whole=whole)
    which = [i for i, leaf in enumerate(all_leaves) if is_array(leaf)]
    names = parameter_names(params, whole=whole)
    pairs, call_tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    dynamic = [i for i, (_, leaf) in enumerate(pairs) if is_array(leaf)]

    def rebuild(leaves, inputs):
        full, values = list(all_leaves), [leaf for _, leaf in pairs]
        for i, leaf in zip(which, leaves, strict=True):
            full[i] = leaf
        for i, leaf in zip(dynamic, inputs, strict=True):
            values[i] = leaf
        return tree.unflatten(full), *call_tree.unflatten(values)

    return Call(
        apply,
        tuple(names[i] for i in which),
        tuple(all_leaves[i] for i in which),
        tuple(pairs[i][1] for i in dynamic),
        tuple(jax.tree_util.keystr(pairs[i][0][1:]) for i in dynamic),
        rebuild,
    )
