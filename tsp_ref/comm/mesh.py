"""Ranks in rows: an axis is some ranks of a communicator, and a mesh has every rank on two of them.

What is sent along an axis is sent, checked and counted by the communicator that the axis is part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arrays import Array
from ..errors import MessageError
from .communicator import Communicator
from .request import Request


class Axis(Communicator):
    """Some ranks of a communicator, numbered 0, 1, ... in the order of `members`."""

    def __init__(self, whole: Communicator, members: Sequence[int]) -> None:
        super().__init__(members.index(whole.rank), len(members))
        self.whole = whole
        self.members = members
        self.ledger = whole.ledger

    def Isend(self, array: Array, dest: int, tag: int, block: int | None = None) -> Request:
        """Start to send `array` to the rank at place `dest`."""
        return self.whole.Isend(array, self._member(dest, "send"), tag, block)

    def Irecv(self, array: Array, source: int, tag: int, block: int | None = None) -> Request:
        """Start to receive into `array` from the rank at place `source`."""
        return self.whole.Irecv(array, self._member(source, "receive"), tag, block)

    def progress(self, block: int, slot: int, tiles: int = 1) -> None:
        """Let messages in flight progress, those of other axes too."""
        self.whole.progress(block, slot, tiles)

    def Test(self, request: Request) -> bool:
        """Whether the message is complete."""
        return self.whole.Test(request)

    def Waitany(self, requests: list[Request]) -> int:
        """The index of a message that is complete, as soon as one is."""
        return self.whole.Waitany(requests)

    def finish(self) -> None:
        """Check that nothing is left, of other axes either."""
        self.whole.finish()

    def _member(self, place: int, verb: str) -> int:
        if not 0 <= place < self.size:
            raise MessageError(f"{verb} on rank {self.whole.rank}: place {place} is not on the axis of the ranks "
                               f"{', '.join(map(str, self.members))}")
        return self.members[place]

    def _start(self, request: Request) -> None:
        raise NotImplementedError("the whole communicator starts messages")

    def _test(self, request: Request) -> bool:
        raise NotImplementedError("the whole communicator tests messages")

    def _pause(self, requests: list[Request], polls: int) -> None:
        raise NotImplementedError("the whole communicator waits")

    def _check_all_received(self) -> None:
        self.whole._check_all_received()

    def abort(self, code: int) -> None:
        """End all ranks, those of other axes too."""
        self.whole.abort(code)


@dataclass
class Mesh:
    """T x Σ ranks, as one of them sees them.

    whole    all ranks
    weights  the T ranks that hold the same tokens as this one, and other weights: along it weights are dealt
    tokens   the Σ ranks that hold the same weights as this one, and other tokens: along it tokens are dealt

    Rank numbers run along the weights' axis first, so its ranks are neighbours: it carries more, and more often.
    """

    whole: Communicator
    weights: Communicator
    tokens: Communicator

    def progress(self, block: int, slot: int, tiles: int = 1) -> None:
        """Let messages in flight progress, along both axes."""
        self.whole.progress(block, slot, tiles)

    @property
    def phase(self) -> tuple[str, str]:
        """The phase that messages are counted by."""
        return self.whole.phase

    @phase.setter
    def phase(self, phase: tuple[str, str]) -> None:
        self.whole.phase = phase


def make_mesh(whole: Communicator, weight_ranks: int, token_ranks: int) -> Mesh:
    """The mesh of weight_ranks x token_ranks on all ranks of a communicator, whose number must be their product."""
    if min(weight_ranks, token_ranks) < 1 or weight_ranks * token_ranks != whole.size:
        raise ValueError(f"a mesh of {weight_ranks} x {token_ranks} is not one of {whole.size} ranks")
    column, row = divmod(whole.rank, weight_ranks)
    along_weights = [column * weight_ranks + place for place in range(weight_ranks)]
    along_tokens = [place * weight_ranks + row for place in range(token_ranks)]
    return Mesh(whole, Axis(whole, along_weights), Axis(whole, along_tokens))
