"""The two ways by which weights travel to the tokens under TSP: round a ring, or from their owner to all."""

from __future__ import annotations

from collections import deque

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.request import Request
from ..model.model import Model
from .order import broadcast_orders, owned_blocks, ring_orders
from .tags import Tag

PREFETCHED = 4
"""Blocks of a broadcast that are posted in the sub-layer before: attention's are small, and the MLP's work is long
(chosen with benchmarks/virtual_overlap.py)."""


class Ring:
    """The blocks of a tensor go round, rank r -> r+1. A rank uses its own first, then its left neighbour's, and so on,
    in rounds of one block of each owner:

        step     0       1          2          3          4
        rank 0   own     rank 3's   rank 2's   rank 1's   own second block
        rank 1   own     rank 0's   rank 3's   rank 2's   own second block

    Double buffered: while one block is used, the next is in flight from the left, and one to the right: the one in use,
    or where the right neighbour owns that, so that it has been everywhere, this rank's own of the next round. A third
    buffer is free when the block used before has been sent.
    """

    def __init__(self, comm: Communicator, model: Model, shard: Array, tag: Tag) -> None:
        self.comm, self.model, self.tag = comm, model, tag
        self.left, self.right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        self.orders = ring_orders(owned_blocks(model.grid))
        self.order = self.orders[comm.rank]  # (owner, block) of each step, as in the table
        self.to_receive = deque(block for owner, block in self.order if owner != comm.rank)  # not yet posted
        self.to_send = deque(block for owner, block in self.order if owner != self.right)  # not yet posted
        self.here = dict(zip(model.grid.blocks, shard))  # block -> its weights: this rank's own, and the one in use
        self.shape = shard.shape[1:]
        self.receive: Request | None = None
        self.send: Request | None = None

    def post(self) -> None:
        """Irecv the next block from the left; wait for the last send, and Isend the block that the right neighbour uses
        next. Nothing while the block that was posted before is still to be waited for."""
        if self.receive is not None:
            return
        if self.to_receive:
            buffer = self.model.empty("buffers", *self.shape)
            self.receive = self.comm.Irecv(buffer, self.left, self.tag, block=self.to_receive.popleft())
        if self.to_send and self.to_send[0] in self.here:
            if self.send is not None:
                self.comm.Wait(self.send)
            block = self.to_send.popleft()
            self.send = self.comm.Isend(self.here[block], self.right, self.tag, block=block)

    def wait(self, step: int) -> Array:
        """Wait until the block of this step is here, and return it. The one before it is dropped: its buffer is free
        when it has been sent."""
        owner, block = self.order[step]
        if step and self.order[step - 1][0] != self.comm.rank:
            del self.here[self.order[step - 1][1]]
        if owner != self.comm.rank:
            assert self.receive is not None, "post comes before wait"
            self.comm.Wait(self.receive)
            self.here[block], self.receive = self.receive.array, None
        return self.here[block]

    def finish(self) -> None:
        """Wait for the last send, and drop the last block."""
        if self.send is not None:
            self.comm.Wait(self.send)
            self.send = None
        self.here.clear()


class Broadcast:
    """The blocks of a tensor, each from its owner to all, in one order on every rank: the first of each owner, then the
    second of each, ..."""

    def __init__(self, comm: Communicator, model: Model, shard: Array, tag: Tag) -> None:
        self.comm, self.model, self.tag = comm, model, tag
        self.orders = broadcast_orders(owned_blocks(model.grid))
        self.order = self.orders[comm.rank]  # (owner, block) of each step, the same on every rank
        self.own = dict(zip(model.grid.blocks, shard))
        self.shape = shard.shape[1:]
        self.posted = 0
        self.receives: dict[int, Request] = {}
        self.sends: list[Request] = []

    def post(self, until: int = PREFETCHED) -> None:
        """Of the blocks before step `until`, unless they are posted: Isend this rank's own to all, Irecv every other
        from its owner."""
        for owner, block in self.order[self.posted : until]:
            if owner == self.comm.rank:
                self.sends += [self.comm.Isend(self.own[block], peer, self.tag, block=block)
                               for peer in self.comm.others]
            else:
                buffer = self.model.empty("buffers", *self.shape)
                self.receives[block] = self.comm.Irecv(buffer, owner, self.tag, block=block)
        self.posted = max(self.posted, min(until, len(self.order)))

    def wait(self, step: int) -> Array:
        """Wait until the block of this step is here, and return it; its buffer is free when the caller drops it."""
        owner, block = self.order[step]
        if owner == self.comm.rank:
            return self.own[block]
        request = self.receives.pop(block)
        self.comm.Wait(request)
        return request.array

    def finish(self) -> None:
        """Wait for the sends."""
        self.comm.Waitall(self.sends)
