"""How weights travel to the tokens under FSDP+SP: a sub-layer's blocks, all at once, from every owner to all."""

from __future__ import annotations

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.request import Request
from ..model.model import Model
from .tags import Tag


class AllGather:
    """The blocks of a tensor, each rank's sent to all others in one message: for a while every rank holds the tensor
    whole."""

    def __init__(self, comm: Communicator, model: Model, shard: Array, tag: Tag) -> None:
        self.comm, self.model, self.shard, self.tag = comm, model, shard, tag
        self.shards: dict[int, Array] = {}
        self.requests: list[Request] = []

    def post(self) -> None:
        """Irecv every other rank's blocks, Isend this rank's own to all; unless they are posted."""
        if self.shards:
            return
        comm, grid = self.comm, self.model.grid
        self.shards = {peer: self.model.empty("buffers", len(grid.blocks_of(peer)), *self.shard.shape[1:])
                       for peer in comm.others}
        self.requests = [comm.Irecv(shard, peer, self.tag) for peer, shard in self.shards.items()]
        self.requests += [comm.Isend(self.shard, peer, self.tag) for peer in comm.others]
        self.shards[comm.rank] = self.shard

    def wait(self) -> list[Array]:
        """Wait for all, and return every block, in order; the buffers are free when the caller drops them."""
        self.comm.Waitall(self.requests)
        blocks = [block for peer in range(self.comm.size) for block in self.shards[peer]]
        self.shards, self.requests = {}, []
        return blocks
