"""Gradients of weights, sent by the ranks that computed them to the owner, who sums them; and then to all, where every
rank holds the weights.

Sums travel as pieces of trees. A rank that holds some of a tree's leaves sends the few maximal subtrees that these
fill. Their receiver knows from the leaves alone which nodes will come, and merges them in whatever order: the tree
makes it immaterial. Where a rank's slots fill one subtree, as when N and T are powers of two, the volume is
that of a ring reduce-scatter; else a few pieces are sent where one would do (source: ours).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.request import Request
from ..grid.tree import Node, Tree, cover
from ..model.model import Model
from .order import Order, owned_blocks, ring_orders
from .tags import Tag

IN_FLIGHT = 2
"""Blocks whose gradients a rank is sending at a time; and ranks whose pieces it is receiving, unless more come at
once."""


@dataclass
class Arrival:
    """A piece in flight to this rank, and where in which tree it belongs."""

    request: Request
    tree: Tree[Array]
    node: Node


def merge(arrival: Arrival) -> None:
    """Merge a piece that is here into its tree."""
    level, index = arrival.node
    arrival.tree.add(index, arrival.request.array, level)


def merge_any(comm: Communicator, arrivals: list[Arrival]) -> None:
    """Wait for any piece, and merge it into its tree."""
    merge(arrivals.pop(comm.Waitany([arrival.request for arrival in arrivals])))


class ReduceToOwner:
    """Reduce: partial gradients of weights go straight to the block's owner, who sums them.

    out     [m, ...], where the totals of this rank's own blocks are written; if `tied`, added to what is there
    orders  each rank's order of the blocks: it says at which step which other ranks work on a block of this one's

    At each step of its own order a rank calls `wait`, to make room, `receive` and `send`. What others compute at a step
    is received at that step, so a wait is always for an earlier step, and no circle of them can close. IN_FLIGHT blocks
    are being sent, and the pieces of as many ranks received (of all, where all work on one block at a time), under the
    computation of the next blocks; beside them a rank holds only those pieces of its own blocks that wait for another.
    The last end in `finish`, which is for after the next sub-layer: so they are in flight under its computation.
    (`reduce_scatter` goes through all steps at once, without a `wait`: then all blocks are in flight.)
    """

    def __init__(
        self, comm: Communicator, model: Model, out: Array, orders: list[Order], tag: Tag, tied: bool = False
    ) -> None:
        self.comm, self.model, self.out, self.tag, self.tied = comm, model, out, tag, tied
        everyone = tuple(range(model.config.tiles))
        self.order = orders[comm.rank]
        self.trees = {block: Tree[Array](everyone) for owner, block in self.order if owner == comm.rank}
        self.nodes_of = {peer: cover(everyone, model.grid.slots_of(peer)) for peer in comm.others}
        self.expected = [  # step -> which other rank then computes which block of this rank's
            [(peer, orders[peer][step][1]) for peer in comm.others if orders[peer][step][0] == comm.rank]
            for step in range(len(self.order))]
        self.most = max([IN_FLIGHT, *map(len, self.expected)])
        self.arriving: deque[list[Arrival]] = deque()
        self.sends: deque[list[Request]] = deque()

    def wait(self, step: int | None = None) -> None:
        """Wait for the oldest in flight, until there is room for what this step posts; without a step, for all. What
        has arrived is merged into the trees."""
        receives, sends = (0, 0) if step is None else (
            self.most - len(self.expected[step]), IN_FLIGHT - (self.order[step][0] != self.comm.rank))
        while len(self.arriving) > receives:
            for arrival in self.arriving.popleft():
                self.comm.Wait(arrival.request)
                merge(arrival)
        while len(self.sends) > sends:
            self.comm.Waitall(self.sends.popleft())

    def receive(self, step: int) -> None:
        """Irecv what others compute at this step of this rank's blocks."""
        for peer, block in self.expected[step]:
            self.arriving.append([
                Arrival(self.comm.Irecv(self.model.empty("buffers", *self.out.shape[1:]), peer, self.tag, block=block),
                        self.trees[block], node) for node in self.nodes_of[peer]])

    def send(self, step: int, partial: Tree[Array]) -> None:
        """Isend what this rank has computed at this step to the block's owner: a tree over slots, with the leaves of
        its own."""
        owner, block = self.order[step]
        if owner == self.comm.rank:
            for (level, index), piece in partial.pieces():
                self.trees[block].add(index, piece, level)
        else:
            self.sends.append([self.comm.Isend(piece, owner, self.tag, block=block) for _, piece in partial.pieces()])

    def finish(self) -> None:
        """Wait for all that is in flight, and write the totals."""
        self.wait()
        for out, tree in zip(self.out, self.trees.values()):
            out[...] = out + tree.total if self.tied else tree.total
        self.trees.clear()


def reduce_scatter(
    comm: Communicator, model: Model, partials: list[Tree[Array]], out: Array, tag: Tag, tied: bool = False
) -> ReduceToOwner:
    """A sub-layer's gradients in flight to their owners: of every block, what others have computed of this rank's is
    received, what this rank has computed of others' is sent."""
    reduce = ReduceToOwner(comm, model, out, ring_orders(owned_blocks(model.grid)), tag, tied)
    for step, (_, block) in enumerate(reduce.order):
        reduce.receive(step)  # Irecv
        reduce.send(step, partials[block])  # Isend
    return reduce


class AllReduceGradients(ReduceToOwner):
    """All-reduce, where every rank holds all blocks: a reduce to the rank that sums, and an all-gather of the totals.
    Call `gather` after the next sub-layer, and `finish` after the one after that.

    whole   [m, ...] of all blocks at hand; the totals of those that this rank sums are formed in their place, the
            others' are received in theirs
    orders  as for `ReduceToOwner`, where a block's owner is the rank that sums it
    """

    def __init__(
        self, comm: Communicator, model: Model, whole: Array, orders: list[Order], tag: Tag, tied: bool = False
    ) -> None:
        owned = [sorted(block for owner, block in orders[0] if owner == rank) for rank in range(comm.size)]
        first = model.grid.blocks.start
        self.rows_of = [whole[blocks[0] - first : blocks[-1] + 1 - first] if blocks else whole[:0] for blocks in owned]
        super().__init__(comm, model, self.rows_of[comm.rank], orders, tag, tied)
        self.gathered: list[Request] | None = None

    def gather(self) -> None:
        """Wait for the sums of this rank's blocks; Irecv the others' totals, Isend its own to all."""
        super().finish()
        comm = self.comm
        self.gathered = [comm.Irecv(row, peer, self.tag) for peer in comm.others for row in self.rows_of[peer]]
        self.gathered += [comm.Isend(row, peer, self.tag) for peer in comm.others for row in self.out]

    def finish(self) -> None:
        """Wait for the all-gather, which `gather` has posted."""
        assert self.gathered is not None, "gather comes before finish"
        self.comm.Waitall(self.gathered)


def move_on(in_flight: list[AllReduceGradients], newest: AllReduceGradients | None = None) -> list[AllReduceGradients]:
    """What a backward does with gradients in flight after each sub-layer, given the oldest first: those whose totals
    are being gathered are finished, those that are being reduced are gathered, and the newest begin."""
    for gradients in in_flight:
        if gradients.gathered is None:
            gradients.gather()
        else:
            gradients.finish()
            in_flight = in_flight[1:]
    return [*in_flight, newest] if newest else in_flight
