"""Virtual ranks with clocks: how long a schedule would take where computation and messages cost what they are said to.

Every rank has a clock. What it computes moves the clock on, by the work that it reports; a message takes its link's
time from the moment at which both sides have posted it and the link is free, whatever the ranks do meanwhile (progress
is ideal); a wait moves the clock to the message's end. Ranks advance in the order of their clocks, so whether something
has arrived is answered as of that moment. The code that runs, and the bits that it computes, are the real ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from ..errors import MessageError
from .request import Request
from .virtual import VirtualCommunicator, VirtualWorld


class TimedCommunicator(VirtualCommunicator):
    """One rank of a `TimedWorld`. `work` says how many seconds of computation this rank has done so far."""

    def __init__(self, world: TimedWorld, rank: int) -> None:
        super().__init__(world, rank)
        self.timed = world
        self.clock = 0.0  # seconds
        self.work: Callable[[], float] = lambda: 0.0
        self._work_seen = 0.0
        self._random = random.Random(f"{world.jitter_seed} {rank}")

    def progress(self, block: int, slot: int, tiles: int = 1) -> None:
        """Nothing has to be progressed; the clock is brought up to date."""
        self.tick()

    def tick(self) -> None:
        """Move the clock on by what was computed since the last time, and let ranks that are behind catch up."""
        done = self.work()
        self.clock += (done - self._work_seen) * (1.0 + self.timed.jitter * self._random.random())
        self._work_seen = done
        self.timed.yield_turn(self.rank, [])

    def Test(self, request: Request) -> bool:
        """Whether the message is complete as of now."""
        self.tick()
        return super(VirtualCommunicator, self).Test(request)

    def Waitany(self, requests: list[Request]) -> int:
        """The message that is complete first."""
        self.tick()
        first = min(range(len(requests)), key=lambda index: _end(requests[index]))
        while not self._advance(requests[first]):
            self._pause(requests, 0)
            first = min(range(len(requests)), key=lambda index: _end(requests[index]))
        self._close(requests[first])
        return first

    def _start(self, request: Request) -> None:
        self.tick()
        request.ready = self.clock  # of the post; of the end, once it is matched
        super()._start(request)

    def _test(self, request: Request) -> bool:
        return super()._test(request) and request.ready <= self.clock

    def _pause(self, requests: list[Request], polls: int) -> None:
        self.timed.yield_turn(self.rank, requests)
        self.clock = max(self.clock, min(map(_end, requests)))


def _end(request: Request) -> float:
    """When a message is complete; infinite if its other side is not posted."""
    return request.ready if request.handle else math.inf


class TimedWorld(VirtualWorld):
    """N virtual ranks with clocks.

    bandwidth  of the link from each rank to each other, bytes a second
    latency    seconds
    jitter     each stretch of computation takes longer by a random part of itself, up to this
    """

    def __init__(
        self, size: int, bandwidth: float = math.inf, latency: float = 0.0, jitter: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(size)
        self.bandwidth, self.latency, self.jitter, self.jitter_seed = bandwidth, latency, jitter, seed
        self.timed = [TimedCommunicator(self, rank) for rank in range(size)]
        self.communicators = list(self.timed)
        self._free: dict[tuple[int, int], float] = {}

    def post(self, request: Request) -> None:
        """Match a message with its other side; matched, it takes its time on the link, and its bytes are there."""
        super().post(request)
        while self._matched:
            send, receive = self._matched[0]
            link = send.rank, send.peer
            begin = max(send.ready, receive.ready, self._free.get(link, 0.0))
            self._free[link] = begin + send.array.nbytes / self.bandwidth
            send.ready = self._free[link]
            receive.ready = send.ready + self.latency
            self.deliver()

    def _choose(self, current: int) -> int | None:
        """The rank that is behind all others; one that waits is where its first message ends."""
        moments = {rank: min(map(_end, requests)) if requests else self.timed[rank].clock
                   for rank, requests in self._waiting.items()}
        if not moments:
            return None
        if self._failure is None and min(moments.values()) == math.inf:
            waits = "; ".join(str(request) for requests in self._waiting.values() for request in requests)
            self._failure = MessageError(f"deadlock, every rank waits: {waits}")
        return min(moments, key=lambda rank: (moments[rank], rank))
