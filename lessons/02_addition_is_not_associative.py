"""Addition is not associative: why a sum over ranks needs an order of its own.

Objective: after this lesson you can show that float sums of the same numbers differ with their order, that a matrix
product cut in pieces need not be bit for bit the whole product, and that a sum in a fixed tree keeps one bit pattern
while the order of arrival changes.

    mpirun -n 4 python lessons/02_addition_is_not_associative.py
    python lessons/02_addition_is_not_associative.py --ranks 4 --shuffle 7

Look at: how many of this machine's matrix products change bits when they are cut; how many bit patterns one sum has
when its parts are added as they arrive; the single pattern of the tree; how far both are from the exact sum.

Try it: in `in_the_tree`, replace `zip(order, ...)` by `zip(range(PARTS), ...)`: a part then takes the leaf of its place
of arrival instead of its own. The check "the tree, fed in the same orders, gives one pattern ..." fails: what fixes the
bits is that a part keeps its index, not that the sum is a tree.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction

from stage import Lesson, one_by_one, patterns, relative_gap, run

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from threadpoolctl import threadpool_info

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.request import Request
from tsp_ref.grid.grid import share
from tsp_ref.grid.tree import Tree

SEED = 2604
TRIPLES = 10_000
SHAPES = tuple(itertools.product((32, 48, 64, 96), (64, 160, 256), (64, 160, 256)))  # s, h and f
PARTS = 13  # on purpose no power of two: the tree takes any number
LENGTH = 64
ORDERS = 200
ROUNDS = 12


class Tag(IntEnum):
    """Part number p travels under the tag PART + p."""

    PART = 50


def random(key: int, *shape: int) -> Array:
    """Standard normal numbers in float32, the same on every rank."""
    return np.random.default_rng([SEED, key, *shape]).standard_normal(shape, dtype=np.float32)


def digest(array: Array) -> str:
    """Eight letters that stand for all bits of an array."""
    return hashlib.sha256(array.tobytes()).hexdigest()[:8]


def rounded_once(a: np.float32, b: np.float32) -> bool:
    """Whether a + b lies within half a unit in the last place of the exact sum, found in rational numbers."""
    total = a + b
    error = abs(Fraction(float(total)) - Fraction(float(a)) - Fraction(float(b)))
    return error <= Fraction(float(np.spacing(abs(total)))) / 2


def show_three_numbers(lesson: Lesson) -> None:
    """The smallest case: (a + b) + c against a + (b + c)."""
    lesson.part("Three numbers")
    a, b, c = random(1, 3, TRIPLES)
    left, right = (a + b) + c, a + (b + c)
    first = int(np.argmax(left != right))
    exact = Fraction(float(a[first])) + Fraction(float(b[first])) + Fraction(float(c[first]))
    lesson.say(f"  a = {a[first]:.9g}, b = {b[first]:.9g}, c = {c[first]:.9g}, all float32")
    lesson.say(f"  (a + b) + c = {left[first]:.9g}")
    lesson.say(f"  a + (b + c) = {right[first]:.9g}")
    lesson.say(f"  exactly       {float(exact):.12g}")
    lesson.say(f"The two differ in {np.sum(left != right):,} of {TRIPLES:,} random triples; this was the first. No "
               "single addition is to blame: each gives the float32 nearest to the exact sum of its two numbers. But "
               "which numbers are added, and so what is rounded away, depends on the order.")
    lesson.check("(a + b) + c and a + (b + c) differ for some triples", bool(np.any(left != right)))
    lesson.check("a + b and b + a never do: swapping the sides is harmless, grouping otherwise is not",
                 (a + b).tobytes() == (b + a).tobytes())
    lesson.check("each addition is right to half a unit in the last place (against exact rational sums)",
                 all(rounded_once(x, y) for x, y in zip(a[:200], b[:200])))


@dataclass
class Cut:
    """One matrix product, and in which ways it changes bits: 1 where it does."""

    rows: int
    columns: int
    inner: int
    again: int
    gap: float  # the largest difference of a cut product from the whole, relative to its largest entry
    error: float  # that of the whole product from the same in float64


def cut_product(s: int, h: int, f: int) -> Cut:
    """Compute a product whole, by a slice of rows, of columns, in two halves, and whole again elsewhere in memory."""
    x, w = random(2, s, h), random(3, h, f)
    whole = x @ w  # [s, h] -> [s, f]
    rows, columns, half = slice(s // 4, s // 2), slice(f // 4, f // 2), h // 2
    few_rows = x[rows] @ w  # [s/4, h] -> [s/4, f]
    few_columns = x @ w[:, columns]  # [s, h] -> [s, f/4]
    halves = x[:, :half] @ w[:half] + x[:, half:] @ w[half:]  # [s, h/2] -> [s, f]
    # The same shape, at another address and with another distance between rows.
    moved = np.empty((s, h + 3), dtype=np.float32)[:, 1 : h + 1]  # [s, h]
    moved[...] = x
    return Cut(
        rows=int(whole[rows].tobytes() != few_rows.tobytes()),
        columns=int(whole[:, columns].tobytes() != few_columns.tobytes()),
        inner=int(whole.tobytes() != halves.tobytes()),
        again=int(whole.tobytes() != (moved @ w.copy()).tobytes()),
        gap=max(relative_gap(few_rows, whole[rows]), relative_gap(few_columns, whole[:, columns]),
                relative_gap(halves, whole)),
        error=relative_gap(whole, x.astype(np.float64) @ w.astype(np.float64)),
    )


def show_products(lesson: Lesson) -> None:
    """The ranks share out the shapes; the counts are over all of them."""
    lesson.part("Matrix products, whole and cut")
    cuts = [cut_product(*SHAPES[index]) for index in share(len(SHAPES), lesson.rank, lesson.size)]
    mine = [sum(getattr(cut, name) for cut in cuts) for name in ("rows", "columns", "inner", "again")]
    largest = [max((cut.gap for cut in cuts), default=0.0), max((cut.error for cut in cuts), default=0.0)]
    counts = np.sum(all_gather(lesson.comm, np.array(mine, dtype=np.int64)), axis=0)
    gap, error = np.max(all_gather(lesson.comm, np.array(largest, dtype=np.float64)), axis=0)
    library = ", ".join(f"{pool['internal_api']} {pool['version']}, {pool.get('architecture', 'unknown')} kernels"
                        for pool in threadpool_info() if pool["user_api"] == "blas")
    lesson.say(f"{len(SHAPES)} random products X W in float32, by NumPy's BLAS on this machine ({library}):")
    lesson.say(table_of_cuts(counts))
    lesson.say(f"None is wrong: the whole products differ from float64 by at most {error:.1e} of their largest entry, "
               f"and the cut ones from the whole by at most {gap:.1e}. They are other roundings. That is why this "
               "project cuts the work in the same blocks and tiles for any number of ranks: no product has a shape "
               "that depends on N.")
    lesson.check("a product of one shape has one bit pattern, at any address and distance between rows", counts[3] == 0)
    lesson.check("the sum of the two halves differs from the whole product for some shapes", counts[2] > 0)
    lesson.check("all agree within float32 rounding: 5e-6 of the largest entry", max(gap, error) < 5e-6)


def table_of_cuts(counts: Array) -> Table:
    """How many of the shapes changed bits, for each way of cutting."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("compared with the whole product X W")
    table.add_column("shapes that differ in bits", justify="right")
    cuts = ("a slice of rows: X\\[rows] W", "a slice of columns: X W\\[:, columns]",
            "the sum over both halves of the inner dimension", "X W again, at another address")
    for text, count in zip(cuts, counts):
        table.add_row(text, f"{count} of {len(SHAPES)}")
    return table


def in_the_tree(parts: Array, order: Array) -> Array:
    """Hand the parts to the tree in the order given."""
    tree = Tree[Array](range(PARTS))
    for index, part in zip(order, parts[order]):
        tree.add(int(index), part)
    return tree.total


def pairwise(parts: Array) -> Array:
    """What the tree should give, in four lines: the largest full half on the left, the rest on the right."""
    if len(parts) == 1:
        return parts[0]
    half = 1 << (len(parts) - 1).bit_length() - 1
    return pairwise(parts[:half]) + pairwise(parts[half:])


def show_orders(lesson: Lesson) -> None:
    """The same parts in random orders, without messages."""
    lesson.part("One sum in many orders")
    parts, generator = random(4, PARTS, LENGTH), np.random.default_rng([SEED, 5])
    orders = [generator.permutation(PARTS) for _ in range(ORDERS)]
    naive, tree = ([add(parts, order) for order in orders] for add in (one_by_one, in_the_tree))
    lesson.say(f"{PARTS} random arrays of {LENGTH} numbers, added up in {ORDERS} random orders: {len(patterns(naive))} "
               f"bit patterns one by one, {len(patterns(tree))} by the tree. The first three orders:")
    for order, one, other in list(zip(orders, naive, tree))[:3]:
        lesson.say(f"  {' '.join(f'{index:2}' for index in order)}   one by one {digest(one)}   tree {digest(other)}")
    lesson.check("adding one by one gives more than one pattern", len(patterns(naive)) > 1)
    lesson.check("the tree, fed in the same orders, gives one pattern, that of a recursive pairwise sum",
                 patterns(tree) == {pairwise(parts).tobytes()})
    show_errors(lesson, parts, naive, tree)


def error_of(total: Array, parts: Array) -> Array:
    """The distance of each entry of a float32 sum from the exact sum, which `math.fsum` rounds but once, to float64."""
    exact = [math.fsum(column) for column in parts.T.tolist()]
    return np.abs(total.astype(np.float64) - exact)


def allowed(parts: Array, additions: int) -> Array:
    """How far a sum can be off, entry by entry, if every term goes through at most so many rounded additions."""
    unit = 2.0**-24  # half the distance from 1 to the next float32
    growth = additions * unit / (1 - additions * unit)
    return growth * np.abs(parts.astype(np.float64)).sum(axis=0)


def show_errors(lesson: Lesson, parts: Array, naive: list[Array], tree: list[Array]) -> None:
    """How far the sums of both kinds are from the exact one."""
    off, tree_off = [float(error_of(total, parts).max()) for total in naive], float(error_of(tree[0], parts).max())
    closer = sum(error < tree_off for error in off)
    lesson.say(f"Largest distance from the exact sum: one by one {min(off):.1e} to {max(off):.1e}, by the tree "
               f"{tree_off:.1e}. In {closer} of {ORDERS} orders one by one came closer than the tree. The tree is not "
               "the most exact order; it is one order.")
    # A term goes through at most PARTS - 1 additions that round when added one by one, in a tree through one per level.
    levels = (PARTS - 1).bit_length()
    lesson.check(f"one by one: every entry is as close as {PARTS - 1} roundings of each term allow",
                 all(np.all(error_of(total, parts) <= allowed(parts, PARTS - 1)) for total in naive))
    lesson.check(f"by the tree: every entry is as close as {levels} roundings of each term allow",
                 all(np.all(error_of(total, parts) <= allowed(parts, levels)) for total in tree))


@dataclass
class Sum:
    """What one rank made of one round: the order of the parts, and their sum in two ways."""

    order: list[int]
    naive: Array
    tree: Array


def send_parts(comm: Communicator, mine: dict[int, Array], generator: np.random.Generator) -> list[Request]:
    """Send this rank's parts to all others, a little late and in a random order, as work of uneven length would."""
    time.sleep(generator.uniform(0.0, 1e-3))
    order = [(int(part), peer) for part in generator.permutation(list(mine))
             for peer in range(comm.size) if peer != comm.rank]
    return [comm.Isend(mine[part], peer, Tag.PART + part) for part, peer in order]


def post_receives(comm: Communicator) -> list[tuple[int, Array, Request]]:
    """An array and a request for each part that another rank holds: the index of the part, the array, the request."""
    posted = []
    for peer in range(comm.size):
        for part in share(PARTS, peer, comm.size) if peer != comm.rank else ():
            array = np.empty(LENGTH, dtype=np.float32)
            posted.append((part, array, comm.Irecv(array, peer, Tag.PART + part)))
    return posted


def sum_over_ranks(comm: Communicator, mine: dict[int, Array], generator: np.random.Generator) -> Sum:
    """Add up all parts of all ranks as they come: one by one, and in the tree."""
    incoming, sends = post_receives(comm), send_parts(comm, mine, generator)
    order, naive, tree = [], np.zeros(LENGTH, dtype=np.float32), Tree[Array](range(PARTS))

    def add(part: int, array: Array) -> None:
        order.append(part)
        naive[...] += array
        tree.add(part, array)

    for part, array in mine.items():
        add(part, array.copy())  # the tree adds in place, and the array itself is still in flight
    while incoming:
        part, array, _ = incoming.pop(comm.Waitany([request for _, _, request in incoming]))
        add(part, array)
    comm.Waitall(sends)
    return Sum(order, naive, tree.total)


def show_ranks(lesson: Lesson) -> None:
    """The same parts, each sent by the rank that holds it."""
    lesson.part("The same sum over ranks, in order of arrival")
    parts = random(4, PARTS, LENGTH)
    mine = {part: parts[part] for part in share(PARTS, lesson.rank, lesson.size)}
    sums = [sum_over_ranks(lesson.comm, mine, np.random.default_rng([SEED, 6, number, lesson.rank]))
            for number in range(ROUNDS)]
    if lesson.size == 1:
        lesson.say("One rank holds all parts: nothing arrives, and there is one order. Run this with more ranks.")
    lesson.say(f"{ROUNDS} rounds. Each rank adds its own parts, then others as Waitany reports them. The last round:")
    last = sums[-1]
    lesson.say_from_all(f"{' '.join(f'{part:2}' for part in last.order)}   one by one {digest(last.naive)}   "
                        f"tree {digest(last.tree)}")
    naive, tree = (np.concatenate(all_gather(lesson.comm, np.stack(rows)))
                   for rows in ([one.naive for one in sums], [one.tree for one in sums]))
    lesson.say(f"In all {ROUNDS} rounds, N = {lesson.size}: {len(patterns(naive))} bit patterns one by "
               f"one, {len(patterns(tree))} by the tree.")
    lesson.check("every rank has received every part in every round",
                 all(sorted(one.order) == list(range(PARTS)) for one in sums))
    lesson.check("the tree gives one pattern on all ranks, in all rounds: that computed above without messages",
                 patterns(tree) == {pairwise(parts).tobytes()})
    off, tree_off = (max(float(error_of(row, parts).max()) for row in rows) for rows in (naive, tree))
    lesson.say(f"Largest distance from the exact sum: one by one {off:.1e}, by the tree {tree_off:.1e}.")
    lesson.check(f"one by one: every entry is as close as {PARTS - 1} roundings of each term allow",
                 all(np.all(error_of(row, parts) <= allowed(parts, PARTS - 1)) for row in naive))


def main(lesson: Lesson) -> None:
    """The lesson on one rank."""
    lesson.require_comparable_bits()
    show_three_numbers(lesson)
    show_products(lesson)
    show_orders(lesson)
    show_ranks(lesson)


if __name__ == "__main__":
    run(__doc__, main)
