"""The communicator that schedules are given: nonblocking sends and receives, each checked and counted.

Its methods have the names of MPI's, because that is what they are. A subclass says how bytes travel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ..arrays import Array
from ..errors import MessageError

DTYPES = ("float32", "float64", "int64", "uint8")


@dataclass
class Request:
    """One message under way. It keeps its array alive and belongs to the communicator that made it."""

    verb: str  # "send" or "receive"
    array: Array
    rank: int
    peer: int
    tag: int
    handle: Any = None
    done: bool = False

    def __str__(self) -> str:
        direction = "to" if self.verb == "send" else "from"
        name = getattr(self.tag, "name", self.tag)
        return (f"{self.verb} on rank {self.rank} {direction} rank {self.peer}, tag {name}, "
                f"{list(self.array.shape)} {self.array.dtype}, {self.array.nbytes} bytes")


@dataclass(frozen=True)
class Entry:
    """What messages are counted by. The phase is (part of the model, direction), as its caller names it."""

    verb: str  # "send" or "receive"
    phase: tuple[str, str]
    tag: str
    peer: int


class Ledger:
    """Messages and bytes, by entry. Counted when a message is posted."""

    def __init__(self) -> None:
        self.phase = ("", "")
        self.entries: dict[Entry, tuple[int, int]] = {}

    def count(self, request: Request) -> None:
        """Add one message."""
        entry = Entry(request.verb, self.phase, str(getattr(request.tag, "name", request.tag)), request.peer)
        messages, size = self.entries.get(entry, (0, 0))
        self.entries[entry] = messages + 1, size + request.array.nbytes

    def sums(
        self, verb: str, tag: str | None = None, peer: int | None = None, part: str | None = None,
        direction: str | None = None
    ) -> tuple[int, int]:
        """Messages and bytes of a verb; of one tag, peer, part of the model or direction, if named."""
        chosen = [sums for entry, sums in self.entries.items()
                  if entry.verb == verb and tag in (None, entry.tag) and peer in (None, entry.peer)
                  and part in (None, entry.phase[0]) and direction in (None, entry.phase[1])]
        return sum(messages for messages, _ in chosen), sum(size for _, size in chosen)


class Communicator(ABC):
    """Rank `rank` of `size`. Errors are `MessageError`s that name rank, peer, tag and shape.

    A message is complete when `Wait` returns or `Test` says so; only then may a sent array be changed or a received one
    be read. Messages of the same sender, receiver and tag arrive in the order in which they were sent.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.ledger = Ledger()
        self._open: dict[int, Request] = {}

    @property
    def phase(self) -> tuple[str, str]:
        """The phase that messages are counted by."""
        return self.ledger.phase

    @phase.setter
    def phase(self, phase: tuple[str, str]) -> None:
        self.ledger.phase = phase

    @property
    def others(self) -> list[int]:
        """All other ranks, the next one first, so that not everyone speaks to rank 0 at once."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def Isend(self, array: Array, dest: int, tag: int) -> Request:
        """Start to send `array`. It is neither copied nor to be changed before the request is complete."""
        return self._post(Request("send", array, self.rank, dest, tag))

    def Irecv(self, array: Array, source: int, tag: int) -> Request:
        """Start to receive into `array`, whose size must be the message's."""
        return self._post(Request("receive", array, self.rank, source, tag))

    def Test(self, request: Request) -> bool:
        """Whether the message is complete; gives it a chance to progress."""
        if not request.done and self._test(request):
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
        while True:
            for index, request in enumerate(requests):
                if request.done or self._test(request):
                    self._close(request)
                    return index
            self._pause(requests, polls)
            polls += 1

    def finish(self) -> None:
        """Check that nothing is left: no message open here, and none sent to this rank that it never received."""
        if self._open:
            raise MessageError("never completed: " + "; ".join(str(request) for request in self._open.values()))
        self._check_all_received()

    def _post(self, request: Request) -> Request:
        array, peer = request.array, request.peer
        if not 0 <= peer < self.size or peer == self.rank:
            raise MessageError(f"{request}: the peer must be another rank of 0 to {self.size - 1}")
        if str(array.dtype) not in DTYPES:
            raise MessageError(f"{request}: the dtype must be one of {', '.join(DTYPES)}")
        # An array that lies in memory in another order would arrive in that order, silently.
        if not array.flags.c_contiguous:
            raise MessageError(f"{request}: the array must be C-contiguous; send a copy, or lay it out so")
        if request.verb == "receive" and not getattr(array.flags, "writeable", True):
            raise MessageError(f"{request}: the array must be writeable")
        self.ledger.count(request)
        self._open[id(request)] = request
        self._start(request)
        return request

    def _close(self, request: Request) -> None:
        request.done = True
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
