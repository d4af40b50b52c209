"""What the data tell of the inputs of some layers, in the float and in the quantized model."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmet.engine.graph.node import Node
from jaxmet.engine.run.replay import Hook, Run
from jaxmet.engine.run.shared_programs import Program, ProgramSequence, placed
from jaxmet.layers.inputs import counted_rows
from jaxmet.layers.lockstep import Copy, Step, Where
from jaxmet.numerics.drawn_order import seed_of
from jaxmet.numerics.precision import wide
from jaxmet.numerics.rounding.quadratic import Products
from jaxmet.transforms.rounding.layer_order import Wave
from jaxmet.transforms.rounding.rounded_layers import Layer
from jaxmet.tree.leaves import is_compressed
from jaxmet.tree.named_leaves import flatten, named_leaves


class Inputs(NamedTuple):
    """Means over all rows so far: products of inputs, and the inputs themselves."""

    number: jax.Array
    products: Products
    mean: jax.Array
    float_mean: jax.Array


def merged(one: Inputs, two: Inputs) -> Inputs:
    """The means over the rows of both, in NumPy."""
    one, two = (jax.tree.map(np.asarray, v) for v in (one, two))
    total = one.number + two.number
    share = two.number / np.maximum(total, total.dtype.type(1))
    mean = jax.tree.map(lambda a, b: a + (b - a) * share, one[1:], two[1:])
    return Inputs(total, *mean)


class InputRows(NamedTuple):
    """Rows of the quantized and of the float model, and which of them count."""

    quantized: jax.Array
    exact: jax.Array
    counts: jax.Array | None


Does = Literal["look", "look in a turn", "enter", "turn"]


class LookStage(NamedTuple):
    """One program: what part of the layers of a wave read, or what goes on without a look.

    In a loop 'enter' goes on to its first turn, 'turn' through one more; the others look.
    `since` is the piece that the stage before left the copies at.
    """

    wave: int
    since: int
    part: int = 0
    does: Does = "look"


def stages_of(waves: Sequence[Wave]) -> list[LookStage]:
    """The programs of all waves, in the order in which they are needed first."""
    found: list[LookStage] = []
    for number, wave in enumerate(waves):
        since = found[-1].wave if found else 0
        if wave.loops:
            found.append(LookStage(number, since, does="enter"))
            parts = range(len(wave.parts))
            found += [
                LookStage(number, number, part, "look in a turn") for part in parts
            ]
            found.append(LookStage(number, number, does="turn"))
        elif wave.layers:
            found.append(LookStage(number, since))
    return found


class Look:
    """Runs both copies from wave to wave for what its layers read: one program for each stage.

    `most` says how many rows of a layer are read, `shares` how many of them in a batch of each
    shape: as large a part as it holds of all examples. A program first takes the values that
    are live to where the wave begins, with the weights that were chosen before. The turns of a
    loop are one program, to which the number of the turn is data.
    """

    def __init__(
        self,
        exact: Copy,
        noisy: Copy,
        waves: Sequence[Wave],
        most: Mapping[str, int],
        shares: Mapping[Any, float],
        *,
        keep: bool,
    ) -> None:
        self.copies = exact, noisy
        self.waves, self.most, self.shares, self.keep = waves, most, shares, keep
        self.stages = stages_of(waves)
        # Their names are looked up only where one may have an offset: that takes a while.
        self.compressed = any(map(is_compressed, flatten(exact.params)[1]))
        self.sequences: dict[Any, ProgramSequence] = {}
        self.lives: dict[Any, Any] = {}  # in the abstract, for the next program

    def __call__(
        self,
        batch: int,
        stage: LookStage,
        key: jax.Array,
        where: Mapping[str, Where],
        turn: int = 0,
    ) -> tuple[dict[str, Inputs], dict[str, InputRows]]:
        """Means over the rows of one batch, and with `keep` the rows themselves."""
        shape, _ = self.copies[0].lives[batch]
        number, given = self.stages.index(stage), self.given(batch, key)
        more = self.masks(stage, where), np.int32(turn)
        if shape not in self.sequences:
            make = functools.partial(self.program, shape, given, where)
            self.sequences[shape] = ProgramSequence(
                make, len(self.stages), ahead=not placed(given, where)
            )
        lives, found, rows = self.sequences[shape][number](*given, *more)
        for copy, live in zip(self.copies, lives, strict=False):
            copy.put(batch, live)
        return found, rows

    def stage(self, wave: int, does: Does = "look", part: int = 0) -> LookStage:
        """The program of a wave that does this."""
        return next(
            stage
            for stage in self.stages
            if (stage.wave, stage.does, stage.part) == (wave, does, part)
        )

    def turns(self, wave: int) -> tuple[int, ...]:
        """The slices that the turns of a loop read, in the order in which they run."""
        pieces = next(iter(self.copies[0].pieces.values()))
        return pieces[wave].turns

    def given(self, batch: int, key: jax.Array) -> tuple[Any, ...]:
        """The arguments of the next program, but for the masks and the turn."""
        trees = tuple(copy.params for copy in self.copies)
        lives = tuple(copy.lives[batch][1] for copy in self.copies)
        return trees, self.copies[1].quantizers, lives, key

    def layers(self, stage: LookStage) -> tuple[Layer, ...]:
        """The layers whose inputs a stage looks at."""
        looks = stage.does in ("look", "look in a turn")
        return self.waves[stage.wave].parts[stage.part] if looks else ()

    def masks(self, stage: LookStage, where: Mapping[str, Where]) -> dict[str, Any]:
        """Where the inputs of the layers of a stage count."""
        names = (layer.node.name for layer in self.layers(stage))
        return {n: where[n].operand for n in names if n in where}

    def program(
        self,
        shape: Any,
        given: tuple[Any, ...],
        where: Mapping[str, Where],
        number: int,
        before: Program | None,
    ) -> Program:
        """The program of a stage, for arguments like these."""
        if before is not None:
            given = *given[:2], self.lives[shape], given[3]
        stage = self.stages[number]
        run = functools.partial(self.run, shape, stage)
        program = Program(run, *given, self.masks(stage, where), np.int32(0))
        self.lives[shape] = program.shapes[0] or given[2]
        return program

    def close(self) -> None:
        """Compile nothing more."""
        for sequence in self.sequences.values():
            sequence.close()

    def run(
        self,
        shape: Any,
        stage: LookStage,
        trees: tuple[Any, Any],
        quantizers: Any,
        lives: tuple[Any, Any],
        key: jax.Array,
        masks: Mapping[str, Any],
        turn: Any,
    ) -> tuple[tuple[Any, ...], dict[str, Inputs], dict[str, InputRows]]:
        """Live values after a stage, none where they stay what they are, and what it saw."""
        number, own = stage.wave, (None, quantizers)

        def of_both(step: Callable[[Copy], Step], *more: Any) -> tuple[Any, ...]:
            every = zip(self.copies, trees, own, lives, strict=True)
            return tuple(step(copy)(*given, *more) for copy, *given in every)

        for piece in range(stage.since, number):
            lives = of_both(lambda copy, p=piece: copy.step(shape, p), None)
        if stage.does == "enter":
            return of_both(lambda copy: copy.enter(shape, number)), {}, {}
        if stage.does == "turn":
            return of_both(lambda copy: copy.turn(shape, number), turn), {}, {}
        share = self.shares[shape]
        watch = functools.partial(self.watch, stage, share, trees[0], key, masks)
        if stage.does == "look":
            seen = of_both(lambda copy: copy.observer(shape, number, watch), None)
        else:
            seen = of_both(lambda copy: copy.turn(shape, number, watch), turn)
        exact, quantized = seen
        rows = {
            n: InputRows(quantized[n][0], exact[n][0], exact[n][1])
            for n in (layer.node.name for layer in self.layers(stage))
        }
        found = {n: _inputs(*r) for n, r in rows.items()}
        after = lives if stage.does == "look" else ()
        return after, found, rows if self.keep else {}

    def watch(
        self,
        stage: LookStage,
        share: float,
        params: Any,
        key: jax.Array,
        masks: Mapping[str, Any],
        hook: Hook,
    ) -> Hook:
        """The copy's own hook, and after it the rows that the layers read."""
        numbers = {x.node.name: i for i, x in enumerate(self.layers(stage))}
        leaves = named_leaves(params) if self.compressed else {}

        def watching(node: Node, run: Run, operands: tuple[Any, ...]) -> Any:
            result, _ = hook(node, run, operands)
            if node.name not in numbers:
                return result, None
            assert node.weight is not None
            x, kernel = operands[0], operands[node.weight.operand]
            where = masks.get(node.name)
            if where is not None:
                where = where[run.iteration]
            # Both copies draw the same rows, each layer others.
            seed = seed_of(key, numbers[node.name], *run.iteration)
            leaf: Any = leaves.get(node.kernel)
            rows, counts = counted_rows(
                node,
                x,
                kernel.shape,
                where=where,
                offset=leaf.input_offset if is_compressed(leaf) else None,
                most=math.ceil(self.most[node.name] * share),
                seed=seed,
            )
            return result, (rows.astype(wide(rows.dtype)), counts)

        return watching


def _inputs(rows: jax.Array, float_rows: jax.Array, counts: jax.Array | None) -> Inputs:
    number = jnp.asarray(rows.shape[1], rows.dtype)
    if counts is not None:
        number = jnp.sum(counts).astype(rows.dtype)

    def product(one: jax.Array, two: jax.Array) -> jax.Array:
        total = jnp.einsum("gri,grj->gij", one, two, precision="highest")
        return total / jnp.maximum(number, 1.0)

    means = [jnp.mean(v, axis=1) for v in (rows, float_rows)]
    if counts is not None:  # rows that do not count are zero
        share = rows.shape[1] / jnp.maximum(number, 1.0)
        means = [mean * share for mean in means]
    products = Products(
        product(rows, rows), product(rows, float_rows), product(float_rows, float_rows)
    )
    return Inputs(number, products, *means)
