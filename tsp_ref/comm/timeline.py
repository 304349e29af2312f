"""What a rank does during a step, and when: it computes or it waits, while messages are in flight.

During the step only marks are made, a tuple each: that costs next to nothing. What lay between them is worked out
afterwards. Where nothing is recorded, a communicator's `timeline` is None.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from .request import Request

NONE = -1


class Span(NamedTuple):
    """A stretch of a rank's time. Its spans follow one another without a gap, from the begin of the step to its end."""

    begin: float  # seconds
    end: float
    what: str  # "compute" or "wait"
    sublayer: str
    direction: str
    block: int = NONE  # that a stack of tiles was computed with; NONE between stacks
    slot: int = NONE  # the first of the stack
    message: int = NONE  # what a wait ended with: its place among the rank's messages. NONE: a virtual rank's turn
    tiles: int = 1  # in the stack


class Message(NamedTuple):
    """One end of a message, from its post to the moment at which this rank noticed that it was complete."""

    begin: float  # seconds
    end: float
    verb: str  # "send" or "receive"
    peer: int
    tag: str
    size: int  # bytes
    sublayer: str
    direction: str


class Pair(NamedTuple):
    """Both ends of a message."""

    source: int
    sent: Message
    dest: int
    received: Message

    @property
    def both_posted(self) -> float:
        """Since when it can travel: its sender and its receiver have both posted it."""
        return max(self.sent.begin, self.received.begin)


@dataclass
class Lane:
    """What one rank did. clock_error: its times may be wrong by so many seconds, compared with rank 0's."""

    rank: int
    spans: list[Span]
    messages: list[Message]
    clock_error: float = 0.0

    def seconds(self, what: str) -> float:
        """How long a rank computed, or waited."""
        return sum((span.end - span.begin for span in self.spans if span.what == what), start=0.0)

    def share(self, what: str) -> float:
        """The part of its time that a rank computed, or waited."""
        return self.seconds(what) / (self.spans[-1].end - self.spans[0].begin)

    def moved(self, seconds: float) -> Lane:
        """The same, so much later."""
        spans = [span._replace(begin=span.begin + seconds, end=span.end + seconds) for span in self.spans]
        messages = [each._replace(begin=each.begin + seconds, end=each.end + seconds) for each in self.messages]
        return Lane(self.rank, spans, messages, self.clock_error)


class Timeline:
    """The marks of one rank, in the order in which they were made: what happens, when, and what is to be known of it.

    A request is named by its id, so that its array is not kept: among those in flight an id is unique.

    The times are Python's. A GPU works on after a launch: then "compute" is when work was launched, and what the GPU is
    still busy with shows as a wait, for the messages that depend on it.
    """

    def __init__(self, phase: tuple[str, str]) -> None:
        self.marks: list[tuple[Any, ...]] = []
        self.compute(phase)

    def compute(self, phase: tuple[str, str], block: int = NONE, slot: int = NONE, tiles: int = 1) -> None:
        """From here on this rank computes, with a stack of tiles or between stacks."""
        self.marks.append(("compute", time.perf_counter(), phase, block, slot, tiles))

    def post(self, request: Request, phase: tuple[str, str]) -> None:
        """A message is being posted."""
        self.marks.append(("post", time.perf_counter(), id(request), phase, request.verb, request.peer, request.tag,
                           request.array.nbytes))

    def complete(self, request: Request) -> None:
        """It is noticed that a message is complete."""
        self.marks.append(("complete", time.perf_counter(), id(request)))

    def wait(self, since: float) -> None:
        """Since then this rank waits; nothing but ends of messages has been marked meanwhile."""
        self.marks.append(("wait", since))

    def resume(self, request: Request | None) -> None:
        """The wait is over, for this message is complete."""
        self.marks.append(("resume", time.perf_counter(), id(request)))

    def end(self) -> None:
        """Nothing is recorded from here on."""
        self.marks.append(("end", time.perf_counter()))

    def lane(self, rank: int) -> Lane:
        """What the marks say, once the last is made."""
        spans: list[Span] = []
        messages: list[Message] = []
        latest: dict[int, int] = {}  # the message that a request's id last stood for
        in_flight: dict[int, int] = {}
        phase = self.marks[0][2]
        span = Span(self.marks[0][1], 0.0, "compute", *phase)
        for what, at, *more in self.marks:
            if what == "post":
                key, (sublayer, direction), verb, peer, tag, size = more
                latest[key] = in_flight[key] = len(messages)
                name = getattr(tag, "name", str(tag))
                messages.append(Message(at, self.marks[-1][1], verb, peer, name, size, sublayer, direction))
                continue
            if what == "complete":
                if more[0] in in_flight:  # noticed for the first time
                    number = in_flight.pop(more[0])
                    messages[number] = messages[number]._replace(end=at)
                continue
            if what == "resume":
                span = span._replace(message=latest.get(more[0], NONE))
            if at > span.begin:
                spans.append(span._replace(end=at))
            phase, block, slot, tiles = more if what == "compute" else (phase, NONE, NONE, 1)
            sublayer, direction = phase
            span = Span(at, at, "wait" if what == "wait" else "compute", sublayer, direction, block, slot, tiles=tiles)
        return Lane(rank, spans, messages)


def pairs(lanes: list[Lane]) -> list[Pair]:
    """All messages, both ends of each: those of one sender, receiver and tag arrive in the order of sending."""
    receives: defaultdict[tuple[int, int, str], deque[Message]] = defaultdict(deque)
    for lane in lanes:
        for message in lane.messages:
            if message.verb == "receive":
                receives[message.peer, lane.rank, message.tag].append(message)
    return [Pair(lane.rank, sent, sent.peer, receives[lane.rank, sent.peer, sent.tag].popleft())
            for lane in lanes for sent in lane.messages if sent.verb == "send"]
