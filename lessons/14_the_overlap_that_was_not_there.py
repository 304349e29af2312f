"""The overlap that was not there: Isend, a matmul, Wait. Posted early is not yet in progress.

Objective: after this lesson you can time messages, computation and both so that the three can be compared, say in one
number how much was hidden, and find out when a message was complete; and you can say why a program that posts its
messages before a computation and waits for them after it may hide nothing at all.

    mpirun -n 4 python lessons/14_the_overlap_that_was_not_there.py
    python lessons/14_the_overlap_that_was_not_there.py --ranks 4

MPI moves a large message mostly inside its own calls, and during a matmul nobody calls it. Between processes on one
machine that costs little, so this lesson slows the link down: it starts with a message when somebody notices that the
bytes are there, as a network may wait for a processor to start a large transfer.

Look at: the table of three timings, where `both` is about the sum of the other two; the moment at which each rank's
message was complete, always after the computation; what a look in between changes; and the last table, which says what
this machine's MPI does without the link. Times are shown and never checked, for a busy machine can stretch any of them.
What is checked is what came after what, and that nothing was faster than the link.

Write it: `by_turns` and `hidden` are yours. Write one or both in a file of your own, and have them judged in the place
of the lesson's:

    mpirun -n 2 python lessons/14_the_overlap_that_was_not_there.py --answer mine.py

Try it: look after each product, by `looks: Collection[int] = range(PRODUCTS)` in the first line of `both`. The hidden
part in the link's row goes up, and the check that from the computation's end on each message took the link's whole time
fails; on a machine that is not too busy, so does the one that no message was complete before. That is the next lesson.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from statistics import median
from typing import TypeAlias

from stage import Lesson, link_that_takes, run, table_with, until_all_are_through

import numpy as np

from tsp_ref.arrays import Array
from tsp_ref.comm.clocks import recording
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather, from_root
from tsp_ref.comm.request import Request
from tsp_ref.comm.timeline import Lane
from tsp_ref.comm.virtual import VirtualCommunicator, VirtualWorld
from tsp_ref.commands.rounds import hidden_fraction
from tsp_ref.process.terminal import console_for

SEED = 2604
SIZE = 1 << 18  # bytes of a message, more than MPIs copy aside
SIDE, PRODUCTS = 256, 16  # of the matrices, of which so many products are made
REPEATS = 5
LINK_OF_COMPUTE = 0.75  # the link takes so much of the computation's time for a message
PROBE_BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)

Run: TypeAlias = Callable[[], object]
"""Something to time."""


class Tag(IntEnum):
    """What a message of this lesson is about."""

    RING = 1
    PROBE = 2


# Yours.


def by_turns(runs: Sequence[Run], repeats: int, seconds_of: Callable[[Run], float]) -> list[float]:
    """The median of each run's seconds over so many rounds; in a round each run has its turn.

    By turns, because a machine that is slow for a second must not be slow for one of them only. Medians, because one
    time out of the way says nothing about the others.

    seconds_of  does a run, and returns how long it took
    """
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for seconds, each in zip(taken, runs):
            seconds.append(seconds_of(each))
    return [median(seconds) for seconds in taken]


def hidden(messages: float, computation: float, both: float) -> float:
    """What part of the shorter of the two was hidden under the other: 0 if one came after the other, 1 if it cost no
    time. All in seconds, of each alone and of both together."""
    return (messages + computation - both) / min(messages, computation)


# An exchange and a computation.


class Pair:
    """A rank's messages, one to its right neighbour and one from its left, and its computation."""

    def __init__(self, comm: Communicator, size: int = SIZE, tag: Tag = Tag.RING) -> None:
        self.comm, self.tag = comm, tag
        self.left, self.right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        self.sent, self.wanted = self._array_of(comm.rank, size), self._array_of(self.left, size)
        self.received = np.zeros_like(self.sent)
        self.factors = np.random.default_rng([SEED, comm.rank]).standard_normal((2, SIDE, SIDE), dtype=np.float32)
        self.product = np.empty((SIDE, SIDE), dtype=np.float32)

    def _array_of(self, rank: int, size: int) -> Array:
        return np.random.default_rng([SEED, rank, size]).uniform(1, 2, size // 4).astype(np.float32)

    def post(self) -> list[Request]:
        """Both messages."""
        return [self.comm.Irecv(self.received, self.left, self.tag), self.comm.Isend(self.sent, self.right, self.tag)]

    def compute(self, requests: Sequence[Request] = (), looks: Collection[int] = ()) -> float:
        """All products. After those numbered in `looks`, see whether messages are complete. When the first look began;
        without one, when the last product ended."""
        first = float("inf")
        for number in range(PRODUCTS):
            np.matmul(*self.factors, out=self.product)
            if number in looks:
                first = min(first, time.perf_counter())
                for request in requests:
                    self.comm.Test(request)
        return min(first, time.perf_counter())

    def messages(self) -> None:
        """The messages alone."""
        self.comm.Waitall(self.post())


def both(pair: Pair, looks: Collection[int] = ()) -> tuple[float, float]:
    """What looks like overlap: post, compute, wait. When the first look began, and when the computation ended."""
    requests = pair.post()
    looked = pair.compute(requests, looks=looks)
    computed = time.perf_counter()
    pair.comm.Waitall(requests)
    return looked, computed


# The judge of `by_turns` and `hidden`.


def order_and_medians(repeats: int, generator: random.Random) -> tuple[bool, bool]:
    """Whether `by_turns` gives each of three runs one turn in a round, and whether what it returns are the medians of
    times that are drawn at random, a few of them far out of the way."""
    runs: list[Run] = [lambda: "messages", lambda: "computation", lambda: "both"]
    order: list[int] = []
    times: dict[int, list[float]] = {number: [] for number in range(len(runs))}

    def seconds_of(one: Run) -> float:
        order.append(runs.index(one))
        times[order[-1]].append(generator.random() * generator.choice((1, 1, 1, 50)))
        return times[order[-1]][-1]

    found = by_turns(runs, repeats, seconds_of)
    rounds = [sorted(order[start : start + len(runs)]) for start in range(0, len(order), len(runs))]
    wanted = [sorted(seconds)[len(seconds) // 2] for seconds in times.values() if seconds]
    return rounds == [[0, 1, 2]] * repeats, found is not None and list(found) == wanted


def hidden_is_right(generator: random.Random) -> bool:
    """Whether `hidden` is the project's own figure, for times that are drawn at random."""
    messages, computation = generator.uniform(0.01, 1), generator.uniform(0.01, 1)
    together = generator.uniform(max(messages, computation), messages + computation)
    found = hidden(messages, computation, together)
    wanted = hidden_fraction(messages, computation, together)
    return found is not None and abs(found - wanted) < 1e-12


def show_judged(lesson: Lesson) -> None:
    """The two functions that are the reader's."""
    lesson.part("How to time it")
    lesson.say("Three times are needed: of the messages alone, of the computation alone, of both. What is hidden is\n"
               "what both together take less than one after the other, as a part of the shorter of the two:\n"
               "  hidden = (messages + computation - both) / min(messages, computation)")
    generator = random.Random(SEED)
    verdicts = [order_and_medians(repeats, generator) for repeats in (1, 3, 5, 9)]
    lesson.check("by_turns: in each round each run has one turn", all(order for order, _ in verdicts))
    lesson.check("by_turns: it returns the median of each run's times", all(medians for _, medians in verdicts))
    lesson.check("hidden: for a hundred times drawn at random it is what the command `overlap` calls hidden",
                 all(hidden_is_right(generator) for _ in range(100)))


# The lesson.


def show_timings(lesson: Lesson, pair: Pair) -> float:
    """Messages, computation, both: as MPI is here, and over the link. Returns the seconds that the link takes."""
    lesson.part("Three timings")
    comm = lesson.comm
    seconds_of = partial(until_all_are_through, comm)
    virtual = isinstance(comm, VirtualCommunicator)
    needed = LINK_OF_COMPUTE * median(seconds_of(pair.compute) for _ in range(REPEATS)) / (comm.size if virtual else 1)
    lesson.say(f"Each rank sends {SIZE:,} bytes to its right neighbour and makes {PRODUCTS} products of matrices, "
               f"{SIDE} x {SIDE}.\nThe link needs {LINK_OF_COMPUTE} of the computation's time for a message, "
               f"{1e3 * needed:.1f} ms. Medians of {REPEATS}\nrounds, in ms, from when all ranks begin until all "
               "are through:")
    table = table_with("", "messages", "computation", "both", "hidden")
    for name, link in (("as MPI is here", None), ("over the link", link_that_takes(needed, SIZE))):
        comm.travel_by("wait", link)
        medians = by_turns([pair.messages, pair.compute, partial(both, pair)], REPEATS, seconds_of)
        comm.travel_by("wait", None)
        table.add_row(name, *timing_cells(medians))
    lesson.say(table)
    lesson.say("100%: the shorter of the two costs no time at all; 0%: one comes after the other; a little more or\n"
               "less is noise. Nothing is said where the messages are too short to matter.")
    if virtual:
        lesson.say("Virtual ranks compute, and wait for the link, one after the other, so all is N times as long.")
    elif comm.size > 2:
        lesson.say("With more ranks than cores, one rank's waiting is another's computing: that hides something, too.")
    lesson.check("it was the left neighbour's array that came, every bit of it",
                 pair.received.tobytes() == pair.wanted.tobytes())
    return needed


def timing_cells(medians: list[float] | None) -> list[str]:
    """The three times, and what is hidden if it can be told; nothing for what a reader has not written yet."""
    if medians is None:
        return []
    messages, computation, _ = medians
    part = hidden(*medians) if messages > computation / 10 else None
    return [*(f"{1e3 * seconds:.1f}" for seconds in medians), "" if part is None else f"{part:.0%}"]


@dataclass(frozen=True)
class Moments:
    """When what happened in a run of `both`, in seconds since the messages were posted, on one rank.

    complete  of the message that came and of the one that left, the earlier and the later
    """

    looked: float
    computed: float
    complete: tuple[float, float]

    @classmethod
    def of(cls, lane: Lane, looked: float, computed: float) -> Moments:
        """From the rank's record of it."""
        posted, ends = lane.messages[0].begin, sorted(message.end for message in lane.messages)
        return cls(looked - posted, computed - posted, (ends[0] - posted, ends[-1] - posted))


def observed(lesson: Lesson, pair: Pair, needed: float, looks: Collection[int]) -> Moments:
    """One run of `both` over the link, recorded."""
    lesson.comm.travel_by("wait", link_that_takes(needed, SIZE))
    from_root(lesson.comm, 0)
    with recording(lesson.comm) as timeline:
        looked, computed = both(pair, looks) if looks else both(pair)
    lesson.comm.travel_by("wait", None)
    return Moments.of(timeline.lane(lesson.rank), looked, computed)


def show_moments(lesson: Lesson, pair: Pair, needed: float) -> None:
    """When the messages were complete, with nobody looking."""
    lesson.part("When was the message complete?")
    lesson.say("A timeline notes when a rank notices that a message is complete. Over the link, post, compute, wait:")
    seen = observed(lesson, pair, needed, ())
    lesson.say_from_all(f"posted at 0.0 ms, computed until {1e3 * seen.computed:.1f}, both messages complete at "
                        f"{1e3 * seen.complete[1]:.1f}: {1e3 * (seen.complete[1] - seen.computed):.1f} after that")
    lesson.say(f"The whole {1e3 * needed:.1f} ms of the link came after the computation. Nobody had told it to start.")
    lesson.check("no message was complete before the computation had ended", seen.complete[0] > seen.computed)
    lesson.check("and from then on each took the link's whole time, or longer",
                 seen.complete[0] - seen.computed >= needed)


def show_looks(lesson: Lesson, pair: Pair, needed: float) -> None:
    """The same with a look here and there."""
    lesson.part("One look is enough for the link, and often not for MPI")
    lesson.say("The same with `Test` after some of the products. A look starts what is there to be started: it has to\n"
               "come when the message is there, and MPI may need several for a large one. When both messages were\n"
               "complete, in ms, on the slowest rank; below 0: already before the computation had ended:")
    table = table_with(f"looks after product, of {PRODUCTS}", "since the computation's end", "since the first look")
    faster = False
    for name, looks in {"none": (), "the last": (PRODUCTS - 1,), f"number {PRODUCTS // 2}": (PRODUCTS // 2 - 1,),
                        "number 2": (1,), "every second": range(1, PRODUCTS, 2)}.items():
        seen = observed(lesson, pair, needed, looks)
        faster = faster or seen.complete[0] - seen.looked < needed
        rows = all_gather(lesson.comm, np.array([seen.complete[1] - seen.computed, seen.complete[1] - seen.looked]))
        table.add_row(name, *(f"{1e3 * float(value):.1f}" for value in np.max(rows, axis=0)))
    lesson.say(table)
    lesson.check("in no case was a message through the link sooner than its time after the first look", not faster)
    lesson.say("The next lesson puts looks where they belong, and has somebody else look.")


def show_library(lesson: Lesson) -> None:
    """What this machine's MPI does, measured and not checked, since MPI promises neither."""
    lesson.part("Without the link: what this machine's MPI does meanwhile")
    lesson.say("Post, compute, peek into the receive buffer, as a program must not, and wait. Largest over the ranks,\n"
               f"medians of {REPEATS}:")
    table = table_with("bytes", "messages alone, ms", "wait after the computation, ms", "in the buffer before the wait")
    for size in PROBE_BYTES:
        pair = Pair(lesson.comm, size, Tag.PROBE)
        alone = median(until_all_are_through(lesson.comm, pair.messages) for _ in range(REPEATS))
        waits, there = zip(*(peeked(pair) for _ in range(REPEATS)))
        table.add_row(f"{size:,}", f"{1e3 * alone:.2f}", f"{1e3 * median(waits):.2f}", f"{int(median(there)):,}")
    lesson.say(table)
    lesson.say("Where nothing is in the buffer before the wait, nothing has been hidden, however early it was posted.\n"
               "A wait may also be for a neighbour that still computes, and so makes no progress on its message.")


def peeked(pair: Pair) -> tuple[float, float]:
    """The seconds of the wait after the computation, and the bytes that had come before it: largest over the ranks."""
    pair.received[...] = 0
    from_root(pair.comm, 0)
    requests = pair.post()
    pair.compute()
    there = 4 * np.count_nonzero(pair.received)
    begin = time.perf_counter()
    pair.comm.Waitall(requests)
    wait, most = np.max(all_gather(pair.comm, np.array([time.perf_counter() - begin, there])), axis=0)
    return float(wait), float(most)


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    show_judged(lesson)
    if lesson.size == 1:
        return alone(lesson)
    pair = Pair(lesson.comm)
    needed = show_timings(lesson, pair)
    show_moments(lesson, pair, needed)
    show_looks(lesson, pair, needed)
    show_library(lesson)


def alone(lesson: Lesson) -> None:
    """One rank has no messages, so two virtual ones take its place."""
    lesson.say("One rank has nobody to send to, so the lesson goes on with 2 virtual ranks inside this one.")

    def teach(comm: Communicator) -> list[str]:
        inner = Lesson(comm, console_for(comm.rank))
        main(inner)
        return inner.failures

    lesson.failures += VirtualWorld(2).run(teach)[0]


if __name__ == "__main__":
    run(__doc__, main, holes=(by_turns, hidden))
