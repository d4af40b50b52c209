"""Batches: cutting data up, and what is refused before any work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmet import batched
from jaxmet.tree.batches import as_batches


def data(rows=10):
    return np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)


@pytest.mark.parametrize("rows", [10, 8, 3, 4, 1])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_batched_batches_are_the_data(rows, convert):
    batches = batched({"a": convert(data(rows)), "b": np.arange(rows)}, batch_size=4)
    parts = list(batches)
    assert len(parts) == len(batches) == -(-rows // 4)
    assert [p["a"].shape[0] for p in parts[:-1]] == [4] * (len(parts) - 1)
    for key, whole in (("a", data(rows)), ("b", np.arange(rows))):
        np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), whole)
    if rows >= 4:
        assert batches.full["a"].shape == (rows // 4, 4, 3)
    assert type(parts[0]["a"]) is type(convert(data(1)))


def test_batched_is_a_tree():
    batches = batched(data(), 4)
    doubled = jax.tree.map(lambda x: 2 * x, batches)
    np.testing.assert_array_equal(np.concatenate(list(doubled)), 2 * data())
    total = jax.jit(
        lambda b: jax.lax.scan(lambda c, x: (c + x.sum(), None), 0.0, b.full)
    )
    assert total(batches)[0] == data()[:8].sum()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((data(10), data(9)), r"inputs\[1\] has 9 rows and inputs\[0\] has 10"),
        ({"x": np.float32(1)}, r"inputs\['x'\] is a scalar"),
        ([1.0, 2.0], r"inputs\[0\] is of type float"),
        (data(0), "no rows"),
        ((), "no array"),
        (jax.ShapeDtypeStruct((4, 3), jnp.float32), "ShapeDtypeStruct"),
    ],
)
def test_batched_refuses(inputs, message):
    with pytest.raises(ValueError, match=rf"jaxmet\.batched: .*{message}"):
        batched(inputs)


def test_batched_refuses_a_batch_size_of_zero():
    with pytest.raises(ValueError, match="batch_size is 0"):
        batched(data(), 0)


class Loader:
    """Starts again whenever it is iterated; says no length."""

    def __init__(self):
        self.started = 0

    def __iter__(self):
        self.started += 1
        return (data()[i : i + 4] for i in range(0, 10, 4))


def sources():
    parts = [data()[:4], data()[4:8], data()[8:]]
    return {
        "batched": (batched(data(), 4), 3),
        "list": (parts, 3),
        "generator": ((p for p in parts), None),
        "loader": (Loader(), None),
    }


@pytest.mark.parametrize("name", sources())
def test_all_forms_give_the_same_batches(name):
    source, length = sources()[name]
    batches = as_batches(source, "calibrate")
    assert batches.length == length and bool(batches)
    np.testing.assert_array_equal(batches.first[0], data()[:4])
    parts = list(batches)
    assert all(isinstance(p, tuple) and len(p) == 1 for p in parts)
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), data())
    if name == "generator":
        with pytest.raises(ValueError, match=r"jaxmet\.calibrate.*already read"):
            list(batches)
    else:
        assert len(list(batches)) == 3
    if name == "loader":
        assert source.started == 2  # looking at the first batch costs no pass


def test_tuples_are_splatted_and_inputs_picks():
    labelled = batched((data(), np.arange(10)), 4)
    assert [len(p) for p in as_batches(labelled, "f")] == [2, 2, 2]
    picked = as_batches(labelled, "f", inputs=lambda batch: batch[0])
    assert len(picked.first) == 1
    np.testing.assert_array_equal(np.concatenate([p[0] for p in picked]), data())
    named = as_batches([{"x": data(), "y": 0}], "f", inputs=lambda b: (b["x"], b["x"]))
    assert len(named.first) == 2


def test_other_libraries_arrays_become_numpy():
    class Tensor:
        shape, dtype = (2, 3), np.float32

        def __array__(self, dtype=None, copy=None):
            return data(2)

    (first,) = as_batches([Tensor()], "f").first
    assert isinstance(first, np.ndarray)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (data(), r"ndarray of shape \(10, 3\).*could be one.*jm\.batched"),
        (jnp.ones((2, 3)), r"of shape \(2, 3\).*jm\.batched"),
        ((data(), data()), r"a tuple of 2.*jm\.batched"),
        ({"x": data()}, r"of type dict.*jm\.batched"),
        ("images", r"a text"),
        (None, "of type NoneType"),
        (7, "of type int"),
        ([], "batches is empty"),
        (iter([]), "batches is empty"),
        ([data(0)], r"input 0 of the first batch is empty.*\(0, 3\)"),
        ([1.0], "holds of type float where an array belongs"),
        ([(data(), data() * np.nan)], "input 1 of the first batch has NaN"),
        ([{"x": jnp.asarray([np.inf])}], r"input 0\['x'\] of the first batch has NaN"),
        ([jnp.asarray([np.nan], jnp.bfloat16)], "NaN"),
        (jax.ShapeDtypeStruct((4, 3), jnp.float32), "shapes and no numbers"),
        ([jax.ShapeDtypeStruct((4, 3), jnp.float32)], "shapes and no numbers"),
    ],
)
def test_refused_with_the_cure(batches, message):
    with pytest.raises(ValueError, match=rf"jaxmet\.calibrate: .*{message}"):
        as_batches(batches, "calibrate")


def test_an_iterator_is_refused_before_it_is_touched_where_it_is_read_twice():
    source = iter([data()])
    with pytest.raises(ValueError, match=r"jaxmet\.adaround.*read 3 times.*list\("):
        as_batches(source, "adaround", passes=3)
    np.testing.assert_array_equal(next(source), data())
    assert len(list(as_batches([data()], "adaround", passes=3))) == 1


def test_integers_tracers_and_shapes_pass():
    as_batches([np.arange(4)], "f")
    jax.jit(lambda x: len(as_batches([x], "f").first))(data())
    shape = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    for source in (shape, (shape, shape), [shape], {"x": shape}):
        batches = as_batches(source, "ptq", abstract=True)
        assert batches.abstract and list(batches) == []
        assert len(batches.first) == (2 if isinstance(source, tuple) else 1)
    assert not as_batches([data()], "ptq", abstract=True).abstract


def test_printing_batches_shows_shapes_and_dtypes():
    images = {"x": np.zeros((10, 5, 3), np.float32), "y": (jnp.arange(10), None)}
    shown = repr(batched(images, 4))
    assert shown == (
        "Batched(2 batches of {'x': float32[4, 5, 3], 'y': (int32[4], None)}, "
        "the last of {'x': float32[2, 5, 3], 'y': (int32[2], None)})"
    )
    assert repr(batched(data(4), 4)) == "Batched(1 batch of float32[4, 3])"
    assert repr(batched(data(3), 4)) == "Batched(the last of float32[3, 3])"
    empty = jax.tree.map(lambda x: object(), batched(data(3), 4))
    assert "object" in repr(empty)
