"""The two ways by which weights travel to the tokens under TSP: round a ring, or from their owner to all."""

from __future__ import annotations

from collections import deque

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.request import Request
from ..model.model import Model
from .order import backwards_from, owned_blocks, rounds
from .tags import Tag

FIRST = 4
"""Blocks of a broadcast that are posted while the sub-layer before is still at work: small ones, under a long work
(chosen by measurement in virtual time)."""


class Ring:
    """The blocks of a tensor go round, rank r -> r+1. A rank uses its own first, then its left neighbour's, and so on,
    in rounds of one block of each owner:

        step     0       1          2          3          4
        rank 0   own     rank 3's   rank 2's   rank 1's   own second block
        rank 1   own     rank 0's   rank 3's   rank 2's   own second block

    Double buffered: while one block is used, the next is in flight from the left, and the one in use to the right,
    unless the right neighbour owns it: then it has been everywhere.
    """

    def __init__(self, comm: Communicator, model: Model, shard: Array, tag: Tag) -> None:
        self.comm, self.model, self.tag = comm, model, tag
        self.left, self.right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        self.order = rounds(owned_blocks(model.grid), backwards_from(comm.rank, comm.size))
        self.to_receive = deque(block for owner, block in self.order if owner != comm.rank)
        self.to_send = deque(block for owner, block in self.order if owner != self.right)
        self.here = dict(zip(model.grid.blocks, shard))
        self.shape = shard.shape[1:]
        self.receive: Request | None = None
        self.sends: list[Request] = []
        self.ahead = 0  # receives posted, less sends posted

    def start(self) -> None:
        """Post the first exchange: Irecv the left neighbour's first block, Isend this rank's own first."""
        self.post()

    def post(self) -> None:
        """Irecv the next block from the left, if none is in flight; Isend to the right what that rank uses next, but no
        more than was asked for from the left: more would be in the way of what is needed sooner."""
        if self.receive is None and self.to_receive:
            buffer = self.model.empty("buffers", *self.shape)
            self.receive = self.comm.Irecv(buffer, self.left, self.tag, block=self.to_receive[0])
            self.ahead += 1
        while self.to_send and self.to_send[0] in self.here and (self.ahead > 0 or not self.to_receive):
            self.comm.Waitall(self.sends)  # of the block that was used before: its buffer is free from here on
            block = self.to_send.popleft()
            self.sends = [self.comm.Isend(self.here[block], self.right, self.tag, block=block)]
            self.ahead -= 1

    def wait(self, step: int) -> Array:
        """The block of this step, once it is here. The one before it is let go."""
        if step and self.order[step - 1][0] != self.comm.rank:
            del self.here[self.order[step - 1][1]]
        owner, block = self.order[step]
        if owner != self.comm.rank:
            assert self.receive is not None
            self.comm.Wait(self.receive)
            self.here[self.to_receive.popleft()] = self.receive.array
            self.receive = None
        return self.here[block]

    @property
    def all_posted(self) -> bool:
        """Whether its last messages are in flight, or over: then those of the next sub-layer may be."""
        return len(self.to_receive) <= (self.receive is not None) and not self.to_send

    def finish(self) -> None:
        """Wait for the last send, and free the last blocks."""
        self.comm.Waitall(self.sends)
        self.sends.clear()
        self.here.clear()


class Broadcast:
    """The blocks of a tensor, each from its owner to all, in one order on every rank: the first of each owner, then the
    second of each, ..."""

    def __init__(self, comm: Communicator, model: Model, shard: Array, tag: Tag) -> None:
        self.comm, self.model, self.tag = comm, model, tag
        self.order = rounds(owned_blocks(model.grid), range(comm.size))
        self.own = dict(zip(model.grid.blocks, shard))
        self.shape = shard.shape[1:]
        self.posted = 0
        self.receives: dict[int, Request] = {}
        self.sends: list[Request] = []

    def start(self) -> None:
        """Post the first blocks."""
        self.post(FIRST)

    def post(self, until: int) -> None:
        """Of the blocks before step `until`: Isend this rank's own to all, Irecv every other from its owner."""
        for owner, block in self.order[self.posted : until]:
            if owner == self.comm.rank:
                self.sends += [self.comm.Isend(self.own[block], peer, self.tag, block=block)
                               for peer in self.comm.others]
            else:
                buffer = self.model.empty("buffers", *self.shape)
                self.receives[block] = self.comm.Irecv(buffer, owner, self.tag, block=block)
        self.posted = max(self.posted, min(until, len(self.order)))

    def wait(self, step: int) -> Array:
        """The block of this step, once it is here; it is the caller's to let go."""
        owner, block = self.order[step]
        if owner == self.comm.rank:
            return self.own[block]
        request = self.receives.pop(block)
        self.comm.Wait(request)
        return request.array

    def finish(self) -> None:
        """Wait for the sends."""
        self.comm.Waitall(self.sends)
