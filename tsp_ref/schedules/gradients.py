"""Gradients of weights on their way from the ranks that computed them to the owner, who sums them; and to all, where
every rank holds the weights.

Sums travel as pieces of trees. A rank that holds some of a tree's leaves sends the few maximal subtrees that these
fill. Their receiver knows from the leaves alone which nodes will come, and merges them in order of arrival: the tree
makes that order immaterial. Where a rank's slots fill one subtree, as when N and T are powers of two, the volume is
that of a ring reduce-scatter; else a few pieces are sent where one would do (source: ours).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.request import Request
from ..grid.tree import Node, Tree, cover
from ..model.model import Model
from .order import AHEAD
from .tags import Tag


@dataclass
class Arrival:
    """A piece in flight to this rank, and where in which tree it belongs."""

    request: Request
    tree: Tree[Array]
    node: Node


def merge_one(comm: Communicator, arrivals: list[Arrival]) -> None:
    """Wait for any piece, and merge it into its tree."""
    arrival = arrivals.pop(comm.Waitany([arrival.request for arrival in arrivals]))
    level, index = arrival.node
    arrival.tree.add(index, arrival.request.array, level)


When: TypeAlias = tuple[int, int]
"""(round, step of the round) at which a block is worked on."""


class ReduceToOwner:
    """Reduce: partial gradients of weights go straight to the block's owner, who sums them.

    out       [m, ...], where the totals of this rank's own blocks are written; if `tied`, added to what is there
    owned     the blocks of each rank
    together  whether all ranks work on the same block at a time, as in the order of a broadcast, or each on another's,
              as in that of a ring: it says when whose partials are to be expected

    At each step call `receive` and then `send`: in this order, because others wait until what they sent is received.
    AHEAD sends, and the receives of AHEAD ranks, may be in flight, under the computation of the next blocks; beside
    them a rank holds only those pieces of its own blocks that wait for another. The last end in `finish`, which is for
    after the next sub-layer: so they are in flight under its computation.
    """

    def __init__(
        self, comm: Communicator, model: Model, out: Array, owned: list[range], tag: Tag, together: bool = False,
        tied: bool = False
    ) -> None:
        self.comm, self.model, self.out, self.owned, self.tag, self.tied = comm, model, out, owned, tag, tied
        self.together = together
        everyone = tuple(range(model.config.tiles))
        self.trees = {block: Tree[Array](everyone) for block in owned[comm.rank]}
        self.expected = deque(
            ((number, 0 if together else step), (comm.rank + step) % comm.size, block)
            for number, block in enumerate(owned[comm.rank]) for step in range(1, comm.size))
        self.nodes_of = {peer: cover(everyone, model.grid.slots_of(peer)) for peer in comm.others}
        self.most = max(AHEAD, comm.size - 1) if together else AHEAD
        self.arriving: deque[list[Arrival]] = deque()
        self.sends: deque[list[Request]] = deque()

    def receive(self, owner: int, block: int) -> None:
        """Irecv what others have computed of this rank's blocks when this rank has computed this block of an owner's:
        after a round, or a step of it, that all go through alike."""
        number = block - self.owned[owner].start
        if self.together and owner != self.comm.rank:
            return
        self._receive_until((number, 0 if self.together else (self.comm.rank - owner) % self.comm.size))

    def receive_rest(self) -> None:
        """Irecv what is still expected: for after this rank's last step, because others may have more."""
        self._receive_until((len(self.out), 0))

    def _receive_until(self, when: When) -> None:
        while self.expected and self.expected[0][0] <= when:
            _, peer, block = self.expected.popleft()
            self.arriving.append([
                Arrival(self.comm.Irecv(self.model.empty("buffers", *self.out.shape[1:]), peer, self.tag, block=block),
                        self.trees[block], node) for node in self.nodes_of[peer]])
            if len(self.arriving) > self.most:
                self._merge_oldest()

    def send(self, owner: int, block: int, partial: Tree[Array]) -> None:
        """Isend what this rank has computed of a block to its owner: a tree over slots, with the leaves of its own."""
        if owner == self.comm.rank:
            for (level, index), piece in partial.pieces():
                self.trees[block].add(index, piece, level)
            return
        self.sends.append([self.comm.Isend(piece, owner, self.tag, block=block) for _, piece in partial.pieces()])
        if len(self.sends) > AHEAD:
            self.comm.Waitall(self.sends.popleft())

    def finish(self) -> None:
        """Wait for all that is in flight, and write the totals."""
        self.receive_rest()
        while self.arriving:
            self._merge_oldest()
        while self.sends:
            self.comm.Waitall(self.sends.popleft())
        for out, tree in zip(self.out, self.trees.values()):
            out[...] = out + tree.total if self.tied else tree.total
        self.trees.clear()

    def _merge_oldest(self) -> None:
        arrivals = self.arriving.popleft()
        while arrivals:
            merge_one(self.comm, arrivals)


class AllReduceGradients(ReduceToOwner):
    """All-reduce, where every rank holds all blocks: a reduce to the rank that sums, and an all-gather of the totals.
    Call `gather` after the next sub-layer, and `finish` after the one after that.

    whole  [m, ...] of all blocks at hand, the first of which is number `first`; the totals of this rank's are summed in
           their place, the others' are received in theirs
    """

    def __init__(
        self, comm: Communicator, model: Model, whole: Array, owned: list[range], tag: Tag, together: bool = False,
        tied: bool = False
    ) -> None:
        first = model.grid.blocks.start
        self.rows_of = [whole[part.start - first : part.stop - first] for part in owned]
        super().__init__(comm, model, self.rows_of[comm.rank], owned, tag, together, tied)
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
