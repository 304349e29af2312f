"""Sums over blocks that are on several ranks, tile by tile; and small sums that every rank needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.request import Request
from ..grid.grid import Stack
from ..grid.tree import Tree, add, cover
from ..model.model import Model
from ..model.tilewise import BlockSums
from .gradients import Arrival, merge_any
from .tags import Tag

STACKS_IN_FLIGHT = 2
"""Stacks of tiles whose sums are in flight under the work on the next."""


Exchange: TypeAlias = tuple[Stack, Array, dict[int, tuple[Tree[Array], list[Arrival]]], list[Request]]
"""Of a stack: this rank's sums of its tiles, the trees and arrivals of those that this rank sums, and what it sends."""


class AllReduceTiles(BlockSums):
    """All-reduce of what every rank computes with its own blocks, tile by tile: an exchange to the rank that sums a
    tile, and a gather of its total. The ranks take turns: of p tiles, number i is summed by rank i modulo N. A stack's
    sums are posted when all blocks of this rank are in them, and are in flight under the work on the next stacks.

    STACKS_IN_FLIGHT are in flight to the ranks that sum, and as many totals from them. A total is received in the place
    of the piece that was sent for it.
    """

    def __init__(
        self, comm: Communicator, model: Model, tag: Tag, merge: Callable[[Array, Array], Array] = add
    ) -> None:
        super().__init__(model, merge)
        self.comm, self.model, self.tag, self.merge = comm, model, tag, merge
        self.missing = [len(model.grid.blocks) for _ in model.stacks]
        self.exchanged: deque[Exchange] = deque()
        self.gathered: deque[list[Request]] = deque()
        self.outputs: list[Array] = []

    def add(self, stack: Stack, block: int, leaf: Array) -> None:
        """What a stack gives with a block of this rank's."""
        super().add(stack, block, leaf)
        self.missing[stack.number] -= 1
        if self.missing[stack.number] == 0:
            self._exchange(stack)

    def _exchange(self, stack: Stack) -> None:
        """Isend this rank's sum of each tile to the rank that sums it; Irecv the others' sums of those
        that this rank sums."""
        comm, pieces = self.comm, self.trees.pop(stack.number).pieces()
        everyone = tuple(range(self.model.config.blocks))
        summed: dict[int, tuple[Tree[Array], list[Arrival]]] = {}
        sends: list[Request] = []
        for row in range(len(stack.slots)):
            tile = slice(row, row + 1)
            owner = (stack.tiles.start + row) % comm.size
            if owner != comm.rank:
                sends += [comm.Isend(piece[tile], owner, self.tag) for _, piece in pieces]
                continue
            tree = Tree[Array](everyone, self.merge)
            arrivals = [
                Arrival(comm.Irecv(self.model.empty("buffers", *pieces[0][1][tile].shape), peer, self.tag), tree, node)
                for peer in comm.others for node in cover(everyone, tuple(self.model.grid.blocks_of(peer)))]
            for (level, index), piece in pieces:
                tree.add(index, piece[tile], level)
            summed[row] = tree, arrivals
        self.exchanged.append((stack, pieces[0][1], summed, sends))
        if len(self.exchanged) > STACKS_IN_FLIGHT:
            self._gather_oldest()

    def _gather_oldest(self) -> None:
        """Wait for the sums of a stack's tiles; Isend the totals of this rank's to all, Irecv the others'."""
        comm = self.comm
        stack, output, summed, sends = self.exchanged.popleft()
        for _, arrivals in summed.values():
            while arrivals:
                merge_any(comm, arrivals)
        comm.Waitall(sends)
        requests: list[Request] = []
        for row in range(len(output)):
            tile, owner = slice(row, row + 1), (stack.tiles.start + row) % comm.size
            if owner == comm.rank:
                output[tile] = summed[row][0].total
                requests += [comm.Isend(output[tile], peer, self.tag) for peer in comm.others]
            else:
                requests.append(comm.Irecv(output[tile], owner, self.tag))
        self.outputs.append(output)
        self.gathered.append(requests)
        if len(self.gathered) > STACKS_IN_FLIGHT:
            comm.Waitall(self.gathered.popleft())

    def totals(self) -> list[Array]:
        """Wait for all that is in flight, and return the totals, stack by stack, the same on every rank."""
        while self.exchanged:
            self._gather_oldest()
        while self.gathered:
            self.comm.Waitall(self.gathered.popleft())
        return self.outputs


def all_reduce(
    comm: Communicator, owned: Callable[[int], Sequence[int]], partials: Array, tag: Tag
) -> Array:
    """All-reduce of a small sum that every rank needs (loss, gains, norm): all ranks send all ranks their pieces.

    owned     rank -> the leaves that it holds, ascending, for all ranks together 0..n-1
    partials  this rank's leaves, a stack of them; they are used up
    """
    leaves = tuple(sorted(leaf for rank in range(comm.size) for leaf in owned(rank)))
    tree = Tree[Array](leaves)
    tree.add_stack(owned(comm.rank), partials)
    mine = [piece for _, piece in tree.pieces()]
    arrivals = [
        Arrival(comm.Irecv(mine[0].copy(), peer, tag), tree, node)  # the copy is a buffer of the same size
        for peer in comm.others
        for node in cover(leaves, tuple(owned(peer)))
    ]
    # Merging changes pieces in place, so they must have left before the first merge.
    comm.Waitall([comm.Isend(piece, peer, tag) for peer in comm.others for piece in mine])
    while arrivals:
        merge_any(comm, arrivals)
    return tree.total
