"""Integer grids: how many bits, and where the integers start and end."""

import operator
from typing import Any


def check_bits(bits: Any, *, caller: str = "grid_ends", name: str = "bits") -> int:
    """The bit-width as an integer, if there is a grid of that width: 2 to 16, or 32.

    Args:
        bits: the width, an integer.
        caller: the function that errors name; default 'grid_ends'.
        name: the argument that errors name; default 'bits'.

    Returns:
        The width as a Python integer.

    Raises:
        ValueError: for another width, and for what is no integer.
    """
    try:
        number = operator.index(bits)
    except TypeError:
        number = -1
    if isinstance(bits, bool) or not (2 <= number <= 16 or number == 32):
        raise ValueError(
            f"jaxmet.{caller}: {name} is {bits!r}. Give 2 to 16, or 32 for no rounding."
        )
    return number


def grid_ends(bits: int, *, signed: bool, narrow: bool = False) -> tuple[int, int]:
    r"""The lowest and highest integer of a grid.

    Signed: $-2^{b-1} \dots 2^{b-1}-1$; narrow, the same without the lowest, so that the
    grid is symmetric about zero. Unsigned: $0 \dots 2^b-1$. With 32 bits nothing is
    rounded in practice and the ends are only nominal.

    Args:
        bits: the width: 2 to 16, or 32.
        signed: whether there are negative integers.
        narrow: whether a signed grid leaves out its lowest integer; default False.

    Returns:
        The lowest and the highest integer.

    Raises:
        ValueError: for a width that no grid has.
    """
    return ends_of_width(check_bits(bits), signed=signed, narrow=narrow)


def ends_of_width(bits: Any, *, signed: bool, narrow: bool) -> tuple[Any, Any]:
    """`grid_ends` for a width that may be an integer array, exactly.

    Args:
        bits: the width, an integer or an integer array.
        signed: whether there are negative integers.
        narrow: whether a signed grid leaves out its lowest integer.

    Returns:
        The lowest and the highest integer, arrays where `bits` is one.
    """
    if not signed:
        return 0 * bits, (1 << bits) - 1
    half = 1 << (bits - 1)
    return (1 - half if narrow else -half), half - 1
