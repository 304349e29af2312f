"""How partial sums travel: the pieces of a tree, each one message.

A rank that holds some of a tree's leaves sends the few maximal subtrees that these fill. Their receiver knows from the
leaves alone which nodes will come, and merges them in order of arrival: the tree makes that order immaterial.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..arrays import Array
from ..comm.communicator import Communicator, Request
from ..model import Model
from ..tree import Tree, add, cover
from .tags import Tag


@dataclass
class Arrival:
    """A piece on its way to this rank, and where in which tree it belongs."""

    request: Request
    tree: Tree[Array]
    node: tuple[int, int]


def merge_one(comm: Communicator, arrivals: list[Arrival]) -> None:
    """Wait for any piece, and merge it into its tree."""
    arrival = arrivals.pop(comm.Waitany([arrival.request for arrival in arrivals]))
    level, index = arrival.node
    arrival.tree.add(index, arrival.request.array, level)


class ReduceToOwner:
    """Weight-gradient partials on their way straight home, to the rank that owns their blocks.

    Call `send` for each owner's blocks in turn, then `receive` for each rank that has computed some of this rank's, and
    `finish` at the end. Two rounds may be under way at a time, so that one travels under the computation of the next
    and no rank ever holds more than two owners' partials, beside those pieces of its own blocks that wait for another.
    """

    def __init__(self, comm: Communicator, model: Model, tag: Tag) -> None:
        self.comm = comm
        self.model = model
        self.tag = tag
        self.trees: list[Tree[Array]] = []  # one for each block of this rank
        self.arrivals: list[Arrival] = []
        self.sends: list[Request] = []

    def send(self, partials: list[Tree[Array]], owner: int) -> None:
        """Isend the pieces of each of the owner's blocks, one tree over this rank's slots each."""
        if owner == self.comm.rank:
            self.trees = partials
            return
        previous = self.sends
        self.sends = [self.comm.Isend(piece, owner, self.tag) for tree in partials for _, piece in tree.pieces()]
        self.comm.Waitall(previous)

    def receive(self, peer: int) -> None:
        """Irecv the pieces of this rank's blocks that `peer` has computed; merge those of earlier rounds."""
        if peer == self.comm.rank:
            return
        grid = self.model.grid
        nodes = cover(tuple(range(grid.num_tiles)), tuple(grid.slots_of(peer)))
        shape = self.trees[0].pieces()[0][1].shape
        expected = []
        for tree in self.trees:
            for node in nodes:
                piece = self.model.empty("buffers", *shape)
                expected.append(Arrival(self.comm.Irecv(piece, peer, self.tag), tree, node))
        self.arrivals += expected
        while len(self.arrivals) > len(expected):
            merge_one(self.comm, self.arrivals)

    def finish(self) -> list[Array]:
        """The whole gradient of each block of this rank, when everything has arrived and left."""
        while self.arrivals:
            merge_one(self.comm, self.arrivals)
        self.comm.Waitall(self.sends)
        return [tree.total for tree in self.trees]


def all_reduce(
    comm: Communicator,
    owned: Callable[[int], range],
    partials: dict[int, Array],
    tag: Tag,
    merge: Callable[[Any, Any], Any] = add,
) -> Array:
    """A small sum that every rank needs (loss, gains, norm): all ranks send all ranks their pieces.

    owned     rank -> the leaves that it holds, for all ranks together 0..n-1
    partials  this rank's leaves; one shape for all
    """
    leaves = tuple(leaf for rank in range(comm.size) for leaf in owned(rank))
    tree = Tree[Array](leaves, merge)
    for leaf, partial in partials.items():
        tree.add(leaf, partial)
    mine = [piece for _, piece in tree.pieces()]
    others = [(comm.rank + step) % comm.size for step in range(1, comm.size)]
    arrivals = [
        Arrival(comm.Irecv(mine[0].copy(), peer, tag), tree, node)
        for peer in others
        for node in cover(leaves, tuple(owned(peer)))
    ]
    # Merging changes pieces in place, so they must have left before the first merge.
    comm.Waitall([comm.Isend(piece, peer, tag) for peer in others for piece in mine])
    while arrivals:
        merge_one(comm, arrivals)
    return tree.total
