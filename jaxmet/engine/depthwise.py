"""What XLA:CPU does badly, said otherwise.

A depthwise convolution is a sum over the window of shifted inputs times one number a
channel. On XLA:CPU that sum is many times faster than the convolution primitive; other
platforms keep the primitive. The choice is made when the program is lowered.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxmet.engine import compat


def convolution(primitive: Any, params: dict[str, Any], x: Any, kernel: Any) -> Any:
    """One convolution equation, with the faster formulation on CPU where it is one."""

    def plain(x, kernel):
        return compat.bind(primitive, params, (x, kernel))[0]

    if not _is_depthwise(params, x, kernel):
        return plain(x, kernel)

    def shifted(x, kernel):
        return shift_and_multiply(params, x, kernel)

    return lax.platform_dependent(x, kernel, cpu=shifted, default=plain)


def _is_depthwise(p: dict[str, Any], x: Any, kernel: Any) -> bool:
    numbers = p["dimension_numbers"]
    channels = x.shape[numbers.lhs_spec[1]]
    window = [kernel.shape[i] for i in numbers.rhs_spec[2:]]
    taps = 1
    for n in window:
        taps *= n
    return (
        p["feature_group_count"] == channels == kernel.shape[numbers.rhs_spec[0]]
        and channels > 1
        and p["batch_group_count"] == 1
        and all(d == 1 for d in p["lhs_dilation"])
        and all(side >= 0 for pair in p["padding"] for side in pair)
        and x.dtype == kernel.dtype == jnp.float32
        and p["preferred_element_type"] in (None, jnp.float32)
        and taps <= 49
    )


def shift_and_multiply(p: dict[str, Any], x: Any, kernel: Any) -> Any:
    """A depthwise convolution as a sum of shifted, strided and scaled inputs."""
    numbers = p["dimension_numbers"]
    spatial = len(numbers.lhs_spec) - 2
    x = jnp.transpose(
        x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    )
    taps = jnp.transpose(
        kernel, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    )
    window, strides, dilation = (
        taps.shape[:spatial],
        p["window_strides"],
        p["rhs_dilation"],
    )
    x = jnp.pad(x, ((0, 0), *p["padding"], (0, 0)))
    size = [
        (x.shape[1 + i] - (window[i] - 1) * dilation[i] - 1) // strides[i] + 1
        for i in range(spatial)
    ]
    total = None
    for place in _places(window):
        start = [k * d for k, d in zip(place, dilation, strict=True)]
        stop = [
            b + (n - 1) * s + 1 for b, n, s in zip(start, size, strides, strict=True)
        ]
        part = lax.slice(
            x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1)
        )
        scaled = part * taps[place].reshape((1,) * (spatial + 1) + (-1,))
        total = scaled if total is None else total + scaled
    assert total is not None
    back = [0] * (spatial + 2)
    order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    for here, there in enumerate(order):
        back[there] = here
    return jnp.transpose(total, back)


def _places(window: tuple[int, ...]) -> list[tuple[int, ...]]:
    places: list[tuple[int, ...]] = [()]
    for n in window:
        places = [(*p, k) for p in places for k in range(n)]
    return places
