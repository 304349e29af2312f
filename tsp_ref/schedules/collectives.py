"""The collectives that schedules share, each written out in messages: all-gather, reduce-scatter, reduce, all-reduce.

Each works along one axis: the ranks of the communicator that it is given, of which the grid says what they hold.

Sums travel as pieces of trees. A rank that holds some of a tree's leaves sends the few maximal subtrees that these
fill. Their receiver knows from the leaves alone which nodes will come, and merges them in order of arrival: the tree
makes that order immaterial. Where a rank's slots fill one subtree, as when N and T are powers of two, the volume is
that of a ring reduce-scatter; else a few pieces are sent where one would do (source of all: ours).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..arrays import Array, Tiles
from ..comm.communicator import Communicator, Request
from ..grid import share
from ..model import Model
from ..tree import Node, Tree, cover
from .tags import Tag


def all_gather_keys_values(comm: Communicator, model: Model, own: Array, tag: Tag) -> Array:
    """All-gather keys and values of the heads at hand over the sequence, into the order of the text.

    own [m, tiles, 2, B, K/G, s, e], of m blocks and this rank's tiles -> [m, 2, B, K/G, S, e].
    """
    config, grid = model.config, model.grid
    blocks, _, *pair, length, head_dim = own.shape
    whole = model.empty("buffers", blocks, *pair, config.seq_len, head_dim)  # [m, 2, B, K/G, S, e]
    coming = {
        peer: model.empty("buffers", blocks, len(grid.slots_of(peer)), *pair, length, head_dim) for peer in comm.others
    }
    requests = [comm.Irecv(coming[peer], peer, tag) for peer in comm.others]
    requests += [comm.Isend(own, peer, tag) for peer in comm.others]
    comm.Waitall(requests)
    for peer, tiles in ({comm.rank: own} | coming).items():
        for position, slot in enumerate(grid.slots_of(peer)):
            whole[:, :, :, :, grid.tokens(slot)] = tiles[:, position]
    return whole


def reduce_scatter_keys_values(
    comm: Communicator, model: Model, dkv: dict[tuple[int, int], Tree[Array]], tag: Tag
) -> None:
    """Reduce-scatter: the gradients of other ranks' keys and values go home, one message to each, and what the others
    computed of this rank's is merged.

    dkv: (block, slot) -> a tree over the slots that read this slot's keys, with the leaves of this rank's slots;
    leaves [2, B, K/G, s, e]. Afterwards the trees of this rank's own slots are complete. Sender and receiver both list
    the pieces in the order of `dkv`, which is the same on every rank: that is how a piece finds its tree.
    """
    config, grid = model.config, model.grid
    tile = (2, config.batch_size, config.kv_heads_per_block, config.tile_len, config.head_dim)
    receives: list[Request] = []
    places: list[list[tuple[Tree[Array], Node]]] = []
    for peer in comm.others:
        expected = [
            (tree, node)
            for (_, slot), tree in dkv.items() if slot in grid.slots
            for node in cover(tree.leaves, tuple(leaf for leaf in grid.slots_of(peer) if leaf in tree.leaves))
        ]
        if expected:
            places.append(expected)
            receives.append(comm.Irecv(model.empty("buffers", len(expected), *tile), peer, tag))
    sends = []
    for peer in comm.others:
        theirs = grid.slots_of(peer)
        pieces = [piece for (_, slot), tree in dkv.items() if slot in theirs for _, piece in tree.pieces()]
        if pieces:
            # A piece is a slice of one tile out of a longer gradient; a message must be contiguous.
            message = model.empty("buffers", len(pieces), *tile)
            for position, piece in enumerate(pieces):
                message[position] = piece
            sends.append(comm.Isend(message, peer, tag))
    while receives:
        arrived = comm.Waitany(receives)
        for (tree, (level, index)), piece in zip(places.pop(arrived), receives.pop(arrived).array):
            tree.add(index, piece, level)
    comm.Waitall(sends)


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
    """Reduce: weight-gradient partials go straight home, to the rank that owns their blocks, which sums them.

    Call `send` for each owner's blocks in turn, this rank's own among them before the first `receive`; `receive` for
    each rank that has computed some of this rank's; and `finish` at the end. Two rounds may be under way at a time, so
    that one can travel under the computation of the next, and no rank ever holds more than two owners' partials, beside
    those pieces of its own blocks that wait for another.
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
        nodes = cover(tuple(range(grid.num_tiles)), grid.slots_of(peer))
        expected = []
        for tree in self.trees:
            shape = tree.pieces()[0][1].shape
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


def all_gather_gradients(comm: Communicator, gradients: Array, totals: list[Array], tag: Tag) -> None:
    """All-gather, which makes an all-reduce of a reduce: every rank sends the gradients that it has summed to all.

    gradients [m, ...] is written: each block by its total, which for those of other ranks is received in its place.
    totals: of this rank's share of the m blocks.
    """
    count = len(gradients)
    requests = [comm.Irecv(gradients[position], peer, tag)
                for peer in comm.others for position in share(count, peer, comm.size)]
    requests += [comm.Isend(total, peer, tag) for peer in comm.others for total in totals]
    for position, total in zip(share(count, comm.rank, comm.size), totals):
        gradients[position] = total
    comm.Waitall(requests)


def all_reduce_tiles(comm: Communicator, model: Model, partials: dict[int, Tree[Array]], tag: Tag) -> Tiles:
    """All-reduce of what every rank has computed with its own blocks: an exchange to the rank that sums, and a gather.

    partials: slot -> a tree over all blocks, with the leaves of this rank's. The slots are dealt to the ranks, and each
    sums its own, one after the other: the others' pieces come to it, and the total goes to all. So no rank receives
    more than one tile at a time from another; totals are received in the place of the pieces that were sent for them.
    """
    grid = model.grid
    slots = sorted(partials)
    summed_by = [[slots[index] for index in share(len(slots), rank, comm.size)] for rank in range(comm.size)]
    output: Tiles = {}
    for turn in range(max(map(len, summed_by))):
        sums = {rank: theirs[turn] for rank, theirs in enumerate(summed_by) if turn < len(theirs)}
        mine = sums.pop(comm.rank, None)
        arrivals = [] if mine is None else [
            Arrival(comm.Irecv(model.empty("buffers", *_shape(partials[mine])), peer, tag), partials[mine], node)
            for peer in comm.others
            for node in cover(partials[mine].leaves, tuple(grid.blocks_of(peer)))
        ]
        sends = [comm.Isend(piece, rank, tag) for rank, slot in sums.items() for _, piece in partials[slot].pieces()]
        while arrivals:
            merge_one(comm, arrivals)
        comm.Waitall(sends)
        output |= {slot: partials[slot].pieces()[0][1] for slot in sums.values()}
        requests = [comm.Irecv(output[slot], rank, tag) for rank, slot in sums.items()]
        if mine is not None:
            output[mine] = partials[mine].total
            requests += [comm.Isend(output[mine], peer, tag) for peer in comm.others]
        comm.Waitall(requests)
    return {slot: output[slot] for slot in slots}


def _shape(tree: Tree[Array]) -> tuple[int, ...]:
    """The shape of what is summed."""
    return tuple(tree.pieces()[0][1].shape)


def all_reduce(
    comm: Communicator, owned: Callable[[int], Sequence[int]], partials: dict[int, Array], tag: Tag
) -> Array:
    """All-reduce of a small sum that every rank needs (loss, gains, norm): all ranks send all ranks their pieces.

    owned     rank -> the leaves that it holds, for all ranks together 0..n-1
    partials  this rank's leaves, of one shape; they are used up
    """
    leaves = tuple(sorted(leaf for rank in range(comm.size) for leaf in owned(rank)))
    tree = Tree[Array](leaves)
    for leaf, partial in partials.items():
        tree.add(leaf, partial)
    mine = [piece for _, piece in tree.pieces()]
    arrivals = [
        Arrival(comm.Irecv(mine[0].copy(), peer, tag), tree, node)
        for peer in comm.others
        for node in cover(leaves, tuple(owned(peer)))
    ]
    # Merging changes pieces in place, so they must have left before the first merge.
    comm.Waitall([comm.Isend(piece, peer, tag) for peer in comm.others for piece in mine])
    while arrivals:
        merge_one(comm, arrivals)
    return tree.total
