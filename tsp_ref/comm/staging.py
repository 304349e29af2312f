"""How arrays travel that do not lie in the host's memory: through pinned copies, or as they lie where MPI takes them.

A kernel is launched and runs later, so an array that is posted may still have to be computed, and one that is received
into may still have to be read. So each message begins with a mark: all that was launched before its post. Nothing here
waits for it. What cannot start yet is deferred, and started when it can be, whenever any message is tested:

    send       mark -> copied to pinned memory, on a second stream that waits for the mark -> MPI -> complete
    receive    MPI, into pinned memory -> copied to the device, on that stream, after the mark -> complete
    gpu-aware  mark is done -> MPI, from or into the device's memory -> complete

A receive is complete when its copy is done, so that whatever is launched then finds it there. Messages of one peer and
tag start in the order of their posts, whatever lies where.

Pinned memory is the host's, and no array of the model's, so it is not in the account of memory (`memory.py`), which
is that of the device; what of it is in use is counted here, and `train` shows its peak.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from ..arrays import Array
from .request import Request


class Mark(Protocol):
    """A point in a device's work."""

    @property
    def done(self) -> bool:
        """Whether the device has come there."""


class Device(Protocol):
    """What is asked of a device whose arrays are to travel. No call waits for the device."""

    @property
    def kind(self) -> str:
        """Which MPI must have been built for it: "cuda" or "hip"."""

    def owns(self, array: Array) -> bool:
        """Whether the array lies in its memory."""

    def mark(self) -> Mark:
        """All that was launched to compute until now."""

    def pinned(self, size: int) -> Array:
        """Host memory for its copies, uint8 [size]."""

    def copy_out(self, array: Array, pinned: Array, after: Mark) -> Mark:
        """Copy to pinned memory once `after` is done; the mark is done when the copy is."""

    def copy_in(self, pinned: Array, array: Array, after: Mark) -> Mark:
        """Copy from pinned memory once `after` is done; the mark is done when the copy is."""


class Wire(Protocol):
    """What carries bytes: MPI."""

    def begin(self, request: Request, buffer: Array) -> Any:
        """Post the message with this buffer; its handle."""

    def over(self, request: Request, handle: Any) -> bool:
        """Whether it is over; raises if it arrived in another size."""


class Transport:
    """For arrays of the host's: MPI takes them as they lie."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.pinned_bytes = 0  # in use
        self.pinned_peak = 0

    def post(self, request: Request) -> None:
        """Start a message."""
        request.handle = self.wire.begin(request, request.array)

    def test(self, request: Request) -> bool:
        """Whether it is complete."""
        return self.wire.over(request, request.handle)


@dataclass
class Journey:
    """A message's handle here, from its post to its end.

    buffer     what MPI is handed
    ready      when MPI may be handed it; None: at once
    posted     what was launched before the post
    handle     MPI's, once it has started
    over       MPI is through with it
    copied_in  the last copy, of a staged receive
    """

    buffer: Array
    ready: Mark | None = None
    posted: Mark | None = None
    handle: Any = None
    over: bool = False
    copied_in: Mark | None = None


class DeviceTransport(Transport):
    """For arrays of a device's, and the host's beside them."""

    def __init__(self, wire: Wire, device: Device) -> None:
        super().__init__(wire)
        self.device = device
        self._deferred: dict[tuple[str, int, int], deque[Request]] = {}

    def post(self, request: Request) -> None:
        """Prepare a message, and start it if it may start and none is deferred that was posted before it."""
        request.handle = self._prepare(request) if self.device.owns(request.array) else Journey(request.array)
        self._deferred.setdefault((request.verb, request.peer, int(request.tag)), deque()).append(request)
        self._start_deferred()

    def test(self, request: Request) -> bool:
        """Whether it is complete. Starts whatever may start: others may wait for a message that nobody asks about."""
        self._start_deferred()
        journey: Journey = request.handle
        if journey.handle is None:
            return False
        if not journey.over:
            if not self.wire.over(request, journey.handle):
                return False
            journey.over = True
            self._arrive(request, journey)
        if journey.copied_in is not None and not journey.copied_in.done:
            return False
        self._release(journey)
        request.handle = None  # with its pinned memory
        return True

    def _start_deferred(self) -> None:
        for key, queue in list(self._deferred.items()):
            while queue and _done(queue[0].handle.ready):
                request = queue.popleft()
                request.handle.handle = self.wire.begin(request, request.handle.buffer)
            if not queue:
                del self._deferred[key]

    def _prepare(self, request: Request) -> Journey:
        """A journey in which MPI is handed the array itself, when what was launched before is done."""
        mark = self.device.mark()
        return Journey(request.array, ready=mark, posted=mark)

    def _arrive(self, request: Request, journey: Journey) -> None:
        """MPI is through with it: nothing more to do."""

    def _release(self, journey: Journey) -> None:
        """It is complete: nothing to give back."""


class StagedTransport(DeviceTransport):
    """Through pinned copies in the host's memory, which any MPI can send."""

    def _prepare(self, request: Request) -> Journey:
        array, posted = request.array, self.device.mark()
        pinned = self.device.pinned(array.nbytes)
        self.pinned_bytes += array.nbytes
        self.pinned_peak = max(self.pinned_peak, self.pinned_bytes)
        if request.verb == "receive":
            return Journey(pinned, posted=posted)
        return Journey(pinned, ready=self.device.copy_out(array, pinned, posted), posted=posted)

    def _arrive(self, request: Request, journey: Journey) -> None:
        if request.verb == "receive" and journey.posted is not None:
            journey.copied_in = self.device.copy_in(journey.buffer, request.array, journey.posted)

    def _release(self, journey: Journey) -> None:
        if journey.posted is not None:
            self.pinned_bytes -= journey.buffer.nbytes


def _done(mark: Mark | None) -> bool:
    return mark is None or mark.done
