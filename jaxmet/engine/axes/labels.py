"""Which axis is which: labels that follow an axis through a program.

The label of an axis is a tuple of *atoms* in row-major order: a flattened (H, W, C) axis
carries three. An atom stands for one index set; atoms that must stay aligned (the two sides
of an addition, a kernel's input axis and what it reads) are joined. An atom may turn out to
be a product of others (`factors`) or a concatenation (`parts`). `frozen` says why a
channel's scale may not be changed, `fixed` why none may be removed.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from jaxmet.engine.program.compat import Size


@dataclasses.dataclass(eq=False, repr=False)
class Atom:
    """One index set of a known size, joined with others through `parent`."""

    size: Size
    batch: bool = False
    frozen: str | None = None
    parent: "Atom | None" = None
    factors: "tuple[Atom, ...] | None" = None
    parts: "tuple[Axis, ...] | None" = None
    fixed: str | None = None

    def like(self, size: Size, *, batch: bool = False) -> "Atom":
        """A part of this one: what holds for all holds for it."""
        return Atom(size, batch, self.frozen, fixed=self.fixed)

    def root(self) -> "Atom":
        root = self
        while root.parent is not None:
            root = root.parent
        atom = self
        while atom.parent is not None and atom.parent is not root:
            after = atom.parent
            atom.parent = root  # the next one that asks has a short way
            atom = after
        return root


Axis = tuple[Atom, ...]


def fresh(size: Size, frozen: str | None = None) -> Axis:
    """A new label; an axis of size one needs none."""
    return () if size == 1 else (Atom(size, frozen=frozen, fixed=frozen),)


def expand(axis: Axis) -> Axis:
    """The label in terms of atoms that are no products themselves."""
    out: list[Atom] = []
    for atom in axis:
        atom = atom.root()
        out += expand(atom.factors) if atom.factors is not None else (atom,)
    return tuple(out)


def size(axis: Axis) -> Size:
    return math.prod(atom.size for atom in axis)


def leaves(axis: Axis, seen: set[Atom] | None = None) -> Iterator[Atom]:
    """The atoms at the bottom, through products and concatenations.

    Without those of concatenations in `seen`, which is added to.
    """
    stack = list(reversed(axis))
    while stack:
        atom = stack.pop().root()
        if atom.factors is not None:
            stack += reversed(atom.factors)
        elif atom.parts is None:
            yield atom
        elif seen is None or atom not in seen:
            stack += [a for part in reversed(atom.parts) for a in reversed(part)]
            if seen is not None:
                seen.add(atom)


def freeze(axis: Axis, why: str, *, fixed: bool = True) -> None:
    """Forbid to rescale anything on this axis, and with `fixed` to remove any of it."""
    stack = list(axis)
    while stack:
        atom = stack.pop().root()
        if atom.factors is not None:
            stack += atom.factors
            continue
        if atom.frozen and (atom.fixed or not fixed):
            continue  # and so are its parts
        atom.frozen = atom.frozen or why
        atom.fixed = atom.fixed or (why if fixed else None)
        stack += [a for part in atom.parts or () for a in part]


def frozen(axis: Axis) -> str | None:
    """Why this axis may not be rescaled, or None."""
    stack = list(reversed(axis))
    while stack:
        atom = stack.pop().root()
        if atom.factors is not None:
            stack += reversed(atom.factors)
        elif atom.frozen:
            return atom.frozen
        else:
            parts = reversed(atom.parts or ())
            stack += [a for part in parts for a in reversed(part)]
    return None


def carries_batch(axis: Axis) -> bool:
    return any(atom.batch for atom in expand(axis))


def fix(axis: Axis, why: str) -> None:
    """Forbid to remove anything on this axis, which may still be rescaled."""
    for atom in leaves(axis):
        atom.fixed = atom.fixed or why


def meet(one: Axis, two: Axis) -> bool:
    """Whether anything is on both axes."""
    return not set(leaves(one)).isdisjoint(leaves(two))


def unify(one: Axis, two: Axis) -> None:
    """Say that two axes of equal size are indexed by the same thing."""
    for x, y in paired(one, two):
        _merge(x, y)


def paired(one: Axis, two: Axis) -> Iterator[tuple[Atom, Atom]]:
    """The atoms of two axes of equal size that follow the same index, split to fit."""
    a, b = list(reversed(expand(one))), list(reversed(expand(two)))
    while a and b:
        x, y = a.pop(), b.pop()
        if x.size == y.size:
            yield x, y
        elif x.size == 0 or y.size == 0:
            freeze((x, y, *a, *b), "its axes do not line up")
            return
        elif x.size == 1 or y.size == 1:  # a batch of one has no counterpart to match
            (b if x.size == 1 else a).append(y if x.size == 1 else x)
        elif x.size > y.size and x.size % y.size == 0 and x.parts is None:
            a += reversed(_split(x, y.size))
            b.append(y)
        elif y.size % x.size == 0 and y.parts is None:
            b += reversed(_split(y, x.size))
            a.append(x)
        else:
            freeze((x, y, *a, *b), "its axes do not line up")
            return


def _split(atom: Atom, major: Size) -> Axis:
    inner = atom.size // major
    atom.factors = (
        atom.like(major, batch=atom.batch),
        atom.like(inner),
    )
    return atom.factors


def _merge(x: Atom, y: Atom) -> None:
    if x is y:
        return
    why, fixed = x.frozen or y.frozen, x.fixed or y.fixed
    if x.parts is not None and y.parts is not None:
        if [size(p) for p in x.parts] == [size(p) for p in y.parts]:
            for p, q in zip(x.parts, y.parts, strict=True):
                unify(p, q)
        else:
            reason = "concatenations with different borders meet"
            why, fixed = why or reason, fixed or reason
            freeze((x, y), reason)
    keep, gone = (x, y) if x.parts is not None else (y, x)
    gone.parent = keep
    keep.batch = keep.batch or gone.batch
    if why:
        freeze((keep,), why, fixed=False)
    if fixed:
        freeze((keep,), fixed)


def concatenate(axes: Sequence[Axis], sizes: Sequence[Size]) -> Axis:
    """The label of a concatenation along an axis."""
    parts = [a or fresh_one(n) for a, n in zip(axes, sizes, strict=True) if n != 0]
    if len(parts) <= 1:
        return parts[0] if parts else fresh_one(0)
    atom = Atom(sum(sizes))
    atom.parts = tuple(parts)
    return (atom,)


def fresh_one(n: Size) -> Axis:
    return (Atom(n),)


def cut(axis: Axis, start: Size, stop: Size) -> Axis | None:
    """The label of a slice, or None where the slice crosses what is known of the axis."""
    atoms = expand(axis)
    if start == 0 and stop == size(atoms):
        return atoms
    if start == stop:
        return fresh_one(0)
    if len(atoms) != 1 or atoms[0].batch:
        return None
    atom = atoms[0]
    if atom.parts is None:
        borders = sorted({0, start, stop, atom.size})
        atom.parts = tuple(
            (atom.like(hi - lo),) for lo, hi in zip(borders, borders[1:], strict=False)
        )
    inside, offset = [], 0
    for part in atom.parts:
        end = offset + size(part)
        if offset <= start and stop <= end:
            return cut(part, start - offset, stop - offset)
        if start <= offset and end <= stop:
            inside.append(part)
        elif not (end <= start or stop <= offset):
            return None
        offset = end
    joined = atom.like(stop - start)
    joined.parts = tuple(inside)
    return (joined,)


def regroup(
    axes: Sequence[Axis], old: Sequence[Size], new: Sequence[Size]
) -> list[Axis] | None:
    """Labels after a reshape, or None where an axis is cut across its atoms."""
    out: list[Axis] = [() for _ in new]
    i = j = 0
    while i < len(old) and j < len(new):
        left, right, group_i, group_j = old[i], new[j], [i], [j]
        while left != right:
            if left < right:
                i += 1
                left *= old[i]
                group_i.append(i)
            else:
                j += 1
                right *= new[j]
                group_j.append(j)
        atoms = [atom for k in group_i for atom in expand(axes[k])]
        if not _deal(atoms, [new[k] for k in group_j], out, group_j):
            return None
        i, j = i + 1, j + 1
    return out


def _deal(
    atoms: list[Atom], sizes: list[Size], out: list[Axis], where: list[int]
) -> bool:
    """Hand the atoms of one block out to the axes of the other."""
    rest = list(reversed(atoms))
    for k, n in zip(where, sizes, strict=True):
        taken: list[Atom] = []
        need = n
        while rest and need != 1:
            atom = rest.pop()
            if need % atom.size == 0:
                taken.append(atom)
                need //= atom.size
            elif atom.size % need == 0 and atom.parts is None:
                major, minor = _split(atom, need)
                taken.append(major)
                rest.append(minor)
                need = 1
            else:
                return False
        while rest and rest[-1].size == 1 and (n == 1 or not taken) and not taken:
            taken.append(rest.pop())
        out[k] = tuple(taken)
        if need != 1:
            out[k] = (*taken, Atom(need))
    return True
