"""The communicator that schedules are given: nonblocking sends and receives, each checked and counted.

Its methods have the names of MPI's, because that is what they are. A subclass says how bytes travel.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..accounting.ledger import Ledger
from ..arrays import Array
from ..errors import MessageError, UserError
from .link import Link
from .request import Request
from .staging import Device
from .timeline import Timeline

LONGEST_SLEEP = 100e-6  # seconds: other messages may arrive meanwhile
PROGRESS = ("wait", "poll", "thread")
DTYPES = tuple(map(np.dtype, ("float32", "float64", "int64", "uint8")))


@dataclass(frozen=True)
class Event:
    """One line of a rank's script: where in the step it is, what it computes, posts, and waits for until that is here.

    what   "enter": the rank is in this phase from here on; "compute": with a block and a stack of tiles; "post": a
           message, counted by this phase; "wait": its end, if the rank had to ask for it
    """

    what: str
    request: int = 0  # a number that a message's two events share, until another message is posted with it
    verb: str = ""
    peer: int = 0
    tag: int = 0
    size: int = 0  # bytes
    phase: tuple[str, str] = ("", "")
    block: int | None = None  # that is computed with, or that a message is about, where that is said
    slot: int = 0  # the first of the stack
    tiles: int = 0  # in the stack


class Communicator(ABC):
    """Rank `rank` of `size`. Errors are `MessageError`s that name rank, peer, tag and shape.

    A message is complete when `Wait` returns or `Test` says so; only then may a sent array be changed or a received one
    be read. Messages of the same sender, receiver and tag arrive in the order in which they were sent.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.ledger = Ledger()
        self.progress_mode = "wait"
        self.link: Link | None = None
        self.script: list[Event] | None = None  # a list, to have what happens written down in it
        self.timeline: Timeline | None = None  # one, to have it recorded when what happens
        self.process_on_node = (0, 1)  # this process's number on its machine, and how many of this job are there
        self.ranks_in_process = 1
        self._open: dict[int, Request] = {}
        self._lock: AbstractContextManager[Any] = nullcontext()  # a real one where a second thread progresses messages

    @property
    def phase(self) -> tuple[str, str]:
        """The phase that messages are counted by."""
        return self.ledger.phase

    @phase.setter
    def phase(self, phase: tuple[str, str]) -> None:
        self.ledger.phase = phase
        if self.script is not None:
            self.script.append(Event("enter", phase=phase))
        if self.timeline is not None:
            self.timeline.compute(phase)

    @property
    def others(self) -> list[int]:
        """All other ranks, the next one first, so that not everyone speaks to rank 0 at once."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def Isend(self, array: Array, dest: int, tag: int, block: int | None = None) -> Request:
        """Start to send `array`. It is neither copied nor to be changed before the request is complete. `block`: the
        one that the message is about, which the score of messages shows."""
        return self._post(Request("send", array, self.rank, dest, tag, block=block))

    def Irecv(self, array: Array, source: int, tag: int, block: int | None = None) -> Request:
        """Start to receive into `array`, whose size must be the message's."""
        return self._post(Request("receive", array, self.rank, source, tag, block=block))

    def phase_of(self, tag: int) -> tuple[str, str]:
        """The phase that a message is counted by: that of the sub-layer that its tag names, if it names one, wherever
        it is posted."""
        sublayer, direction = self.phase
        return getattr(tag, "sublayer", sublayer), direction

    def travel_by(self, progress: str, link: Link | None) -> None:
        """How messages are to travel from now on: who progresses them (one of PROGRESS), and over which link."""
        if progress not in PROGRESS:
            raise UserError(f"--progress {progress} is unknown: use one of {', '.join(PROGRESS)}")
        self.progress_mode, self.link = progress, link

    def carry(self, device: Device, gpu_aware: bool) -> None:
        """From now on carry a device's arrays too: by copies in the host's memory, or if `gpu_aware` as they lie. Here
        for communicators that copy from array to array, on whatever device both are."""
        if gpu_aware:
            raise UserError("--gpu-aware is for real ranks, whose messages MPI carries: use mpirun, or leave it out")

    @property
    def pinned_peak(self) -> int:
        """The most bytes of pinned memory that messages were staged in at a time."""
        return 0

    def progress(self, block: int, slot: int, tiles: int = 1) -> None:
        """Let messages in flight progress, if that is asked for (`--progress poll`): the work on a stack of tiles
        begins, whose first slot is `slot`.

        MPI moves a large message only inside its own calls: one that was posted and then left alone for a computation
        will travel inside the `Wait` after it.
        """
        if self.script is not None:
            self.script.append(Event("compute", phase=self.phase, block=block, slot=slot, tiles=tiles))
        if self.timeline is not None:
            self.timeline.compute(self.phase, block, slot, tiles)
        if self.progress_mode == "poll":
            for request in list(self._open.values()):
                if self._advance(request):
                    self._close(request)

    def Test(self, request: Request) -> bool:
        """Whether the message is complete; gives it a chance to progress."""
        if not request.done and self._advance(request):
            self._close(request)
        return request.done

    def Wait(self, request: Request) -> None:
        """Return when the message is complete."""
        self.Waitany([request])

    def Waitall(self, requests: list[Request]) -> None:
        """Return when all messages are complete."""
        for request in requests:
            self.Wait(request)

    def Waitany(self, requests: list[Request]) -> int:
        """The index of a message that is complete, as soon as one is."""
        if not requests:
            raise ValueError("Waitany needs at least one request: nothing else would ever end it")
        polls = 0
        # Before the first look: a second thread may notice the end of a message between that look and the wait's mark.
        began = time.perf_counter() if self.timeline is not None else 0.0
        while True:
            for index, request in enumerate(requests):
                if request.done or self._advance(request):
                    self._close(request)
                    if self.script is not None:
                        self.script.append(Event("wait", id(request)))
                    if self.timeline is not None and polls:
                        self.timeline.resume(request)
                    return index
            if self.timeline is not None and not polls:
                self.timeline.wait(began)
            if self.link is not None:
                # A wait progresses every message, not only those waited for: so does one inside MPI.
                for request in list(self._open.values()):
                    self._advance(request)
            on_the_link = [request.ready for request in requests if request.arrived]
            if on_the_link:
                # As a wait for a network: without using the processor, and not past the next message's arrival.
                time.sleep(max(0.0, min(min(on_the_link) - time.perf_counter(), LONGEST_SLEEP)))
            else:
                self._pause(requests, polls)
            polls += 1

    def finish(self) -> None:
        """Check that nothing is left: no message open here, and none sent to this rank that it never received."""
        if self._open:
            left = [str(request) for request in self._open.values()]
            more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
            raise MessageError("never completed: " + "; ".join(left[:3]) + more)
        self._check_all_received()

    def _post(self, request: Request) -> Request:
        array, peer = request.array, request.peer
        if not 0 <= peer < self.size or peer == self.rank:
            raise MessageError(f"{request}: the peer must be another rank of 0 to {self.size - 1}")
        if array.dtype not in DTYPES:
            raise MessageError(f"{request}: the dtype must be one of {', '.join(map(str, DTYPES))}")
        # An array that lies in memory in another order would arrive in that order, silently.
        if not array.flags.c_contiguous:
            raise MessageError(f"{request}: the array must be C-contiguous; send a copy, or lay it out so")
        if request.verb == "receive" and not getattr(array.flags, "writeable", True):
            raise MessageError(f"{request}: the array must be writeable")
        phase = self.phase_of(request.tag)
        self.ledger.count(request.verb, phase, request.tag, request.peer, request.array.nbytes)
        if self.timeline is not None:
            self.timeline.post(request, phase)
        with self._lock:
            self._open[id(request)] = request
            self._start(request)
        if self.script is not None:
            self.script.append(Event("post", id(request), request.verb, request.peer, request.tag, array.nbytes,
                                     phase, request.block))
        return request

    def _advance(self, request: Request) -> bool:
        """Whether the message is complete: arrived, and through the link if there is one."""
        with self._lock:
            if request.error is not None:
                raise request.error
            if not request.arrived and self._test(request):
                request.arrived = True
                if self.link is not None:
                    now = time.perf_counter()
                    request.ready = self.link.through(request.verb, request.peer, request.array.nbytes, now)
            complete = request.arrived and (self.link is None or time.perf_counter() >= request.ready)
            if self.timeline is not None and complete and not request.noticed:
                request.noticed = True
                self.timeline.complete(request)
        return complete

    def _close(self, request: Request) -> None:
        request.done = True
        with self._lock:
            self._open.pop(id(request), None)

    @abstractmethod
    def _start(self, request: Request) -> None:
        """Post the message."""

    @abstractmethod
    def _test(self, request: Request) -> bool:
        """Whether it is complete; raises if it arrived in another size or dtype."""

    @abstractmethod
    def _pause(self, requests: list[Request], polls: int) -> None:
        """Let others work: none of the requests was complete, now for the time number `polls`."""

    @abstractmethod
    def _check_all_received(self) -> None:
        """Raise a `MessageError` if a message to this rank was never received."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """End all ranks at once."""
