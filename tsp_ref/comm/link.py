"""A link that one can slow down: shared memory is faster than any lesson needs.

It delays only when a message counts as complete; the bytes themselves have travelled. Nothing else is changed, so no
bit is, and no processor time is used. The link starts with a message when this rank notices that its bytes are there:
as on a real network, a message makes no progress while nobody sees to it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from ..errors import UserError

BYTES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
FORM = re.compile(r"(?P<number>[0-9.]+) ?(?P<scale>[kMG]?)(?P<unit>B|bit)/s(, ?(?P<delay>[0-9.]+) ?(?P<time>us|ms|s))?")


@dataclass
class Link:
    """The links between one rank and each of its peers, in each direction one.

    bandwidth  bytes a second
    latency    seconds from the end of a message's sending to its arrival
    shared     all messages of a direction share one link, as on a network card, instead of one for each peer
    """

    bandwidth: float
    latency: float = 0.0
    shared: bool = False
    _free: dict[tuple[str, int], float] = field(default_factory=dict)

    def through(self, verb: str, peer: int, size: int, now: float) -> float:
        """When a message whose bytes are there since `now` is through the link: messages go one after the other."""
        key = (verb, 0 if self.shared else peer)
        sent = max(now, self._free.get(key, 0.0)) + size / self.bandwidth
        self._free[key] = sent
        # A send is over when the last byte has left; a receive, when it has arrived.
        return sent + (self.latency if verb == "receive" else 0.0)


def parse_link(text: str, shared: bool = False) -> Link:
    """A link from its description, "200MB/s,50us": bandwidth and, if given, latency."""
    match = FORM.fullmatch(text)
    try:
        assert match is not None
        bandwidth = float(match["number"]) * BYTES[match["scale"]] / (8 if match["unit"] == "bit" else 1)
        latency = float(match["delay"]) * SECONDS[match["time"]] if match["delay"] else 0.0
        assert bandwidth > 0
    except (AssertionError, ValueError):
        raise UserError(f"--link {text} is not a link: give a bandwidth and a latency, as 200MB/s,50us or 1Gbit/s") \
            from None
    return Link(bandwidth, latency, shared)


def describe_link(bandwidth: float, latency: float) -> str:
    """The description of a link that `parse_link` reads, of two digits: "88MB/s,50us". Bytes a second, seconds."""
    bandwidth = max(1.0, float(f"{bandwidth:.2g}"))
    scale, size = next((scale, size) for scale, size in reversed(BYTES.items()) if size <= bandwidth)
    return f"{bandwidth / size:g}{scale}B/s,{1e6 * latency:g}us"


def bandwidth_for(size: float, wanted: float, tried: float = math.inf, taken: float = 0.0) -> float:
    """The bandwidth with which messages take `wanted` seconds, if with the bandwidth `tried` they took `taken`.

    The link needs size / bandwidth for them, where `size` is the bytes of its busier direction. All else that they
    took, for latency, for copies and because they wait for one another, they will take again; where that alone is about
    what is wanted, or more, no link makes them faster, and the link is given a tenth of the time.
    """
    rest = max(0.0, taken - size / tried)
    return size / max(wanted - rest, wanted / 10)
