"""Array functions that compute in NumPy on numbers and in `jax.numpy` on JAX arrays.

What runs once on weights must not wait for XLA, which takes far longer to compile a program
than NumPy takes to run it. Written with these functions one text serves both: on NumPy arrays
nothing is traced or compiled, and with a `jax.Array` among the arguments (traced by a `jit`
of the user's, or not) it is `jax.numpy`. Names and meanings are those that both libraries
share, those of the [array API standard](https://data-apis.org/array-api/latest/), and a few
that stand for `x.at[…]` and `jax.lax` at the end.

NumPy warns of overflows and of divisions by zero, which JAX does not: call inside
`numpy.errstate(all='ignore')`, as `layers.once.run_once` does.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer

if TYPE_CHECKING:
    Array = jax.Array  # NumPy's arrays do all that these do here
else:
    Array = jax.Array | np.ndarray | np.generic

# For programs whose compiling takes longer than running them. Options of a program go before
# JAX's own, so a level of 1 would be more than who disables optimizations asked for.
LEVEL = 0 if jax.config.read("jax_disable_most_optimizations") else 1
QUICK = {"xla_backend_optimization_level": LEVEL} | (
    {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
)

SHARED = frozenset(
    "abs all broadcast_to clip concatenate diagonal einsum exp full full_like isfinite log "
    "matmul max maximum mean min minimum moveaxis ones ones_like pad prod repeat sqrt "
    "square stack sum swapaxes take transpose where zeros zeros_like".split()
)
inf = float("inf")


def is_jax(*values: Any) -> bool:
    """Whether any of these, or of the lists and tuples among them, is a JAX array.

    Args:
        *values: arrays, numbers, and lists and tuples of them.

    Returns:
        Whether there is one; tracers are JAX arrays.
    """
    return any(
        is_jax(*v) if isinstance(v, list | tuple) else isinstance(v, jax.Array)
        for v in values
    )


def __getattr__(name: str) -> Any:
    if name not in SHARED:
        raise AttributeError(f"{__name__} has no function {name!r}")
    in_jax, in_numpy = getattr(jnp, name), getattr(np, name)

    def either(*args: Any, **options: Any) -> Any:
        if is_jax(*args, *options.values()):
            return in_jax(*args, **options)
        options.pop("precision", None)  # of products, which NumPy has only one of
        return in_numpy(*args, **options)

    either.__name__ = name
    globals()[name] = either  # looked up only once
    return either


def asarray(x: Any, dtype: Any = None) -> Any:
    """An array; a Python number has the default dtype of JAX.

    Args:
        x: an array or a number.
        dtype: the dtype of the result; default None: that of `x`.

    Returns:
        A JAX array of a JAX array, else a NumPy array.
    """
    if is_jax(x):
        return jnp.asarray(x, dtype)
    if dtype is None and not hasattr(x, "dtype"):
        dtype = dtypes.canonicalize_dtype(np.asarray(x).dtype)
    return np.asarray(x, dtype)


def inverse(x: Any) -> Any:
    """The pseudo-inverse of matrices.

    Args:
        x: matrices, a float array (*g, m, n).

    Returns:
        The pseudo-inverses, (*g, n, m).
    """
    return jnp.linalg.pinv(x) if is_jax(x) else np.linalg.pinv(x)


def svd(x: Any) -> Any:
    """U, S and the transpose of V of matrices, as many columns as the shorter side has.

    Args:
        x: matrices, a float array (*g, m, n).

    Returns:
        U (*g, m, k), S (*g, k) and the transpose of V (*g, k, n), with k the smaller of m and n;
        NaN where there is no decomposition.
    """
    if is_jax(x):
        return jnp.linalg.svd(x, full_matrices=False)
    return _decomposed(functools.partial(np.linalg.svd, full_matrices=False), x)


def qr(x: Any) -> Any:
    """Q and R of matrices, the reduced ones.

    Args:
        x: matrices, a float array (*g, m, n).

    Returns:
        Q (*g, m, k) and R (*g, k, n), with k the smaller of m and n; NaN where there is no
        decomposition.
    """
    return jnp.linalg.qr(x) if is_jax(x) else _decomposed(np.linalg.qr, x)


def eigh(x: Any) -> Any:
    """Eigenvalues and eigenvectors of symmetric matrices.

    Args:
        x: symmetric matrices, a float array (*g, n, n).

    Returns:
        The eigenvalues (*g, n), the smallest first, and the eigenvectors as columns (*g, n, n);
        NaN where there is no decomposition.
    """
    return jnp.linalg.eigh(x) if is_jax(x) else _decomposed(np.linalg.eigh, x)


def _decomposed(function: Callable, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """NaN where there is no decomposition, as in JAX; NumPy raises for all matrices."""
    try:
        if np.isfinite(x).all():  # LAPACK may not return for others
            return tuple(function(x))
    except np.linalg.LinAlgError:
        pass
    if x.ndim > 2:
        parts = zip(*(_decomposed(function, one) for one in x), strict=True)
        return tuple(map(np.stack, parts))
    return tuple(np.full_like(v, np.nan) for v in function(np.zeros_like(x)))


def normal_cdf(x: Any) -> Any:
    """The distribution function of the standard normal distribution.

    Args:
        x: a float array of any shape.

    Returns:
        The probability of a value below, of the same shape.
    """
    if is_jax(x):
        return jax.scipy.special.ndtr(x)
    # SciPy's takes half a second to import, which is longer than this ever takes.
    x = np.asarray(x)
    return (_erfc(x * -math.sqrt(0.5)) / 2).astype(x.dtype)


def _erfc(x: np.ndarray) -> np.ndarray:
    return np.fromiter(map(math.erfc, x.ravel().tolist()), float, x.size).reshape(
        x.shape
    )


def normal_pdf(x: Any) -> Any:
    """The density of the standard normal distribution.

    Args:
        x: a float array of any shape.

    Returns:
        The density, of the same shape.
    """
    exp = jnp.exp if is_jax(x) else np.exp
    return exp(-x * x / 2) * (1 / float(np.sqrt(2 * np.pi)))


def put(x: Any, index: Any, values: Any, how: str = "set") -> Any:
    """`x.at[index].set(values)`, or `add`, `max` or `min` in place of `set`.

    Args:
        x: the array that is changed in a copy.
        index: any index of NumPy; entries that occur twice count twice.
        values: what is put there.
        how: 'set' (the default), 'add', 'max' or 'min'.

    Returns:
        The changed copy.
    """
    if is_jax(x, index, values):
        return getattr(jnp.asarray(x).at[index], how)(values)
    new = np.array(x)
    if how == "set":
        new[index] = values
    else:
        ufunc = {"add": np.add, "max": np.maximum, "min": np.minimum}[how]
        ufunc.at(new, index, values)
    return new


def reduce_segments(x: Any, segments: np.ndarray, number: int, how: str) -> Any:
    """By segment the sum ('add'), 'max' or 'min' of what lies along the first axis.

    Args:
        x: the values, an array (n, …).
        segments: the segment of each entry, an integer array (n,).
        number: how many segments there are.
        how: 'add', 'max' or 'min'.

    Returns:
        One entry per segment, (number, …); an empty one is 0, or the lowest or highest number for
        'max' and 'min'.
    """
    start = {"add": 0.0, "max": -inf, "min": inf}[how]
    if not is_jax(x) and not np.issubdtype(x.dtype, np.inexact) and how != "add":
        limits = np.iinfo(x.dtype)
        start = limits.min if how == "max" else limits.max
    if is_jax(x):
        reduce = {
            "add": jax.ops.segment_sum,
            "max": jax.ops.segment_max,
            "min": jax.ops.segment_min,
        }[how]
        return reduce(x, segments, number)
    return put(np.full((number, *x.shape[1:]), start, x.dtype), segments, x, how)


def compiled(function: Callable) -> Callable:
    """`jax.jit(function)` for loops that NumPy is slow at: it gives NumPy arrays for such.

    For module-level functions of arrays whose shapes repeat: what is compiled stays.

    Args:
        function: a function of arrays, and of pytrees of them.

    Returns:
        A function with the same arguments and result.
    """
    program = jax.jit(function, compiler_options=QUICK)
    inner = jax.jit(function)  # options are for a program of its own

    @functools.wraps(function)
    def either(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return inner(*args)
        found = program(*args)
        return found if is_jax(*leaves) else jax.device_get(found)

    return either
