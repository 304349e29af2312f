"""Virtual ranks: N ranks as threads of one process, over a mailbox in memory.

Only one rank runs at a time; it hands on the turn when it has to wait. So a run is repeatable: the turns and the order
in which messages are delivered follow from the seed, or are the order of posting where none is given.

Arrays of a GPU are copied there, on the stream on which all virtual ranks of a process compute. So a delivery comes, in
the GPU's order, after all kernels that were launched before it and before all that are launched after it, and needs no
event: the order in which Python runs is the order of everything.

It is stricter than MPI, on purpose. A message is copied straight from the sender's array, and late: when no rank can go
on without it, or with a seed by chance. So a send buffer that is changed too early, or a receive buffer that is read
too early, changes bits. No send completes before its receive is posted, so a program that relies on buffering stops
with the list of who waits for whom.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeVar

from ..arrays import Array
from ..errors import MessageError, UserError
from .communicator import Communicator
from .link import Link
from .request import Request

Result = TypeVar("Result")


class Cancelled(BaseException):
    """Raised in a rank that waits when another rank has failed. Not an `Exception`: nothing should catch it."""


class VirtualCommunicator(Communicator):
    """One rank of a `VirtualWorld`."""

    def __init__(self, world: VirtualWorld, rank: int) -> None:
        super().__init__(rank, world.size)
        self.world = world
        self.ranks_in_process = world.size

    def travel_by(self, progress: str, link: Link | None) -> None:
        """As for real ranks, but only one virtual rank runs at a time, so there is nothing for a second thread."""
        if progress == "thread":
            raise UserError("--progress thread is for real ranks: use mpirun, or --progress poll")
        super().travel_by(progress, link)

    def _start(self, request: Request) -> None:
        self.world.post(request)

    def _test(self, request: Request) -> bool:
        if not request.handle:
            return False
        if isinstance(request.handle, MessageError):
            raise request.handle
        return True

    def progress(self, block: int, slot: int, tiles: int = 1) -> None:
        """Let one message be delivered, if progress is asked for."""
        if self.progress_mode == "poll":
            self.world.deliver()
        super().progress(block, slot, tiles)

    def Test(self, request: Request) -> bool:
        """Whether the message is complete; before it answers, one message is delivered and others have a turn."""
        self.world.deliver()
        if self.timeline is not None:
            self.timeline.wait(time.perf_counter())
        self.world.yield_turn(self.rank, [])
        if self.timeline is not None:
            self.timeline.resume(None)
        return super().Test(request)

    def _pause(self, requests: list[Request], polls: int) -> None:
        self.world.yield_turn(self.rank, requests)

    def _check_all_received(self) -> None:
        left = [request for queue in self.world.posted.values() for request in queue
                if request.verb == "send" and request.peer == self.rank]
        if left:
            raise MessageError("never received: " + "; ".join(map(str, left)))

    def abort(self, code: int) -> None:
        """A virtual rank ends the others by raising: `VirtualWorld.run` passes it on."""
        raise SystemExit(code)


class VirtualWorld:
    """N virtual ranks.

    size  number of ranks
    seed  None: turns go round and messages are delivered in the order of posting. A number: both are drawn at random
          from it, another order for every seed, the same order again for the same seed
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        self.size = size
        self.random = None if seed is None else random.Random(seed)
        self.communicators = [VirtualCommunicator(self, rank) for rank in range(size)]
        # Unmatched messages by (source, destination, tag): a queue holds sends or receives, never both.
        self.posted: dict[tuple[int, int, int], deque[Request]] = defaultdict(deque)
        self._matched: deque[tuple[Request, Request]] = deque()
        self._turns = [threading.Lock() for _ in range(size)]  # released for a rank when it has the turn
        for turn in self._turns:
            turn.acquire()
        self._waiting: dict[int, list[Request]] = {rank: [] for rank in range(size)}
        self._failure: BaseException | None = None

    def run(self, main: Callable[[Communicator], Result]) -> list[Result]:
        """Call main(communicator) on every rank and return the results, or raise what the first failing rank raised."""
        results: dict[int, Result] = {}

        def live(rank: int) -> None:
            self._turns[rank].acquire()
            try:
                self._raise_if_cancelled()
                results[rank] = main(self.communicators[rank])
            except Cancelled:
                pass
            except BaseException as error:
                if self._failure is None:
                    error.add_note(f"on virtual rank {rank} of {self.size}")
                    self._failure = error
            del self._waiting[rank]
            self._give_turn(self._choose(rank))

        self._turns[0].release()
        if self.size == 1:
            live(0)  # here, where Ctrl-C is heard at once
        else:
            self._run_threads([threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(self.size)])
        if self._failure is not None:
            raise self._failure
        return [results[rank] for rank in range(self.size)]

    def _run_threads(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt as error:
            self._failure = error
            for thread in threads:
                thread.join(timeout=2)  # each ends at its next message; one that computes for longer is left behind

    def post(self, request: Request) -> None:
        """Match a message with the first of its kind that waits on the other side, or let it wait."""
        if request.verb == "send":
            key = (request.rank, request.peer, int(request.tag))
        else:
            key = (request.peer, request.rank, int(request.tag))
        queue = self.posted[key]
        if queue and queue[0].verb != request.verb:
            other = queue.popleft()
            self._matched.append((request, other) if request.verb == "send" else (other, request))
        else:
            queue.append(request)

    def deliver(self) -> bool:
        """Copy one matched message from its sender's array into its receiver's. False if there is none."""
        if not self._matched:
            return False
        if self.random:
            self._matched.rotate(self.random.randrange(len(self._matched)))
        send, receive = self._matched.popleft()
        error = _mismatch(send.array, receive.array)
        if error:
            receive.handle = MessageError(f"{receive}: {error}; the {send}")
        else:
            receive.array[...] = send.array
            receive.handle = True
        send.handle = True
        return True

    def yield_turn(self, rank: int, requests: list[Request]) -> None:
        """Let other ranks run; return when it is this rank's turn and, if it waits, one of its requests is complete."""
        self._waiting[rank] = requests
        following = self._choose(rank)
        if following != rank:
            self._give_turn(following)
            self._turns[rank].acquire()
        self._waiting[rank] = []
        self._raise_if_cancelled()

    def _raise_if_cancelled(self) -> None:
        if self._failure is not None:
            raise Cancelled

    def _give_turn(self, following: int | None) -> None:
        if following is not None:
            self._turns[following].release()

    def _choose(self, current: int) -> int | None:
        """The rank whose turn it is next. Messages are delivered only when nobody can run without one, or by chance."""
        while self._waiting:
            if self.random and self.random.random() < 0.5:
                self.deliver()
            able = (rank for step in range(1, self.size + 1) if self._can_run(rank := (current + step) % self.size))
            if self.random:
                choice = list(able)
                if choice:
                    return self.random.choice(choice)
            elif (following := next(able, None)) is not None:
                return following
            if not self.deliver():
                waits = "; ".join(str(request) for requests in self._waiting.values() for request in requests)
                self._failure = MessageError(f"deadlock, every rank waits: {waits}")
        return None

    def _can_run(self, rank: int) -> bool:
        requests = self._waiting.get(rank)
        if requests is None:
            return False  # it has ended
        return not requests or self._failure is not None or any(request.handle for request in requests)


def _mismatch(sent: Array, received: Any) -> str | None:
    """What is wrong with a message, if anything."""
    if sent.dtype != received.dtype:
        return f"the message has dtype {sent.dtype}"
    if sent.nbytes != received.nbytes:
        return f"the message has {sent.nbytes} bytes"
    if sent.shape != received.shape:
        return f"the message has shape {list(sent.shape)}"
    return None
