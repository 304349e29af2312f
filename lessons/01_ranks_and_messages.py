"""Ranks and messages: one program on N ranks, and what it may assume about a message in flight.

Objective: after this lesson you can say what a rank is, pass arrays round a ring with Isend and Irecv, show the
deadlock that MPI's buffering hides and cure it in two ways, and say why a buffer is its message's until Wait returns.

    mpirun -n 4 python lessons/01_ranks_and_messages.py
    python lessons/01_ranks_and_messages.py --ranks 4 --shuffle 7      (virtual ranks, messages in a random order)

Look at: the size from which this machine's MPI no longer completes a send that nobody receives yet; the error that
names who waits for whom; the bits that arrive when a send buffer is changed too early.

Try it: in `receive_first`, move the line with `comm.Irecv` below the line with `comm.Isend`. The check "receive first,
then a blocking send: the left neighbour's bits arrive on virtual ranks ..." fails: everybody sends, nobody receives.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from stage import Lesson, run

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.errors import MessageError

SEED = 2604
LENGTH = 1000
PROBE_BYTES = (64, 4096, 65536, 1048576)
REHEARSAL_RANKS = 3
REHEARSAL_SEEDS = (None, 0, 1, 2, 3)  # each an order of ranks and deliveries; None is the order of posting


class Tag(IntEnum):
    """What a message of this lesson is about."""

    RING = 1
    PROBE = 2
    SHIFT = 3
    LETTER = 4


def array_of(rank: int, length: int = LENGTH) -> Array:
    """A rank's random array. Keyed by the rank, so that any rank can compute what it should receive from any other."""
    return np.random.default_rng([SEED, rank]).standard_normal(length, dtype=np.float32)


def neighbours(comm: Communicator) -> tuple[int, int]:
    """The ranks to the left and to the right on the ring."""
    return (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size


def same_bits(found: Array, wanted: Array) -> bool:
    """Equal in every bit: bytes, not a tolerance."""
    return found.tobytes() == wanted.tobytes()


def refused(comm: Communicator, peer: int) -> str:
    """The error of a message to `peer`, or nothing if it is accepted."""
    try:
        comm.Isend(array_of(comm.rank), peer, Tag.RING)
    except MessageError as error:
        return str(error)
    return ""


def ring_pass(comm: Communicator) -> list[bool]:
    """Send every rank's array once round the ring, N hops; for each hop, whether the expected array arrived."""
    left, right = neighbours(comm)
    held, spare = array_of(comm.rank), np.empty(LENGTH, dtype=np.float32)
    as_expected = []
    for hop in range(1, comm.size + 1):
        # Two buffers: what is sent must stay untouched while what is received is written.
        comm.Waitall([comm.Irecv(spare, left, Tag.RING), comm.Isend(held, right, Tag.RING)])
        held, spare = spare, held
        as_expected.append(same_bits(held, array_of((comm.rank - hop) % comm.size)))
    return as_expected


def completes_alone(comm: Communicator, nbytes: int) -> bool:
    """Whether a send completes although its receive is not posted yet."""
    left, right = neighbours(comm)
    message = np.random.default_rng([SEED, nbytes]).integers(0, 256, nbytes, dtype=np.uint8)
    send = comm.Isend(message, right, Tag.PROBE)
    alone = any(comm.Test(send) for _ in range(200))
    # Nobody receives before everybody has looked: this exchange lets a rank go on only when all have come so far.
    all_gather(comm, np.array([nbytes], dtype=np.int64))
    comm.Waitall([send, comm.Irecv(np.empty_like(message), left, Tag.PROBE)])
    return alone


def send_first(comm: Communicator, mine: Array) -> Array:
    """The deadlock: a blocking send is a send and its Wait, and every rank does that before it receives."""
    left, right = neighbours(comm)
    incoming = np.empty_like(mine)
    comm.Wait(comm.Isend(mine, right, Tag.SHIFT))
    comm.Wait(comm.Irecv(incoming, left, Tag.SHIFT))
    return incoming


def receive_first(comm: Communicator, mine: Array) -> Array:
    """One cure: the receive is already posted when the rank blocks in its send."""
    left, right = neighbours(comm)
    incoming = np.empty_like(mine)
    receive = comm.Irecv(incoming, left, Tag.SHIFT)
    comm.Wait(comm.Isend(mine, right, Tag.SHIFT))
    comm.Wait(receive)
    return incoming


def both_then_wait(comm: Communicator, mine: Array) -> Array:
    """The other cure, and this project's habit: post everything, in any order, and only then wait."""
    left, right = neighbours(comm)
    incoming = np.empty_like(mine)
    comm.Waitall([comm.Isend(mine, right, Tag.SHIFT), comm.Irecv(incoming, left, Tag.SHIFT)])
    return incoming


Exchange = Callable[[Communicator, Array], Array]


@dataclass
class Rehearsal:
    """What several runs of an exchange showed.

    right   whether every rank of every run got the right bits
    orders  the different orders in which the ranks finished
    error   what ended a run early, if anything
    """

    right: bool = False
    orders: set[tuple[int, ...]] = field(default_factory=set)
    error: str = ""


def rehearse(exchange: Exchange, length: int) -> Rehearsal:
    """Run an exchange on three virtual ranks, once per seed."""
    seen, finished = Rehearsal(), list[int]()

    def right_bits(comm: Communicator) -> bool:
        found = exchange(comm, array_of(comm.rank, length))
        finished.append(comm.rank)  # one virtual rank runs at a time
        return same_bits(found, array_of(neighbours(comm)[0], length))

    verdicts = []
    try:
        for seed in REHEARSAL_SEEDS:
            verdicts += VirtualWorld(REHEARSAL_RANKS, seed).run(right_bits)
            seen.orders.add(tuple(finished))
            finished.clear()
        seen.right = all(verdicts)
    except MessageError as error:
        seen.error = str(error)
    return seen


def letter(wait_before_change: bool) -> dict[str, Array]:
    """Rank 0 sends an array and then reuses it for something else; rank 1 looks at its buffer before and after Wait."""

    def main(comm: Communicator) -> dict[str, Array]:
        buffer = array_of(comm.rank)
        if comm.rank == 1:
            receive = comm.Irecv(buffer, 0, Tag.LETTER)
            before = buffer.copy()
            comm.Wait(receive)
            return {"before Wait": before, "after Wait": buffer}
        send = comm.Isend(buffer, 1, Tag.LETTER)
        if wait_before_change:
            comm.Wait(send)
        buffer[...] = array_of(2)
        comm.Wait(send)
        return {}

    return VirtualWorld(2).run(main)[1]


def show_ranks(lesson: Lesson) -> None:
    """Who is who, and to whom a rank may not send."""
    lesson.part("Ranks")
    lesson.say("The same program runs on every rank; only its rank number differs. All else follows from that number.")
    left, right = neighbours(lesson.comm)
    first = array_of(lesson.rank)[0]
    lesson.say_from_all(f"process {os.getpid()}, {threading.current_thread().name}; left neighbour {left}, "
                        f"right neighbour {right}; its array begins with {first:+.6f}")
    text = refused(lesson.comm, lesson.rank)
    lesson.say(f"A message to oneself is refused: {escape(text)}")
    lesson.check("a message to oneself is refused, and the error names the rank", f"to rank {lesson.rank}," in text)
    text = refused(lesson.comm, lesson.size)
    lesson.check("so is a message to a rank that does not exist", f"to rank {lesson.size}," in text)


def show_ring(lesson: Lesson) -> None:
    """Arrays once round the ring."""
    lesson.part("A ring pass")
    if lesson.size == 1:
        lesson.say("One rank has no neighbour. Run this with 2 ranks or more to see arrays go round.")
        return
    as_expected = ring_pass(lesson.comm)
    messages, sent = lesson.comm.ledger.sums("send", "RING")
    lesson.say_from_all(f"{sum(as_expected)} of {len(as_expected)} hops brought the array expected; "
                        f"sent {messages} messages, {sent:,} bytes")
    lesson.check("after each hop a rank holds, bit for bit, the array of the rank that many places to its left; "
                 "after the last, its own", all(as_expected))
    lesson.check(f"each rank sent N = {lesson.size} messages of 4 x {LENGTH} bytes",
                 (messages, sent) == (lesson.size, lesson.size * 4 * LENGTH))


def show_buffering(lesson: Lesson) -> None:
    """What the communicator at hand does, measured and not checked, since MPI promises neither."""
    lesson.part("Does a send complete that nobody receives yet?")
    if lesson.size == 1:
        lesson.say("With one rank there is nobody to send to.")
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("bytes", justify="right")
    table.add_column("complete before the receive was posted")
    for nbytes in PROBE_BYTES:
        rows = all_gather(lesson.comm, np.array([completes_alone(lesson.comm, nbytes)], dtype=np.int64))
        table.add_row(f"{nbytes:,}", f"on {sum(int(row[0]) for row in rows)} of {lesson.size} ranks")
    lesson.say(table)
    lesson.say("MPI may copy a message aside and call its send complete, or wait for the receiver, as it likes. "
               "Where a small send completes and a large one does not, a program in which everybody sends first and "
               "receives later seems to work with small messages, and hangs with large ones.")


def show_deadlock(lesson: Lesson) -> None:
    """On virtual ranks inside this rank, so that nothing really hangs."""
    lesson.part("The deadlock, and two cures")
    seen = rehearse(send_first, 16)
    lesson.say(f"Everybody sends first, then receives; {REHEARSAL_RANKS} virtual ranks, 64 bytes. Virtual ranks never "
               "copy aside, so what MPI's buffering would hide is an error at once:")
    lesson.say("  " + escape(seen.error.replace("; ", ";\n    ")))
    waiting = {(int(one), int(other)) for one, other in re.findall(r"send on rank (\d+) to rank (\d+)", seen.error)}
    ring = {(rank, (rank + 1) % REHEARSAL_RANKS) for rank in range(REHEARSAL_RANKS)}
    lesson.check("send first: no rank finishes, and the error names every rank and whom it waits for",
                 not seen.orders and seen.error.startswith("deadlock") and waiting == ring)
    cures = {"receive first, then a blocking send": receive_first, "both posted, then Waitall": both_then_wait}
    for name, exchange in cures.items():
        check_cure(lesson, name, exchange)


def check_cure(lesson: Lesson, name: str, exchange: Exchange) -> None:
    """On virtual ranks, and only when that went well on the ranks of this run, with a message too large to buffer."""
    seen = rehearse(exchange, 16)
    lesson.check(f"{name}: the left neighbour's bits arrive on virtual ranks, under each of {len(REHEARSAL_SEEDS)} "
                 "seeds", seen.right)
    if seen.error:
        lesson.say(f"  {escape(seen.error)}")
    else:
        lesson.check(f"{name}: the seeds are different runs; the ranks finished in {len(seen.orders)} orders",
                     len(seen.orders) > 1)
    if lesson.size > 1 and seen.right:
        length = max(PROBE_BYTES) // 4
        found = exchange(lesson.comm, array_of(lesson.rank, length))
        lesson.check(f"{name}: so they do on the {lesson.size} ranks of this run, {max(PROBE_BYTES):,} bytes each",
                     same_bits(found, array_of(neighbours(lesson.comm)[0], length)))


def show_buffers(lesson: Lesson) -> None:
    """Two mistakes with a buffer, seen in the numbers."""
    lesson.part("A buffer belongs to its message until Wait returns")
    lesson.say("Two virtual ranks. Rank 0 sends an array and overwrites it with another; rank 1 looks before and after "
               "its Wait. Virtual ranks copy as late as they can, so each mistake is seen in the numbers.")
    early, proper = letter(wait_before_change=False), letter(wait_before_change=True)
    for text, value in (("sent", array_of(0)), ("written over it", array_of(2)),
                        ("rank 1's buffer before Wait", proper["before Wait"]),
                        ("arrived, overwritten before Wait", early["after Wait"]),
                        ("arrived, overwritten after Wait", proper["after Wait"])):
        lesson.say(f"  {text:<34}" + " ".join(f"{number:+.6f}" for number in value[:4]) + " ...")
    lesson.check("changed before Wait: the receiver gets the later numbers, every bit of them, and no error",
                 same_bits(early["after Wait"], array_of(2)))
    lesson.check("changed after Wait: it gets what was sent", same_bits(proper["after Wait"], array_of(0)))
    lesson.check("read before Wait: the receive buffer still holds what was there before",
                 same_bits(proper["before Wait"], array_of(1)))
    lesson.say("Under MPI the same mistake may go unseen: when the bytes are copied is the library's choice.")


def main(lesson: Lesson) -> None:
    """The lesson on one rank."""
    show_ranks(lesson)
    show_ring(lesson)
    show_buffering(lesson)
    show_deadlock(lesson)
    show_buffers(lesson)


if __name__ == "__main__":
    run(__doc__, main)
