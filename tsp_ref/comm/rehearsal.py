"""A step taken apart, to time its halves: messages without the computation, computation without the messages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

from ..arrays import Array, Namespace
from .communicator import Communicator, Event
from .request import Request


def replay(comm: Communicator, script: list[Event], xp: Namespace = np) -> None:
    """Post and wait for the same messages in the same order, from memory of the same kind, with nothing computed in
    between."""
    idle: defaultdict[tuple[str, int], list[Array]] = defaultdict(list)  # buffers by verb and size, used again
    in_flight: dict[int, Request] = {}
    for event in script:
        if event.what == "post":
            spare = idle[event.verb, event.size]
            buffer = spare.pop() if spare else xp.zeros(event.size, dtype=np.uint8)
            start = comm.Isend if event.verb == "send" else comm.Irecv
            in_flight[event.request] = start(buffer, event.peer, event.tag)
        elif event.what == "wait" and event.request in in_flight:
            request = in_flight.pop(event.request)
            comm.Wait(request)
            idle[request.verb, request.array.nbytes].append(request.array)


def busiest(script: list[Event], shared: bool = False) -> int:
    """The bytes that a rank's busiest link carries, in its busier direction: its links are one for each peer, or one
    for all if `shared`."""
    sizes: Counter[tuple[str, int]] = Counter()
    for event in script:
        if event.what == "post":
            sizes[event.verb, 0 if shared else event.peer] += event.size
    return max(sizes.values(), default=0)


class LocalCopies(Communicator):
    """A communicator without messages: what is received is copied from the rank's own memory, at once."""

    def __init__(self, rank: int, size: int, from_host: Callable[[Array], Array] = lambda array: array) -> None:
        """from_host: what makes a host's array one of those that are received into."""
        super().__init__(rank, size)
        self._from_host = from_host
        self._sources: dict[tuple[tuple[int, ...], str], Array] = {}

    def _start(self, request: Request) -> None:
        if request.verb == "receive":
            array = request.array
            key = array.shape, str(array.dtype)
            if key not in self._sources:
                # Numbers as weights and activations have them: no operation is slower or faster for them.
                drawn = 0.02 * np.random.default_rng(0).standard_normal(array.shape)
                self._sources[key] = self._from_host(drawn.astype(array.dtype))
            array[...] = self._sources[key]

    def _test(self, request: Request) -> bool:
        return True

    def _pause(self, requests: list[Request], polls: int) -> None:
        """Nothing is ever waited for."""

    def _check_all_received(self) -> None:
        """Nothing was sent."""

    def abort(self, code: int) -> None:
        """There is no other rank."""
        raise SystemExit(code)
