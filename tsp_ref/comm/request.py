"""One message in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays import Array
from ..errors import MessageError


@dataclass
class Request:
    """One message in flight. It keeps its array alive and belongs to the communicator that made it."""

    verb: str  # "send" or "receive"
    array: Array
    rank: int
    peer: int
    tag: int
    handle: Any = None
    arrived: bool = False  # the bytes are here, or are sent
    ready: float = 0.0  # when an emulated link is through with it
    error: MessageError | None = None  # what a second thread met that progressed it
    noticed: bool = False  # that it is complete, for the timeline
    done: bool = False
    block: int | None = None  # that the message is about

    def __str__(self) -> str:
        direction = "to" if self.verb == "send" else "from"
        name = getattr(self.tag, "name", self.tag)
        return (f"{self.verb} on rank {self.rank} {direction} rank {self.peer}, tag {name}, "
                f"{list(self.array.shape)} {self.array.dtype}, {self.array.nbytes} bytes")
