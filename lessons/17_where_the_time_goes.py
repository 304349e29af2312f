"""Where the time goes: operations, bytes, the cache, and the roofline of this machine.

Objective: after this lesson you can say of a matrix product how many operations it is and how many bytes it must move,
and from these two numbers whether a machine's arithmetic or its memory bounds it; say how small a tile may become
before its products are bound by memory; and say what is left of a training step when its products are taken away.

    mpirun -n 4 python lessons/17_where_the_time_goes.py
    python lessons/17_where_the_time_goes.py --ranks 4

The roofline (doi 10.1145/1498765.1498785): a computation of I operations for each byte that it moves runs at no more
than min(peak, I · bandwidth) operations a second. Where the two are equal is the ridge: left of it memory is the bound,
right of it arithmetic.

Look at: the bandwidth, which rises while a call's own cost is spread over more bytes, and falls where arrays no longer
fit into a cache; the intensity of a tile's product, and how it follows its roof; the same elementwise work at once and
by tiles, with the same bytes through NumPy and another time; and the last line, where a step takes far longer than its
products would at the peak. Times are shown and never checked: a busy machine can stretch any of them.

Write it: `product_flops`, `product_bytes` and `least_tokens` are yours. They are judged on products that are really
made, whose operands are measured as they pass, and by the accounting of a training step. In a file of your own:

    mpirun -n 2 python lessons/17_where_the_time_goes.py --answer mine.py

Try it: with 4 ranks, give `CONFIG` tiles of 4 tokens instead of 32, `tiles=64`. A step's products are hardly fewer
operations, but move about four times as many bytes, and the step takes longer. (Nothing fails: no check is on a time.)
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, TypeAlias

from stage import Lesson, drawn_text, run, table_with, until_all_are_through

import numpy as np

from tsp_ref.accounting.work import Work
from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.commands.holdings import short
from tsp_ref.formulas.memory import itemsize
from tsp_ref.formulas.work import step_flops
from tsp_ref.model.config import make_config
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

CONFIG = make_config("tiny", num_layers=1, hidden_size=128, ffn_size=256, seq_len=256, tiles=8, batch_size=1, steps=3,
                     warmup_steps=1)
SEED, DRAWN = 2604, 40  # products drawn at random
PEAK_SIDE = 512  # of the square matrices whose product is taken for the peak
SIZES = [1 << power for power in range(14, 26)]  # bytes of the arrays that are read and written
GATED = (1024, 1024)  # tokens and columns of an elementwise computation
ROWS = 32  # of them at a time
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
LEAST = 4e-3  # seconds that anything is timed for

Shape: TypeAlias = tuple[int, ...]


# Yours.


def product_flops(left: Shape, right: Shape) -> int:
    """The floating-point operations, additions and multiplications, of [..., m, k] times [..., k, n], the leading sizes
    being the same."""
    return 2 * math.prod(left) * right[-1]


def product_bytes(left: Shape, right: Shape, size: int) -> int:
    """The bytes that such a product must move at least, with `size` bytes a number: what it reads, and what it writes,
    each once."""
    return size * (math.prod(left) + math.prod(right) + math.prod(left[:-1]) * right[-1])


def least_tokens(inner: int, columns: int, intensity: Fraction, size: int) -> int | None:
    """The fewest tokens s for which [s, inner] times [inner, columns] has at least this intensity, in operations a
    byte; None if no number of tokens does."""
    # 2 s i c >= I z (s i + i c + s c), solved for s.
    gain = 2 * inner * columns - intensity * size * (inner + columns)
    return math.ceil(intensity * size * inner * columns / gain) if gain > 0 else None


# What is measured.


class Meter:
    """What passes through NumPy's operations: bytes read and written, and how many operations.

    An array that `watch` has returned, and everything that is computed from it, is metered.
    """

    def __init__(self) -> None:
        self.bytes = self.calls = 0

    def watch(self, array: Array) -> Any:
        """The array, metered from now on."""
        view = array.view(Metered)
        view.meter = self
        return view


class Metered(np.ndarray[Any, np.dtype[Any]]):
    """An array whose operations are metered."""

    meter: Meter | None = None

    def __array_finalize__(self, parent: Any) -> None:
        self.meter = getattr(parent, "meter", None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **named: Any) -> Any:
        """Apply an operation, and note all arrays that it reads and the one that it writes."""
        plain = [each.view(np.ndarray) if isinstance(each, Metered) else each for each in inputs]
        if out is not None:
            named["out"] = tuple(each.view(np.ndarray) for each in out)
        result = getattr(ufunc, method)(*plain, **named)
        meter = next(each.meter for each in (*inputs, *(out or ())) if isinstance(each, Metered) and each.meter)
        meter.bytes += sum(each.nbytes for each in (*plain, result) if isinstance(each, np.ndarray))
        meter.calls += 1
        return meter.watch(result)


class Products(Work):
    """The accounts of work, which also know each product of two matrices: its shapes. That of a stack is one for each
    of its matrices, so it does not matter how many tiles are taken at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[tuple[Shape, Shape]] = Counter()

    def product(self, left: Shape, right: Shape) -> None:
        """Count one, or those of a stack."""
        super().product(left, right)
        leading = np.broadcast_shapes(left[:-2], right[:-2])
        self.made[left[-2:], right[-2:]] += math.prod(leading)


def seconds_of(work: Callable[[], object]) -> float:
    """The least time of some calls, after one that touches the memory: asked for is what the machine can do."""
    work()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < LEAST and len(times) < 200):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


@dataclass(frozen=True)
class Roofline:
    """This machine's, by this rank, while all ranks measure at once: operations a second, and bytes a second from the
    nearest cache and from memory."""

    peak: float
    cache: float
    memory: float

    def roof(self, intensity: float) -> float:
        """The most operations a second, for operands that come from memory."""
        return min(self.peak, intensity * self.memory)

    @property
    def ridge(self) -> float:
        """Operations a byte from which on memory is not the bound."""
        return self.peak / self.memory


def matrix(*shape: int) -> Array:
    """Random numbers, the same on every rank."""
    return np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)


def peak() -> float:
    """Operations a second of a large product: 2·n³ operations."""
    a, out = matrix(PEAK_SIDE, PEAK_SIDE), matrix(PEAK_SIDE, PEAK_SIDE)
    return 2 * PEAK_SIDE**3 / seconds_of(lambda: np.matmul(a, a, out=out))


def operations_of(left: Shape, right: Shape) -> int:
    """What the tables show, whatever the reader's function says."""
    return 2 * math.prod(left) * right[-1]


def numbers_of(left: Shape, right: Shape) -> int:
    """The numbers that a product reads and writes, for the tables."""
    return math.prod(left) + math.prod(right) + math.prod(left[:-1]) * right[-1]


def bandwidth(size: int) -> float:
    """Bytes a second that are read and written, when an array of so many bytes is scaled into another."""
    x, y = np.ones(size // 4, np.float32), np.ones(size // 4, np.float32)
    return 2 * size / seconds_of(lambda: np.multiply(x, np.float32(1.5), out=y))


# What is shown.


def show_judged(lesson: Lesson) -> None:
    """The reader's functions, on products that are really made."""
    lesson.part("Operations and bytes of a product")
    lesson.say(f"{DRAWN} products drawn at random are made; the bytes of what they read and write are measured as they "
               "pass.")
    generator = np.random.default_rng(SEED)
    flops = moved = True
    for _ in range(DRAWN):
        m, k, n = (int(size) for size in generator.integers(1, 40, 3))
        leading = tuple(int(size) for size in generator.integers(1, 4, generator.integers(0, 3)))
        dtype = (np.float32, np.float64)[generator.integers(2)]
        left, right = np.ones((*leading, m, k), dtype), np.ones((*leading, k, n), dtype)
        meter = Meter()
        result = meter.watch(left) @ right
        # A product of ones counts its own multiplications: an entry is k, and took k of them and as many additions.
        flops = flops and product_flops(left.shape, right.shape) == 2 * int(np.sum(result.view(np.ndarray)))
        moved = moved and product_bytes(left.shape, right.shape, left.itemsize) == meter.bytes
    lesson.check("product_flops: of every drawn product it is twice its multiplications", flops)
    lesson.check("product_bytes: of every drawn product it is what was read and written", moved)
    lesson.check("least_tokens: of drawn matrices and intensities it is the fewest that do, found by trying",
                 all(least_tokens(*drawn) == tried(*drawn) for drawn in drawn_intensities(generator)))


def drawn_intensities(generator: np.random.Generator) -> list[tuple[int, int, Fraction, int]]:
    """Random arguments of `least_tokens`; some can be met, some cannot."""
    return [(*(int(size) for size in generator.integers(1, 60, 2)), Fraction(int(generator.integers(1, 60)), 8),
             int(generator.choice([4, 8]))) for _ in range(DRAWN)]


def tried(inner: int, columns: int, intensity: Fraction, size: int) -> int | None:
    """The fewest tokens, by trying; by halves, because the intensity grows with the tokens. (Intensities are eighths:
    so if any number will do, `most` will.)"""

    def reached(tokens: int) -> bool:
        numbers = tokens * inner + inner * columns + tokens * columns
        return 2 * tokens * inner * columns >= intensity * size * numbers

    most = 8 * math.ceil(intensity * size) * inner * columns + 1
    if not reached(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def show_machine(lesson: Lesson) -> Roofline:
    """What this machine can do."""
    lesson.part("What this machine can do")
    rates: list[tuple[int, float]] = []
    until_all_are_through(lesson.comm, lambda: rates.extend((size, bandwidth(size)) for size in SIZES))
    peaks: list[float] = []
    until_all_are_through(lesson.comm, lambda: peaks.append(peak()))
    found = Roofline(peaks[0], max(rate for _, rate in rates), rates[-1][1])
    lesson.say("An array is scaled into another; GB/s read and written on rank 0, while every rank does the same:")
    table = table_with("bytes of an array", *(short(size) for size in SIZES[::2]))
    table.add_row("GB/s", *(f"{rate / 1e9:.1f}" for _, rate in rates[::2]))
    lesson.say(table)
    lesson.say(f"A product of {PEAK_SIDE} x {PEAK_SIDE} matrices runs at {found.peak / 1e9:.1f} GFLOP/s: take it for "
               f"the peak. From memory come {found.memory / 1e9:.1f} GB/s,\nso the ridge is at {found.ridge:.1f} "
               "operations a byte; for what comes from the nearest cache, at "
               f"{found.peak / found.cache:.1f}.")
    return found


def show_tokens(lesson: Lesson, machine: Roofline) -> None:
    """The intensity of a tile's product, the longer the tile."""
    lesson.part("How small may a tile be?")
    inner, columns = CONFIG.hidden_size, 2 * CONFIG.ffn_size // CONFIG.blocks
    size = itemsize(CONFIG)
    lesson.say(f"A tile of s tokens times a block of gate and up: s x {inner} times {inner} x {columns}. With few "
               "tokens, hardly more is done\nthan that the weights are read:")
    table = table_with("s", "operations", "bytes", "operations/byte", "roof, GFLOP/s", "found, GFLOP/s")
    counted = []
    for tokens in TOKENS:
        x, w, out = matrix(tokens, inner), matrix(inner, columns), matrix(tokens, columns)
        meter = Meter()
        np.matmul(meter.watch(x), w, out=out)
        operations = 2 * tokens * inner * columns
        counted.append(Fraction(operations, meter.bytes))
        rate = operations / seconds_of(lambda x=x, w=w, out=out: np.matmul(x, w, out=out))  # type: ignore[misc]
        table.add_row(str(tokens), f"{operations:,}", f"{meter.bytes:,}", f"{float(counted[-1]):.2f}",
                      f"{machine.roof(float(counted[-1])) / 1e9:.1f}", f"{rate / 1e9:.1f}")
    lesson.say(table)
    lesson.say("The roof is that of memory; what has just been written lies in a cache, and may be above it. However "
               f"long the tile, the\nintensity stays below {2 * inner * columns}/{size * (inner + columns)} = "
               f"{2 * inner * columns / (size * (inner + columns)):.1f} operations a byte: more, the block's own size "
               "does not allow.")
    lesson.check("it grows with each doubling of s, but never doubles",
                 all(before < after < 2 * before for before, after in pairwise(counted)))
    wanted = counted[3]
    lesson.check(f"least_tokens says that {float(wanted):.2f} operations a byte need {TOKENS[3]} tokens, as counted",
                 least_tokens(inner, columns, wanted, size) == TOKENS[3])
    lesson.say("On N ranks a sequence of S tokens has at least N tiles, so not all are longer than S/N: more ranks may "
               "need shorter tiles,\nof lower intensity, beside all messages.")


def gated(gate: Any, up: Any) -> Any:
    """silu(gate) · up, as one writes it."""
    return gate / (1 + np.exp(-gate)) * up


# A negation, exp, the sum with one: two arrays each. The quotient and the product: three each.
GATED_ARRAYS = 3 * 2 + 2 * 3


def show_elementwise(lesson: Lesson) -> None:
    """The same elementwise work, whole and by tiles."""
    lesson.part("Elementwise work, and what tiles do for it")
    gate, up, out = matrix(*GATED), matrix(*GATED), matrix(*GATED)

    def whole(first: Any, second: Any) -> None:
        out[...] = gated(first, second)

    def by_tiles(first: Any, second: Any) -> None:
        for row in range(0, len(out), ROWS):
            out[row : row + ROWS] = gated(first[row : row + ROWS], second[row : row + ROWS])

    lesson.say(f"silu(gate) · up, of {GATED[0]} x {GATED[1]} numbers: five calls of NumPy, each of which reads one or "
               f"two arrays and writes one.\nAt once, and {ROWS} rows at a time, where what a call has written may "
               "still be in a cache when the next one reads it:")
    table = table_with("", "calls", "bytes through NumPy", "bytes of one array at hand", "ms", "GB/s")
    alike = []
    for name, work, rows in (("whole", whole, GATED[0]), (f"{ROWS} rows", by_tiles, ROWS)):
        meter = Meter()
        work(meter.watch(gate), meter.watch(up))
        seconds = seconds_of(lambda work=work: work(gate, up))  # type: ignore[misc]
        table.add_row(name, str(meter.calls), f"{meter.bytes:,}", f"{rows * gate.nbytes // GATED[0]:,}",
                      f"{1e3 * seconds:.2f}", f"{meter.bytes / seconds / 1e9:.1f}")
        alike.append((meter.bytes, meter.calls * rows))
    lesson.say(table)
    lesson.check(f"both pass {GATED_ARRAYS} times the array through NumPy, where three times would do; tiles in "
                 f"{GATED[0] // ROWS} times as many calls",
                 alike == [(GATED_ARRAYS * gate.nbytes, 5 * GATED[0])] * 2)
    lesson.say("An operation for each 8 or 12 bytes is far left of the ridge: such work costs what its bytes cost, and "
               "so it matters where\nthey come from, and how often they pass.")


# A whole step.


def counted_step(comm: Communicator, plan: Plan) -> Products:
    """All products of a training step on this rank."""
    training = Training(CONFIG, comm, plan, drawn_text(), np)
    products = Products()
    training.model.work = training.model.xp.work = products
    training.step()
    return products


def show_step(lesson: Lesson, machine: Roofline) -> None:
    """What a step's products need, and what it takes."""
    lesson.part("A training step")
    plan, size = Plan("tsp", counted=True), itemsize(CONFIG)
    mine = counted_step(lesson.comm, plan)
    alone = counted_step(VirtualWorld(1).communicators[0], replace(plan, schedule="single"))
    training = Training(CONFIG, lesson.comm, Plan("tsp"), drawn_text(), np)
    training.step()
    taken = min(until_all_are_through(lesson.comm, training.step) for _ in range(2))
    show_kinds(lesson, mine, machine)
    wanted = sum(step_flops(CONFIG, training.model.grid, folded=True).values())
    lesson.check("product_flops, summed over this rank's products, is what the accounting and the formula say",
                 summed(mine, product_flops) == mine.total == wanted)
    moved = size * summed(mine, numbers_of)
    lesson.check("product_bytes, summed over them, is what their operands and results hold",
                 summed(mine, lambda left, right: product_bytes(left, right, size)) == moved)
    totals = np.sum(all_gather(lesson.comm, np.array([mine.total, moved])), axis=0).tolist()
    lesson.check("all ranks together make the products of one process: as many operations, and as many bytes",
                 totals == [alone.total, size * summed(alone, numbers_of)])
    lesson.check("each kind of product that this rank makes is one that the single process makes",
                 set(mine.made) <= set(alone.made))
    at_peak = mine.total / machine.peak
    lesson.say(f"Rank 0: {mine.total / 1e6:,.0f} million operations, {short(moved)}B, {mine.total / moved:.1f} "
               f"operations a byte. At the peak that would be {1e3 * at_peak:.1f} ms;\nthe step took "
               f"{1e3 * taken:.1f} ms, {taken / at_peak:.0f} times as long. This model is small, so most of it is "
               "Python,\nelementwise work and messages. How it is with a large one, function by function: "
               "python benchmarks/roofline.py")


def summed(products: Products, figure: Callable[[Shape, Shape], Any]) -> int:
    """A figure of all products together; -1 if it is no number for one of them."""
    figures = [(count, figure(*shapes)) for shapes, count in products.made.items()]
    return sum(count * each for count, each in figures) if all(isinstance(each, int) for _, each in figures) else -1


def show_kinds(lesson: Lesson, products: Products, machine: Roofline) -> None:
    """The kinds of products that are the most work, and how fast each is, alone."""
    work = {shapes: count * operations_of(*shapes) for shapes, count in products.made.items()}
    lesson.say("Rank 0's products with the most operations, and the rate of each alone, its operands in a cache:")
    table = table_with("left", "right", "times", "million operations", "operations/byte", "found, GFLOP/s", "of peak")
    for shapes in sorted(work, key=work.__getitem__, reverse=True)[:8]:
        a, b = (matrix(*shape) for shape in shapes)
        rate = operations_of(*shapes) / seconds_of(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        intensity = operations_of(*shapes) / (itemsize(CONFIG) * numbers_of(*shapes))
        table.add_row(*(" x ".join(map(str, shape)) for shape in shapes), str(products.made[shapes]),
                      f"{work[shapes] / 1e6:.1f}", f"{intensity:.1f}", f"{rate / 1e9:.1f}",
                      f"{rate / machine.peak:.0%}")
    lesson.say(table)


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_comparable_bits()
    lesson.require_ranks(CONFIG.max_ranks)
    show_judged(lesson)
    machine = show_machine(lesson)
    show_tokens(lesson, machine)
    show_elementwise(lesson)
    show_step(lesson, machine)


if __name__ == "__main__":
    run(__doc__, main, holes=(product_flops, product_bytes, least_tokens))
