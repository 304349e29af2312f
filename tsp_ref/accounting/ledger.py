"""What a rank sends and receives, counted message by message."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What messages are counted by. The phase is (sub-layer, direction), as its caller names it."""

    verb: str  # "send" or "receive"
    phase: tuple[str, str]
    tag: str
    peer: int


class Ledger:
    """Messages and bytes, by entry. Counted when a message is posted."""

    def __init__(self) -> None:
        self.phase = ("", "")
        self.entries: dict[Entry, tuple[int, int]] = {}

    def count(self, verb: str, phase: tuple[str, str], tag: int, peer: int, nbytes: int) -> None:
        """Add one message."""
        entry = Entry(verb, phase, str(getattr(tag, "name", tag)), peer)
        messages, size = self.entries.get(entry, (0, 0))
        self.entries[entry] = messages + 1, size + nbytes

    def sums(
        self, verb: str, tag: str | None = None, peer: int | None = None, sublayer: str | None = None,
        direction: str | None = None
    ) -> tuple[int, int]:
        """Messages and bytes of a verb; of one tag, peer, sub-layer or direction, if named."""
        chosen = [sums for entry, sums in self.entries.items()
                  if entry.verb == verb and tag in (None, entry.tag) and peer in (None, entry.peer)
                  and sublayer in (None, entry.phase[0]) and direction in (None, entry.phase[1])]
        return sum(messages for messages, _ in chosen), sum(size for _, size in chosen)
