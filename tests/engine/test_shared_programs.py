"""Equal computations share a program, whatever their arguments are called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmet.engine.run.shared_programs import Program, ProgramSequence, placed

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """The seconds of each program that XLA compiles from now on."""
    found = []

    def listen(event, duration, **_):
        if event == COMPILED:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def block(name, other):
    def run(params, x):
        unused = jnp.sin(params[other]["w"])
        del unused
        y = jax.nn.relu(x["b"] @ params[name]["w"])
        return {"z" + name: y + x["a"], "a" + name: jnp.sum(y)}

    return run


def tree(names, rng):
    return {n: {"w": rng.normal(size=(37, 37)).astype(np.float32)} for n in names}


def test_equal_blocks_are_one_program(compiled):
    rng = np.random.default_rng(0)
    params = tree("pqr", rng)
    x = {"a": np.float32(3), "b": rng.normal(size=(5, 37)).astype(np.float32)}
    for i, (name, other) in enumerate(["pq", "qr", "rp"]):
        found = Program(block(name, other), params, x)(params, x)
        wanted = np.maximum(x["b"] @ params[name]["w"], 0)
        np.testing.assert_allclose(found["z" + name], wanted + 3, rtol=1e-5)
        np.testing.assert_allclose(found["a" + name], wanted.sum(), rtol=1e-5)
        if not i:
            first = len(compiled)
    assert first == 1
    assert len(compiled) == 1


def test_closed_over_arrays_are_data(compiled):
    x = np.arange(41, dtype=np.float32)
    for scale in (2.0, 3.0):
        table = jnp.full(41, scale)
        compiled.clear() if scale == 2.0 else None
        found = Program(lambda x, table=table: x * table - 1, x)(x)
        np.testing.assert_array_equal(found, x * scale - 1)
    assert len(compiled) <= 1


def test_functions_of_the_host_are_not_shared():
    x = np.ones(3, np.float32)
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    for factor in (2.0, 5.0):
        host = lambda v, f=factor: np.asarray(v) * np.float32(f)
        run = lambda v, host=host: jax.pure_callback(host, shape, v) + 1
        np.testing.assert_array_equal(Program(run, x)(x), x * factor + 1)


def test_other_shapes_types_and_numbers_are_other_programs():
    x = np.arange(6, dtype=np.float32)
    cases = [
        (lambda v: v + 1.0, x),
        (lambda v: v + 2.0, x),
        (lambda v: v + 1.0, x[:4]),
        (lambda v: v + 1.0, x.astype(np.float16)),
    ]
    for function, value in cases:
        found = Program(function, value)(value)
        np.testing.assert_array_equal(found, function(value))
        assert found.dtype == value.dtype


def test_results_that_are_arguments_or_numbers():
    found = Program(lambda a, b: (b, 1.5, a, b), 1.0, np.zeros(2))(2.0, np.ones(2))
    assert [np.shape(v) for v in found] == [(2,), (), (), (2,)]
    np.testing.assert_array_equal(found[0], 1.0)
    assert (float(found[1]), float(found[2])) == (1.5, 2.0)


def test_a_typed_key_and_a_loop():
    def run(key, x):
        body = lambda i, v: v + jax.random.normal(jax.random.fold_in(key, i), v.shape)
        return jax.lax.fori_loop(0, 3, body, x)

    key, x = jax.random.key(3), np.zeros(4, np.float32)
    np.testing.assert_allclose(Program(run, key, x)(key, x), run(key, x), rtol=1e-6)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_sequence_makes_each_from_the_one_before(ahead, compiled):
    def make(number, before):
        x = np.zeros(17, np.float32) if before is None else before.shapes
        return Program(lambda v: jnp.concatenate([v, v[:1]]) * (number + 2.5), x)

    sequence = ProgramSequence(make, 4, ahead=ahead)
    x = np.ones(17, np.float32)
    for number in range(4):
        x = sequence[number](x)
        assert x.shape == (18 + number,)
    sequence.close()
    np.testing.assert_array_equal(x, 2.5 * 3.5 * 4.5 * 5.5)
    assert len(compiled) <= 4


def test_errors_of_the_model_are_raised_where_it_is_made():
    def make(number, before):
        raise ValueError("no such piece")

    with pytest.raises(ValueError, match="no such piece"):
        ProgramSequence(make, 1, ahead=True)[0]


def test_where_the_user_put_an_array():
    x = jnp.ones(3)
    assert not placed({"a": x, "b": np.ones(2), "c": 1.0})
    assert placed({"a": x, "b": jax.device_put(x, jax.devices()[0])})


def test_inlined_functions_called_twice_and_arguments_that_only_they_leave_out():
    rng = np.random.default_rng(0)
    numbers = {n: rng.normal(size=3).astype(np.float32) for n in "abcd"}
    inner = jax.jit(lambda p, q: {"s": p - q, "m": p * q, "p": p}, inline=True)
    nested = jax.jit(lambda p, q: jnp.sin(p) if q is None else p, static_argnums=1)
    cases = [
        lambda v: inner(v["a"], v["b"])["s"],
        lambda v: inner(v["c"], v["d"])["s"],
        lambda v: inner(inner(v["a"], v["b"])["m"], v["c"])["s"],
        lambda v: inner(inner(v["a"], v["b"])["s"], v["c"])["s"],
        lambda v: [inner(v["d"], v["a"])["p"], inner(nested(v["b"], None), v["b"])],
        lambda v: jax.jit(lambda p, q: p + 1)(v["c"], v["d"]),
        lambda v: jax.jit(lambda p, q: q + 1)(v["c"], v["d"]),
    ]
    for case in cases:
        found = Program(case, numbers)(numbers)
        for got, wanted in zip(
            jax.tree.leaves(found), jax.tree.leaves(case(numbers)), strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_generators_of_random_numbers_that_the_text_does_not_name():
    data = jax.random.key_data(jax.random.key(0, impl="rbg"))
    for impl in ("rbg", "unsafe_rbg"):
        wrapped = lambda d, impl=impl: jax.random.wrap_key_data(d, impl=impl)
        found = Program(wrapped, data)(data)
        assert found.dtype == wrapped(data).dtype
