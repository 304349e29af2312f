"""The same code on a GPU: work that is done later, and messages that must wait for it.

Objective: after this lesson you can say what a stream and an event are, find the one place where a program that sends a
GPU's numbers must wait, and say why it waits for an event and not for the stream; and you have seen that the training
step, which does both, has the same bits on any number of ranks, on a GPU if there is one here.

    mpirun -n 4 python lessons/18_the_same_code_on_a_gpu.py
    python lessons/18_the_same_code_on_a_gpu.py --ranks 4

A call of NumPy returns when its result is there. A call of CuPy returns when the work is *queued*: the GPU takes what
is in a stream's queue one piece after the other, and the host goes on meanwhile. MPI does not know the queue: it reads
memory when it is told to send. So a message can leave with what the memory held before.

No GPU is needed to see it. A stream here is a queue in Python, and its device works at a pace that is given: as late as
it can, at once, or by chance. Only the last part needs CuPy and a GPU; where there is none it runs on NumPy, and says
so.

Look at: what the messages without a wait carry on a late device, and that the same program is right on a fast one, so
that nobody would notice; what is still queued when a message leaves; and the bytes that pass through the host, none of
which need to where MPI can read the device's memory. The wait is needed there, too.

Write it: `stage_out`, `send` and `stage_in` are yours. In a file of your own:

    mpirun -n 2 python lessons/18_the_same_code_on_a_gpu.py --answer mine.py

Try it: in `exchange`, write `pass` in place of `free.wait()`. On a late device the second message is then received into
memory from which the first has not been copied yet, and the checks on the lesson's own functions fail.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import TypeAlias

from stage import Lesson, drawn_text, run, table_with

import numpy as np
from rich.markup import escape

from tsp_ref.arrays import Array
from tsp_ref.backends.gpu import open_backend
from tsp_ref.backends.host import Backend
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import agreed, all_gather
from tsp_ref.comm.request import Request
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.errors import UserError
from tsp_ref.model.config import make_config
from tsp_ref.process.terminal import console_for
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

SEED = 2604
ROUNDS, PIECES, SIDE = 4, 3, 8  # each rank sends a matrix [PIECES, SIDE, SIDE] in each round, piece by piece
BEHIND = 2  # pieces of work in each round that no message needs
REHEARSAL_RANKS = 4
REHEARSAL_SEEDS = (None, 0, 1)  # each an order of turns and deliveries; None is the order of posting
CONFIG = make_config("tiny", num_layers=1, tiles=8, steps=3, warmup_steps=1)
TIMED_SIDE = 1024  # of the matrices whose product is timed

Work: TypeAlias = Callable[[], object]
"""A piece of work for a device."""

Pace: TypeAlias = Callable[[], int]
"""How many pieces of queued work the device does while the host queues one."""


class Tag(IntEnum):
    """What a message of this lesson is about."""

    PIECE = 1


# A tiny model of a device.


class Event:
    """A mark in a stream's queue: done when the device has come to it."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.done = stream, False

    def wait(self) -> None:
        """Hold the host until the device has come to the mark. What is queued behind it may still be to do."""
        while not self.done:
            self.stream.advance()


class Stream:
    """A queue of work, which a device does in order, later than it was queued.

    copied  bytes that were copied between the device and the host
    """

    def __init__(self, pace: Pace) -> None:
        self.pace, self.queue, self.copied = pace, deque[Work](), 0

    def launch(self, work: Work) -> None:
        """Queue work, and return: it may not even have begun."""
        self.queue.append(work)
        for _ in range(min(self.pace(), len(self.queue))):
            self.advance()

    def copy(self, source: Array, target: Array) -> None:
        """Queue a copy from the device to pinned memory, or back: memory of the host that stays in its place, so that
        the device can reach it while the host goes on."""
        self.copied += source.nbytes
        self.launch(partial(np.copyto, target, source))

    def record(self) -> Event:
        """Queue a mark."""
        event = Event(self)
        self.launch(partial(setattr, event, "done", True))
        return event

    def synchronise(self) -> None:
        """Hold the host until nothing is queued."""
        while self.queue:
            self.advance()

    def advance(self) -> None:
        """The device does one piece of work. (Time passes; a program cannot ask for it.)"""
        self.queue.popleft()()


def late() -> int:
    """The pace of a device that has done nothing before somebody waits for it."""
    return 0


def at_once() -> int:
    """The pace of a device that is always faster than the host."""
    return 1000


def by_chance(seed: int) -> Pace:
    """The pace of a device that others use, too."""
    return partial(random.Random(seed).choice, (0, 0, 1))


PACES: dict[str, Callable[[int], Pace]] = {
    "late": lambda seed: late, "at once": lambda seed: at_once, "by chance": by_chance,
}


# Yours: how a device's array travels through pinned memory.


def stage_out(stream: Stream, array: Array, pinned: Array) -> Event:
    """Have a device's array copied to pinned memory, behind the work that makes it. When the event is done, so is the
    copy. The host does not wait here."""
    stream.copy(array, pinned)
    return stream.record()


def send(comm: Communicator, staged: Event, pinned: Array, dest: int) -> Request:
    """Let the message leave when the copy is done; what else is queued need not be."""
    staged.wait()
    return comm.Isend(pinned, dest, Tag.PIECE)


def stage_in(comm: Communicator, stream: Stream, message: Request, pinned: Array, array: Array) -> Event:
    """When the message is here, have it copied to the device's array. When the event is done, the pinned memory may be
    received into again. The host does not wait for the copy."""
    comm.Wait(message)
    stream.copy(pinned, array)
    return stream.record()


# An exchange between neighbours, round after round.


@dataclass(frozen=True)
class Ways:
    """How arrays leave and come."""

    stage_out: Callable[[Stream, Array, Array], Event]
    send: Callable[[Communicator, Event, Array, int], Request]
    stage_in: Callable[[Communicator, Stream, Request, Array, Array], Event]


GIVEN = Ways(stage_out, send, stage_in)  # the lesson's own, whatever the reader has written


def send_without_wait(comm: Communicator, staged: Event, pinned: Array, dest: int) -> Request:
    """The planted fault: the copy is queued, so it looks done."""
    return comm.Isend(pinned, dest, Tag.PIECE)


@dataclass
class Notes:
    """What a rank saw.

    made      for each round, what the device made [PIECES, SIDE, SIDE]
    came      for each round, what the messages carried
    behind    for each round, how much was still queued when its first message had left
    unhurried for each message, whether its copy to the device was still queued when it had been staged in
    copied    bytes between device and host
    """

    made: list[Array] = field(default_factory=list)
    came: list[Array] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    unhurried: list[bool] = field(default_factory=list)
    copied: int = 0


def start_of(rank: int) -> Array:
    """What a rank's device holds at first, in whole numbers, so that every product is exact."""
    return np.random.default_rng([SEED, rank]).integers(-4, 5, (PIECES, SIDE, SIDE)).astype(np.float32)


def factor_of(rank: int) -> Array:
    """What a rank multiplies with."""
    return np.random.default_rng([SEED, rank, 1]).integers(-1, 2, (SIDE, SIDE)).astype(np.float32)


def exchange(comm: Communicator, stream: Stream, ways: Ways) -> Notes:
    """In each round the device multiplies what it holds; the product goes to the right, and the left's comes for it."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    notes, factor, x = Notes(), factor_of(comm.rank), start_of(comm.rank)
    y, aside = np.zeros_like(x), np.zeros_like(x)
    outgoing, incoming = np.zeros_like(x), np.zeros_like(x[0])  # pinned
    free: Event | None = None
    for _ in range(ROUNDS):
        stream.launch(partial(np.matmul, x, factor, out=y))  # [PIECES, SIDE, SIDE] @ [SIDE, SIDE]
        stream.launch(lambda: notes.made.append(y.copy()))
        staged = [ways.stage_out(stream, y[piece], outgoing[piece]) for piece in range(PIECES)]
        for _ in range(BEHIND):
            stream.launch(partial(np.add, aside, 1, out=aside))
        carried = []
        for piece in range(PIECES):
            if free is not None:
                free.wait()
            message = comm.Irecv(incoming, left, Tag.PIECE)
            sent = ways.send(comm, staged[piece], outgoing[piece], right)
            notes.behind += [len(stream.queue)] * (piece == 0)
            free = ways.stage_in(comm, stream, message, incoming, x[piece])
            notes.unhurried.append(len(stream.queue) > 1)  # more than the mark
            comm.Waitall([message, sent])
            carried.append(incoming.copy())
        notes.came.append(np.stack(carried))
    stream.synchronise()
    notes.copied = stream.copied
    return notes


def exchange_directly(comm: Communicator, stream: Stream) -> Notes:
    """The same where MPI reads and writes the device's memory (GPU-aware MPI): no copy, and the same wait."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    notes, factor, x = Notes(), factor_of(comm.rank), start_of(comm.rank)
    y, aside = np.zeros_like(x), np.zeros_like(x)
    for _ in range(ROUNDS):
        stream.launch(partial(np.matmul, x, factor, out=y))  # [PIECES, SIDE, SIDE] @ [SIDE, SIDE]
        stream.launch(lambda: notes.made.append(y.copy()))
        made = stream.record()
        for _ in range(BEHIND):
            stream.launch(partial(np.add, aside, 1, out=aside))
        made.wait()  # y is there to be sent; and x, which was read for it, is free to be received into
        comm.Waitall([comm.Irecv(x, left, Tag.PIECE), comm.Isend(y, right, Tag.PIECE)])
    stream.synchronise()
    notes.copied = stream.copied
    return notes


def truth(size: int) -> list[list[Array]]:
    """What each rank's device must make in each round, computed without a stream or a message."""
    held, made = [start_of(rank) for rank in range(size)], []
    for _ in range(ROUNDS):
        made.append([held[rank] @ factor_of(rank) for rank in range(size)])
        held = [made[-1][(rank - 1) % size] for rank in range(size)]
    return [[products[rank] for products in made] for rank in range(size)]


def same(found: list[Array], wanted: list[Array]) -> bool:
    """Whether these are the same arrays, in every bit."""
    return [array.tobytes() for array in found] == [array.tobytes() for array in wanted]


# The judge.


@dataclass
class Rehearsal:
    """What an exchange showed on a few virtual ranks, at one pace, in several orders of messages.

    right      every device made what it should, in every order
    notes      of all ranks, in the order of posting
    error      what ended it early, if anything
    """

    right: bool = False
    notes: list[Notes] = field(default_factory=list)
    error: str = ""


def rehearse(ways: Ways, pace: str) -> Rehearsal:
    """Run the exchange."""
    runs = []
    try:
        for seed in REHEARSAL_SEEDS:
            runs.append(VirtualWorld(REHEARSAL_RANKS, seed).run(
                lambda comm: exchange(comm, Stream(PACES[pace](comm.rank)), ways)))
    except Exception as error:  # whatever a reader's function may raise
        return Rehearsal(error=f"{type(error).__name__}: {error}")
    right = all(same(notes.made, wanted) for run in runs for notes, wanted in zip(run, truth(REHEARSAL_RANKS)))
    return Rehearsal(right, runs[0])


def show_race(lesson: Lesson) -> None:
    """What leaves without a wait. On rank 0 alone: the others would find the same."""
    lesson.part("A message that leaves too early")
    others = lesson.rank > 0
    racing = Ways(stage_out=GIVEN.stage_out, send=send_without_wait, stage_in=GIVEN.stage_in)
    lesson.say("The product is queued, its copy to pinned memory is queued behind it, and the message leaves at once.\n"
               f"On {REHEARSAL_RANKS} virtual ranks inside this one, {ROUNDS} rounds of {PIECES} messages. Of each "
               "round's first messages,\nhow many carry the numbers of their own round, and how many those of the one "
               "before, which the\nfirst round has not:")
    found = {pace: Rehearsal() if others else rehearse(racing, pace) for pace in PACES}
    table = table_with("device", "own round", "the round before", "all products right")
    for pace, seen in found.items():
        table.add_row(pace, carried(seen, 0), carried(seen, 1), "yes" if seen.right else "no")
    lesson.say(table)
    late_run, fast_run = found["late"], found["at once"]
    lesson.check("a late device, no wait: every first message of a round carries the numbers of the round before",
                 others or carried(late_run, 1) == f"{REHEARSAL_RANKS * (ROUNDS - 1)} of {REHEARSAL_RANKS * ROUNDS}")
    lesson.check("and no rank makes what it should", others or (not late_run.right and not late_run.error))
    lesson.check("a device that does all at once, no wait: everything is right, and nobody would know",
                 others or fast_run.right)


def carried(seen: Rehearsal, before: int) -> str:
    """How many first messages of a round carried what the left neighbour made so many rounds before, of how many."""
    count = 0
    for rank, notes in enumerate(seen.notes):
        made = seen.notes[rank - 1].made
        count += sum(notes.came[number][0].tobytes() == made[number - before][0].tobytes()
                     for number in range(before, ROUNDS))
    return f"{count} of {REHEARSAL_RANKS * ROUNDS}"


def show_cure(lesson: Lesson) -> bool:
    """The reader's functions, judged; whether they can be run on real ranks, where they might hang."""
    lesson.part("Recorded, and waited for")
    others = lesson.rank > 0
    out, back = Ways(stage_out, send, GIVEN.stage_in), Ways(GIVEN.stage_out, GIVEN.send, stage_in)
    outgoing, incoming = ({pace: Rehearsal() if others else rehearse(ways, pace) for pace in PACES}
                       for ways in (out, back))
    for text in dict.fromkeys(seen.error for seen in (*outgoing.values(), *incoming.values()) if seen.error):
        lesson.say(f"  {escape(text)}")
    lesson.say("Behind each product's copy a mark is queued: an event. The message leaves when the device has come to\n"
               f"it. The {BEHIND} pieces of work behind it, which no message needs, go on under the message. A wait "
               "for the whole\nstream would be right, too, and would leave the device without work.")
    right_out, right_back = all(s.right for s in outgoing.values()), all(s.right for s in incoming.values())
    lesson.check("stage_out, send: each product is made from the right numbers, whatever the device's pace",
                 others or right_out)
    lesson.check("send: when a message leaves, what is queued behind its copy is still queued on a late device",
                 others or (bool(outgoing["late"].notes)
                            and all(min(notes.behind) >= BEHIND for notes in outgoing["late"].notes)))
    lesson.check("stage_in: each product is made from the right numbers, whatever the device's pace",
                 others or right_back)
    lesson.check("stage_in: the copy to the device is left to the stream, not waited for",
                 others or (bool(incoming["late"].notes)
                            and all(all(notes.unhurried) for notes in incoming["late"].notes)))
    possible = np.array([right_out and right_back], dtype=np.int64)
    return bool(all_gather(lesson.comm, possible)[0][0])


def on_these_ranks(lesson: Lesson) -> None:
    """The exchange between the ranks of this run, staged and direct."""
    lesson.part("Through the host, or not")
    comm = lesson.comm
    wanted = truth(comm.size)[comm.rank]
    staged = exchange(comm, Stream(by_chance(comm.rank)), Ways(stage_out, send, stage_in))
    direct = exchange_directly(comm, Stream(by_chance(comm.rank)))
    size = ROUNDS * start_of(0).nbytes
    lesson.say(f"Each of {comm.size} ranks sent {size:,} bytes. Copied between device and host, staged: "
               f"{staged.copied:,}; where MPI reads and\nwrites the device's memory: {direct.copied:,}. An MPI that "
               "cannot may crash, and each is asked\nin another way whether it can; so `--backend cupy` stages, unless "
               "you say `--gpu-aware`.")
    lesson.check("staged: every product has the right bits, on these ranks", same(staged.made, wanted))
    lesson.check("direct: the same bits, with the same wait", same(direct.made, wanted))
    lesson.check("staged: each byte is copied once from the device and once to it; direct: none",
                 (staged.copied, direct.copied) == (2 * size, 0))


def alone(lesson: Lesson) -> None:
    """One rank has no messages, so two virtual ones take its place."""
    lesson.say("One rank has no neighbour, so this part runs on 2 virtual ranks inside this one.")

    def teach(comm: Communicator) -> list[str]:
        inner = Lesson(comm, console_for(comm.rank))
        on_these_ranks(inner)
        return inner.failures

    lesson.failures += VirtualWorld(2).run(teach)[0]


# The training step, on a GPU if there is one.


def open_here(lesson: Lesson) -> Backend:
    """CuPy's backend where every rank sees a GPU, else NumPy's; says which."""
    lesson.part("The training step")
    try:
        backend = agreed(lesson.comm, lambda: open_backend("cupy", lesson.comm))
        lesson.say(f"On a GPU: {escape(backend.describe())}")
    except UserError as error:
        backend = open_backend("numpy", lesson.comm)
        lesson.say(f"No GPU for CuPy here: {escape(str(error))}.\nWhat follows runs on NumPy, and shows nothing about "
                   "a GPU but that the code is the same.")
    return backend


def show_clock(lesson: Lesson, backend: Backend) -> None:
    """When a call returns, and when its work is done. Shown, never checked."""
    factor = backend.from_host(np.ones((TIMED_SIDE, TIMED_SIDE), dtype=np.float32))
    backend.xp.matmul(factor, factor)  # the first call also sets a library up
    backend.synchronise()
    begin = time.perf_counter()
    product = backend.xp.matmul(factor, factor)
    returned = time.perf_counter() - begin
    backend.synchronise()
    done = time.perf_counter() - begin
    lesson.say(f"A product of {TIMED_SIDE}² numbers on rank 0: the call returned after {1e3 * returned:.2f} ms, the "
               f"work was done after {1e3 * done:.2f} ms.")
    lesson.check("what comes back to the host is the product",
                 bool(np.all(backend.to_host(product) == np.float32(TIMED_SIDE))))


def trained(comm: Communicator, backend: Backend, schedule: str) -> str:
    """The digest after a few steps: all losses, gradients, weights and moments; "" but on rank 0."""
    training = Training(CONFIG, comm, Plan(schedule), drawn_text(), backend)
    for _ in range(CONFIG.steps):
        training.step()
    return digest(training)


def show_training(lesson: Lesson, backend: Backend) -> None:
    """One digest over any number of ranks."""
    mine = trained(lesson.comm, backend, "tsp")
    found = {f"this job, N = {lesson.size}": mine}
    if lesson.rank == 0:
        for size, schedule in ((1, "single"), (2, "tsp"), (4, "tsp")):
            name = "single process" if schedule == "single" else f"{size} virtual ranks"
            found[name] = VirtualWorld(size).run(
                lambda comm, schedule=schedule: trained(comm, open_backend(backend.name, comm), schedule))[0]
    table = table_with("run", "backend", "digest")
    for name, value in found.items():
        table.add_row(name, backend.name, value[:12])
    lesson.say(table)
    peak = backend.peak_bytes()
    if peak is not None:
        lesson.say(f"The device's own pool held {peak:,} bytes at most.")
    lesson.check(f"{CONFIG.steps} steps on {backend.name}: one digest on 1, 2, 4 and this job's ranks",
                 lesson.rank > 0 or len(set(found.values())) == 1)


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_comparable_bits()
    lesson.require_ranks(CONFIG.max_ranks)
    show_race(lesson)
    possible = show_cure(lesson)
    if not possible:
        lesson.say("The next part runs on the ranks of this job: when the functions are right on the virtual ones.")
    elif lesson.size == 1:
        alone(lesson)
    else:
        on_these_ranks(lesson)
    backend = open_here(lesson)
    show_clock(lesson, backend)
    show_training(lesson, backend)


if __name__ == "__main__":
    run(__doc__, main, holes=(stage_out, send, stage_in))
