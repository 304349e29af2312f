"""Overlap made real: post early, look in between, or have somebody look. The same ring before and after.

Objective: after this lesson you can turn a ring that waits into one that travels under its own computation: post the
receive before the work that hides it, keep two buffers, and see to it that the messages make progress, either by
looks between the tiles or with a second thread; and you can show from a timeline that it is so.

    mpirun -n 4 python lessons/15_overlap_made_real.py
    python lessons/15_overlap_made_real.py --ranks 4 --shuffle 7

(Every rank has one matrix, and each matrix goes round the ring and meets every rank's tiles: lesson 5's ring, cut down
to what matters here. The link is slowed down, as in lesson 14.)

Look at: the charts, where the waits W of the first have become messages ~ under the computation M in the next; the
table of what is hidden; the messages that are complete while their rank does nothing but multiply; and the ring with
one buffer in place of two, which is as fast, and wrong. As in lesson 14 times are shown and never checked.

Write it: `overlapped` is yours. Begin with `early`, which is below, and put the looks where they belong; or begin with
nothing. Have your own file judged in the place of the lesson's function:

    mpirun -n 2 python lessons/15_overlap_made_real.py --answer mine.py

Try it: in `overlapped`, move the line with `comm.Irecv` below the loop over the tiles, next to a `comm.Waitall` for it.
Every product is right and nothing hangs, but the check that each step's receive was posted before its first product
fails, and so does the one that every message was complete before its step's last product: a message for which no room
has been posted cannot move, however often somebody looks.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from statistics import median
from typing import TypeAlias

from stage import Lesson, link_that_takes, run, table_with, until_all_are_through

import numpy as np
from rich.markup import escape

from tsp_ref.arrays import Array
from tsp_ref.comm.clocks import gather_lanes, recording
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather, from_root, gather_texts
from tsp_ref.comm.link import Link
from tsp_ref.comm.request import Request
from tsp_ref.comm.timeline import Lane
from tsp_ref.comm.virtual import VirtualCommunicator, VirtualWorld
from tsp_ref.commands.rounds import hidden_fraction
from tsp_ref.errors import MessageError, UserError
from tsp_ref.pictures.chart import chart
from tsp_ref.process.terminal import console_for

SEED = 2604
SIDE = 384  # of the matrices
TILES, ROWS = 8, 384  # each rank has so many tiles, all ranks' tiles of one number together so many rows
REPEATS = 3
LINK_OF_STEP = 0.6  # the link takes so much of a step's computation for a matrix
REHEARSAL_RANKS, REHEARSAL_SIDE = 4, 8
REHEARSAL_SEEDS = (None, 0, 1)  # each an order of turns and deliveries; None is the order of posting
PATIENCE = 20.0  # seconds for what a progress thread does in a fraction of one

Multiply: TypeAlias = Callable[[int, int, Array], None]
"""multiply(step, tile, matrix): the product of one of this rank's tiles with the matrix that it holds at a step."""


class Tag(IntEnum):
    """What a message of this lesson is about."""

    MATRIX = 1
    SINGLE = 2


# Rings. Each takes a communicator, this rank's matrix, two buffers for others' and what to do with each at each step,
# TILES times: all start with this rank's own, then comes the left neighbour's, and so on.


def late(comm: Communicator, own: Array, spare: list[Array], multiply: Multiply) -> None:
    """First the work, then the messages: nothing is even posted while it computes."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    held = own
    for step in range(comm.size):
        for tile in range(TILES):
            multiply(step, tile, held)
        if step + 1 < comm.size:
            incoming = spare[step % 2]
            comm.Waitall([comm.Irecv(incoming, left, Tag.MATRIX), comm.Isend(held, right, Tag.MATRIX)])
            held = incoming


def early(comm: Communicator, own: Array, spare: list[Array], multiply: Multiply) -> None:
    """Posted before the work that is to hide it, waited for after it; and in between nobody looks."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    held = own
    for step in range(comm.size):
        in_flight: list[Request] = []
        incoming = spare[step % 2]
        if step + 1 < comm.size:
            in_flight = [comm.Irecv(incoming, left, Tag.MATRIX), comm.Isend(held, right, Tag.MATRIX)]
        for tile in range(TILES):
            multiply(step, tile, held)
        comm.Waitall(in_flight)
        held = incoming


def testall(comm: Communicator, requests: list[Request]) -> None:
    """Have a look at all messages in flight: each gets a chance to move on. (`comm.progress(block, slot)`, which the
    project's schedules call before each tile's work, does it with all that is open, for --progress poll.)"""
    for request in requests:
        comm.Test(request)


def overlapped(comm: Communicator, own: Array, spare: list[Array], multiply: Multiply) -> None:
    """Yours: as `early`, and between the tiles somebody looks."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    held = own
    for step in range(comm.size):
        in_flight: list[Request] = []
        incoming = spare[step % 2]
        if step + 1 < comm.size:
            in_flight.append(comm.Isend(held, right, Tag.MATRIX))
            in_flight.append(comm.Irecv(incoming, left, Tag.MATRIX))
        for tile in range(TILES):
            testall(comm, in_flight)
            multiply(step, tile, held)
        # Both must be through: what has come is read next, and what has left may be written over in the step after.
        comm.Waitall(in_flight)
        held = incoming


Turn: TypeAlias = Callable[[Communicator, Array, list[Array], Multiply], None]


# What a rank has, and what it notes.


def matrix_of(rank: int, side: int) -> Array:
    """A rank's random matrix. Keyed by the rank, so that any rank can compute what it should have met."""
    return np.random.default_rng([SEED, rank, side]).standard_normal((side, side), dtype=np.float32)


class Ring:
    """A rank's tiles, matrix and buffers: to run a ring with, or its halves."""

    def __init__(self, comm: Communicator, side: int = SIDE) -> None:
        self.comm, self.side = comm, side
        self.tiles = np.random.default_rng([SEED, 100 + comm.rank, side]).standard_normal(
            (TILES, ROWS // comm.size, side), dtype=np.float32)
        self.own = matrix_of(comm.rank, side)
        self.spare = [np.empty_like(self.own) for _ in range(2)]
        self.notes = Notes()

    def multiply(self, step: int, tile: int, matrix: Array) -> None:
        """One product, noted."""
        comm, notes = self.comm, self.notes
        if tile == 0:
            notes.posted.append(comm.ledger.sums("receive", "MATRIX")[0] - notes.received_before)
        if tile == TILES - 1:
            notes.last_begins.append(time.perf_counter())
        comm.progress((comm.rank - step) % comm.size, tile)  # in mode `wait` it only notes the tile on the timeline
        notes.products[step, tile] = self.tiles[tile] @ matrix  # [ROWS/N, side] @ [side, side]

    def turn(self, ring: Turn) -> Notes:
        """One turn of a ring: what was noted of it."""
        self.notes = Notes(self.comm.ledger.sums("receive", "MATRIX")[0])
        phase, self.comm.phase = self.comm.phase, ("mlp", "forward")
        ring(self.comm, self.own, self.spare, self.multiply)
        self.comm.phase = phase
        return self.notes

    def messages(self) -> None:
        """The messages alone."""
        early(self.comm, self.own, self.spare, lambda step, tile, matrix: None)

    def computation(self) -> None:
        """The products alone."""
        self.notes = Notes()
        for step in range(self.comm.size):
            for tile in range(TILES):
                self.multiply(step, tile, self.own)

    def right(self, notes: Notes) -> bool:
        """Whether every product has the bits of that with the matrix which the rank should have met."""
        size = self.comm.size
        wanted = {(step, tile): self.tiles[tile] @ matrix_of((self.comm.rank - step) % size, self.side)
                  for step in range(size) for tile in range(TILES)}
        return set(notes.products) == set(wanted) and all(
            notes.products[key].tobytes() == product.tobytes() for key, product in wanted.items())


@dataclass
class Notes:
    """What was noted in a turn.

    products     (step, tile) -> product
    posted       for each step, when its first product began: how many receives had been posted in this turn
    last_begins  for each step, when its last product began
    """

    received_before: int = 0
    products: dict[tuple[int, int], Array] = field(default_factory=dict)
    posted: list[int] = field(default_factory=list)
    last_begins: list[float] = field(default_factory=list)

    def in_time(self, lane: Lane) -> list[bool]:
        """For each message of a turn whether it was complete before its step's last product began."""
        ends = {verb: [message.end for message in lane.messages if message.verb == verb]
                for verb in ("receive", "send")}
        return [end < begin for verb in ends for end, begin in zip(ends[verb], self.last_begins)]


# The judge of `overlapped`.


@dataclass
class Rehearsal:
    """What runs of a ring on a few virtual ranks showed.

    right     all products have the right bits, on every rank, under every seed, and also where looks are in vain
    posted    at each step the receive was posted before the first product
    in_time   in the order of posting, each message was complete before its step's last product began
    error     what ended a run early, if anything
    """

    right: bool = False
    posted: bool = False
    in_time: bool = False
    error: str = ""


def look_in_vain(comm: Communicator, times: int = 100) -> None:
    """Let the first looks at each message find nothing: so a ring that does not wait is found out."""
    look, looks = comm.Test, Counter[int]()

    def test(request: Request) -> bool:
        looks[id(request)] += 1
        return request.done or (looks[id(request)] > times and look(request))

    comm.Test = test  # type: ignore[method-assign]


def rehearse(ring: Turn, buffers: int = 2) -> Rehearsal:
    """Run a ring on a few virtual ranks, which copy a message as late as they can, once per seed."""

    def rank(comm: Communicator, in_vain: bool) -> tuple[bool, bool, bool]:
        if in_vain:
            look_in_vain(comm)
        mine = Ring(comm, REHEARSAL_SIDE)
        mine.spare = [mine.spare[number % buffers] for number in range(2)]
        with recording(comm) as timeline:
            notes = mine.turn(ring)
        comm.finish()
        lane = timeline.lane(comm.rank)
        wanted = [min(step + 1, comm.size - 1) for step in range(comm.size)]
        return mine.right(notes), notes.posted == wanted, len(lane.messages) > 0 and all(notes.in_time(lane))

    try:
        found = [VirtualWorld(REHEARSAL_RANKS, seed).run(partial(rank, in_vain=in_vain))
                 for in_vain in (False, True) for seed in REHEARSAL_SEEDS]
    except MessageError as error:
        return Rehearsal(error=str(error))
    right, posted = (all(row[index] for rows in found for row in rows) for index in (0, 1))
    return Rehearsal(right, posted, all(row[2] for row in found[0]))


def show_judged(lesson: Lesson) -> bool:
    """The ring that is the reader's, on virtual ranks: whether it can be run on real ones, where it might hang.

    On rank 0 alone: the others would find the same.
    """
    lesson.part("The ring with looks")
    lesson.say(f"On {REHEARSAL_RANKS} virtual ranks inside this one, which copy messages as late as they can, and move "
               "them on only in a\nlook or a wait: so what happens there follows from the program and not from luck.")
    others = lesson.rank > 0
    seen, as_early, as_late = (Rehearsal() if others else rehearse(ring) for ring in (overlapped, early, late))
    if seen.error:
        lesson.say(f"  {escape(seen.error)}")
    lesson.check(f"overlapped: every product has the right bits, under each of {len(REHEARSAL_SEEDS)} orders of "
                 "messages", others or seen.right)
    lesson.check("overlapped: at each step the receive was posted before the first product", others or seen.posted)
    lesson.check("overlapped: every message was complete before its step's last product began", others or seen.in_time)
    lesson.check("early, on the same ranks: posted as early, and not every message complete by then",
                 others or (as_early.right and as_early.posted and not as_early.in_time))
    lesson.check("late, on the same ranks: nothing posted by then", others or (as_late.right and not as_late.posted))
    return bool(from_root(lesson.comm, seen.right))


def show_buffers(lesson: Lesson) -> None:
    """One buffer for two matrices."""
    lesson.part("Two buffers")
    lesson.say(f"While one matrix is multiplied with and sent on, the next one comes: into another buffer. That is\n"
               f"{SIDE * SIDE * 4:,} bytes twice here, for any number of ranks. With one buffer for both:")
    one = rehearse(early, buffers=1) if lesson.rank == 0 else Rehearsal()
    lesson.check("one buffer: wrong bits on the virtual ranks, and no error", not one.right and not one.error)


# On the ranks of this run.


@dataclass(frozen=True)
class Kind:
    """A ring, and who makes progress on its messages."""

    name: str
    ring: Turn
    progress: str = "wait"


def kinds(lesson: Lesson) -> list[Kind]:
    """The rings that can be run here. A second thread can help real ranks only, if the MPI lets two threads call it."""
    found = [Kind("late", late), Kind("early", early), Kind("overlapped", overlapped)]
    try:
        lesson.comm.travel_by("thread", None)
        found.append(Kind("early, with a thread", early, "thread"))
    except UserError as error:
        lesson.say(f"Without a progress thread: {escape(str(error))}")
    lesson.comm.travel_by("wait", None)
    return found


def show_timings(lesson: Lesson, mine: Ring) -> tuple[list[Kind], Link]:
    """Each ring timed against its halves, by turns."""
    lesson.part("What is hidden")
    comm = lesson.comm
    possible = kinds(lesson)
    steps = comm.size * (comm.size if isinstance(comm, VirtualCommunicator) else 1)  # of all ranks, one after another
    needed = LINK_OF_STEP / steps * median(until_all_are_through(comm, mine.computation) for _ in range(REPEATS))
    link = link_that_takes(needed, mine.own.nbytes)
    lesson.say(f"Each rank has {TILES} tiles, and the ring {comm.size} steps. The link needs {LINK_OF_STEP} of a "
               f"step's computation for a\nmatrix: {1e3 * needed:.1f} ms. Medians of {REPEATS} rounds by turns, in ms:")

    def seconds_of(work: Callable[[], object], progress: str = "wait") -> float:
        comm.travel_by(progress, link)
        seconds = until_all_are_through(comm, work)
        comm.travel_by("wait", None)
        return seconds

    taken: dict[str, list[float]] = {name: [] for name in ("messages", "computation", *(k.name for k in possible))}
    for _ in range(REPEATS):
        taken["messages"].append(seconds_of(mine.messages))
        taken["computation"].append(seconds_of(mine.computation))
        for kind in possible:
            taken[kind.name].append(seconds_of(partial(mine.turn, kind.ring), kind.progress))
    messages, computation, *boths = (median(seconds) for seconds in taken.values())
    table = table_with("ring", "messages", "computation", "both", "hidden")
    for kind, both in zip(possible, boths):
        part = hidden_fraction(messages, computation, both)
        table.add_row(kind.name, *(f"{1e3 * seconds:.1f}" for seconds in (messages, computation, both)), f"{part:.0%}")
    lesson.say(table)
    if not isinstance(comm, VirtualCommunicator):
        warn_of_too_many(lesson)
    return possible, link


def ranks_and_cores(comm: Communicator) -> tuple[int, int]:
    """How many of the ranks run on rank 0's machine, and on how many cores. Every rank must call it."""
    # A launcher may have bound each rank to cores of its own.
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    rows = [json.loads(text) for text in gather_texts(comm, json.dumps([platform.node(), *cores]))]
    here = [set(row[1:]) for row in rows if row[0] == rows[0][0]]
    return len(here), len(set().union(*here))


def warn_of_too_many(lesson: Lesson) -> None:
    """Say so if ranks share cores. Every rank must call it."""
    ranks, cores = ranks_and_cores(lesson.comm)
    if ranks <= cores:
        return
    instead = (f"on {cores} ranks: mpirun -n {cores} python lessons/15_overlap_made_real.py" if cores > 1 else
               "on a machine with two cores or more")
    lesson.say(f"[yellow]Ranks outnumber cores[/]: {ranks} ranks on {cores} core{'s' * (cores > 1)}. While a rank "
               "waits, its core is another's, whose work hides\nsome of its messages; and a rank that should look may "
               f"not have a core to do so. This table says little; run it\n{instead}")


def show_charts(lesson: Lesson, mine: Ring, possible: list[Kind], link: Link) -> None:
    """The same ring, before and after, as pictures; and what is true of each, however slow the machine."""
    lesson.part("Before and after")
    for kind in possible[1:]:
        lesson.comm.travel_by(kind.progress, link)
        from_root(lesson.comm, 0)
        with recording(lesson.comm) as timeline:
            notes = mine.turn(kind.ring)
        lesson.comm.travel_by("wait", None)
        lane, lanes = timeline.lane(lesson.rank), gather_lanes(lesson.comm, timeline)
        rows = all_gather(lesson.comm, np.array([sum(notes.in_time(lane)), len(lane.messages)], dtype=np.int64))
        in_time, messages = np.sum(rows, axis=0).tolist()
        lesson.say(f"{kind.name}: {in_time} of {messages} messages were complete before their step's last product")
        if lanes:
            lesson.say(chart(lanes, lesson.console.width))
        lesson.check(f"{kind.name}: every product has the right bits", mine.right(notes))
        if kind is possible[1]:
            lesson.check("early: not one message was complete before its step's last product, for nobody looked",
                         in_time == 0)
    lesson.say("(Each rank goes on when it can, so a neighbour may not have sent yet: then there is nothing to hide.)")


def show_thread(lesson: Lesson, possible: list[Kind]) -> None:
    """A message that is complete though its rank only multiplies."""
    lesson.part("Somebody else looks")
    if possible[-1].progress != "thread":
        lesson.say("That would be a second thread of a rank, which looks while the first is inside a matmul,\n"
                   "where NumPy lets other threads run. It is left out here: only one virtual rank runs at a time, so\n"
                   "nobody could help it, and some MPIs let only one thread call them. See it with mpirun.")
        return
    lesson.say("Post, and then multiply until the messages are complete, without a call into MPI. With a progress\n"
               "thread that ends; without one it never would, so it is given up after the longest time of the first:")
    helped, products, seconds = multiplied_until_complete(lesson.comm, "thread", PATIENCE)
    lesson.say_from_all(f"with the thread: complete after {products} products, {1e3 * seconds:.1f} ms")
    longest = max(float(row[0]) for row in all_gather(lesson.comm, np.array([seconds])))
    alone, products, _ = multiplied_until_complete(lesson.comm, "wait", longest)
    lesson.say_from_all(f"without: {'complete' if alone else 'not complete'} after {products} products")
    lesson.check("with the thread, a rank's messages are complete though it only multiplies", helped)
    lesson.check("without the thread they are not", not alone)


def multiplied_until_complete(comm: Communicator, progress: str, patience: float) -> tuple[bool, int, float]:
    """Post, then multiply until it is noted that both messages are complete or patience is at an end: whether they
    were, how many products that took, and how many seconds."""
    comm.travel_by(progress, None)
    from_root(comm, 0)
    factor, incoming = matrix_of(comm.rank, SIDE), np.empty((SIDE, SIDE), dtype=np.float32)
    with recording(comm):
        requests = [comm.Irecv(incoming, (comm.rank - 1) % comm.size, Tag.SINGLE),
                    comm.Isend(factor, (comm.rank + 1) % comm.size, Tag.SINGLE)]
        begin, products = time.perf_counter(), 0
        while True:
            np.matmul(factor, factor)
            products += 1
            seconds = time.perf_counter() - begin
            complete = all(request.noticed for request in requests)  # a note, not a look
            if complete or seconds > patience:
                break
        comm.Waitall(requests)
    comm.travel_by("wait", None)
    return complete, products, seconds


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    possible = show_judged(lesson)
    show_buffers(lesson)
    if not possible:
        lesson.say("The rest of the lesson runs the ring on these ranks: when it is right on the virtual ones.")
    elif lesson.size == 1:
        alone(lesson)
    else:
        on_these_ranks(lesson)


def on_these_ranks(lesson: Lesson) -> None:
    """What needs neighbours."""
    mine = Ring(lesson.comm)
    possible, link = show_timings(lesson, mine)
    show_charts(lesson, mine, possible, link)
    show_thread(lesson, possible)


def alone(lesson: Lesson) -> None:
    """One rank has no messages, so two virtual ones take its place."""
    lesson.say("One rank has no neighbour, so the lesson goes on with 2 virtual ranks inside this one.")

    def teach(comm: Communicator) -> list[str]:
        inner = Lesson(comm, console_for(comm.rank))
        on_these_ranks(inner)
        return inner.failures

    lesson.failures += VirtualWorld(2).run(teach)[0]


if __name__ == "__main__":
    run(__doc__, main, holes=(overlapped,))
