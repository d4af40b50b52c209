"""The equations of a jaxpr in a form that two programs can be compared in.

Every value is named by a hash of what computes it: the operation, its parameters and the names
of its operands. So two programs have equal lists of names exactly if they apply the same
operations to the same values. Calls are inlined, and what no output needs is left out.
"""

import hashlib

import jax
import numpy as np
from jax.extend.core import Literal

CALLS = ("jit", "pjit", "closed_call", "core_call")
# Functions, names, and where the operands of a loop begin, which are compared by use.
IGNORED = {"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "name", "debug_info", "jaxpr"}
IGNORED |= {"linear", "num_consts", "ft_in", "ft_out", "_split_transpose", "out_trees"}


class Program:
    """Names of the outputs, and of all equations in their order."""

    def __init__(self, jaxpr, inputs=None):
        self.equations, self.numbers = [], {}
        inner = jaxpr.jaxpr if hasattr(jaxpr, "consts") else jaxpr
        if inputs is None:
            inputs = [
                _named("input", i, str(v.aval)) for i, v in enumerate(inner.invars)
            ]
        self.outputs = self.inline(jaxpr, inputs)

    def constant(self, value):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        name = _named("constant", array.dtype.name, array.shape, array.tobytes())
        self.numbers[name] = array
        return name

    def inline(self, jaxpr, inputs):
        inner, constants = _opened(jaxpr)
        names = dict(zip(inner.invars, inputs, strict=True))
        names |= {
            v: self.constant(c) for v, c in zip(inner.constvars, constants, strict=True)
        }

        def read(atom):
            if isinstance(atom, Literal):
                return self.constant(np.asarray(atom.val, atom.aval.dtype))
            return names.get(atom, "dead")

        for equation in _live(inner):
            operands = [read(a) for a in equation.invars]
            results = self.run(equation, operands)
            names.update(zip(equation.outvars, results, strict=True))
        return [read(a) for a in inner.outvars]

    def run(self, equation, operands):
        name, p = equation.primitive.name, equation.params
        if name in CALLS:
            return self.inline(p.get("jaxpr", p.get("call_jaxpr")), operands)
        number = self.numbers.get(operands[0]) if operands else None
        if name == "convert_element_type" and number is not None and not number.ndim:
            return [self.constant(number.astype(p["new_dtype"]))]  # by JAX, in tracing
        if name == "clamp" and equation.outvars[0].aval.dtype == np.int32:
            return [
                operands[1]
            ]  # of an index: `lax.switch` clamps what was clamped before
        stated = {k: _said(v) for k, v in p.items() if k not in IGNORED}
        if "jaxpr" in p:
            body, _ = _opened(p["jaxpr"])
            used = [i for i, v in enumerate(body.invars) if v in _needed(body)]
            order = {i: _named("input", k) for k, i in enumerate(used)}
            inside = [order.get(i, "dead") for i in range(len(body.invars))]
            stated["body"] = Program(p["jaxpr"], inside).summary()
            operands = [operands[i] for i in used]
        found = _named(name, sorted(stated.items()), operands)
        self.equations.append(found)
        return [_named(found, i) for i in range(len(equation.outvars))]

    def summary(self):
        return self.outputs, sorted(self.equations)


def _opened(jaxpr):
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, [])


def _named(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _said(value):
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return Program(value).summary()
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return [_said(v) for v in value]
    return (
        "function" if callable(value) and not isinstance(value, type) else repr(value)
    )


def _read(equation):
    """The variables that an equation reads, of a loop those that its body uses."""
    atoms = equation.invars
    if equation.primitive.name == "scan":
        body, _ = _opened(equation.params["jaxpr"])
        needed = _needed(body)
        pairs = zip(atoms, body.invars, strict=True)
        atoms = [a for a, inside in pairs if inside in needed]
    return [a for a in atoms if not isinstance(a, Literal)]


def _needed(jaxpr):
    needed = {a for a in jaxpr.outvars if not isinstance(a, Literal)}
    return needed.union(*map(_read, _live(jaxpr)))


def _live(jaxpr):
    live = {a for a in jaxpr.outvars if not isinstance(a, Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or live.intersection(equation.outvars):
            live.update(_read(equation))
            kept.append(equation)
    return kept[::-1]
