"""Keys and values, and their gradients, between the ranks of the axis of tokens: an all-gather and a reduce-scatter."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.request import Request
from ..grid.tree import Node, Tree, cover
from ..model.model import Model
from ..model.tilewise import in_order_of_text
from .tags import Tag

AHEAD = 2
"""How many steps a block's keys and values, or their gradients, may travel before they are waited for: so many blocks
are worked on meanwhile (chosen with benchmarks/virtual_overlap.py: two hide more than one where links are slow)."""


class GatherKeysValues:
    """All-gather of keys and values over the sequence, block after block.

    kept   block -> those of this rank's tiles [p, 2, B, K/G, s, e]; they are sent as they lie, so they must stay
    order  the blocks, in the order in which they are posted and waited for, the same on every rank
    ahead  of how many blocks they are posted at first
    """

    def __init__(
        self, comm: Communicator, model: Model, kept: dict[int, Array], order: list[int], ahead: int = AHEAD
    ) -> None:
        self.comm, self.model, self.kept, self.order, self.ahead = comm, model, kept, order, ahead
        self.posted = 0
        self.in_flight: deque[tuple[dict[int, Array], list[Request]]] = deque()

    def post(self, until: int | None = None) -> None:
        """Of the blocks before number `until`, unless they are posted: Irecv those of every other rank's tiles, Isend
        this rank's own to all."""
        comm, grid = self.comm, self.model.grid
        until = self.ahead if until is None else until
        for block in self.order[self.posted : until]:
            own = self.kept[block]
            tiles_of = {peer: self.model.empty("buffers", len(grid.slots_of(peer)), *own.shape[1:])
                        for peer in comm.others}
            receives = [comm.Irecv(tiles, peer, Tag.KEYS_VALUES, block=block) for peer, tiles in tiles_of.items()]
            sends = [comm.Isend(own, peer, Tag.KEYS_VALUES, block=block) for peer in comm.others]
            self.in_flight.append(({**tiles_of, comm.rank: own}, receives + sends))
        self.posted = max(self.posted, min(until, len(self.order)))
        if self.posted == len(self.order):
            self.kept = {}  # the requests hold what is still being sent

    def wait(self) -> Array:
        """Wait for the next block's messages, and return the keys and values of all tiles in the order of the text
        [2, B, K/G, S, e]."""
        tiles_of, requests = self.in_flight.popleft()
        self.comm.Waitall(requests)
        return in_order_of_text(self.model, tiles_of)


@dataclass
class InFlight:
    """The gradients of one block's keys and values, in flight between all ranks."""

    own: dict[int, list[tuple[Node, Array]]]  # slot -> the pieces that this rank has of it
    expected: list[list[tuple[int, Node]]]  # of each message that is received, the slot and node of each of its pieces
    receives: list[Request]
    sends: list[Request]


class ScatterKeysValues:
    """Reduce-scatter of the gradients of keys and values, block after block: what this rank's queries give to the keys
    of others' tiles is sent to those ranks, one message to each, and what theirs give to its own is merged."""

    def __init__(self, comm: Communicator, model: Model) -> None:
        self.comm, self.model = comm, model
        self.in_flight: deque[InFlight] = deque()

    def post(self, block: int, partials: Tree[Array]) -> None:
        """Irecv what others' queries give to a block's keys and values of this rank's tiles; Isend to each rank what
        this rank's queries give to those of its tiles.

        partials  the sum over tiles of queries, with the leaves of this rank's: each of its pieces holds the gradients
                  of the first n keys of the sequence [2, B, K/G, n, e]. Of each key tile the pieces that reach it are
                  sent, in the order of the tree's nodes, in which the receiver, who knows this rank's slots, expects
                  them
        """
        comm, model, config, grid = self.comm, self.model, self.model.config, self.model.grid
        pieces = partials.pieces()
        tile_shape = 2, config.batch_size, config.kv_heads_per_block, config.tile_len, config.head_dim
        # Copies, so that the gradients of all other ranks' keys are not kept alive by them.
        own = {slot: [(node, piece.copy()) for node, piece in of_tile(model, pieces, slot)] for slot in grid.slots}
        exchange = InFlight(own, [], [], [])
        for peer in comm.others:
            expected = [(slot, node) for slot in grid.slots for node in reaching(model, grid.slots_of(peer), slot)]
            if expected:
                buffer = model.empty("buffers", len(expected), *tile_shape)
                exchange.expected.append(expected)
                exchange.receives.append(comm.Irecv(buffer, peer, Tag.KEYS_VALUES_GRADIENTS, block=block))
        for peer in comm.others:
            found = [piece for slot in grid.slots_of(peer) for _, piece in of_tile(model, pieces, slot)]
            if found:
                # A piece is a slice of one tile out of a longer gradient; a message must be contiguous.
                message = model.empty("buffers", len(found), *tile_shape)
                for position, piece in enumerate(found):
                    message[position] = piece
                exchange.sends.append(comm.Isend(message, peer, Tag.KEYS_VALUES_GRADIENTS, block=block))
        self.in_flight.append(exchange)

    def wait(self) -> Array:
        """Wait for the oldest block's, and return the gradients of this rank's own keys and values
        [p, 2, B, K/G, s, e]: its own pieces, and the others' in the order of arrival, merged."""
        grid, exchange = self.model.grid, self.in_flight.popleft()
        trees = {slot: Tree[Array](grid.readers(slot), of=grid.num_tiles) for slot in grid.slots}
        for slot, tree in trees.items():
            for (level, index), piece in exchange.own[slot]:
                tree.add(index, piece, level)
        while exchange.receives:
            arrived = self.comm.Waitany(exchange.receives)
            pieces = exchange.receives.pop(arrived).array
            for (slot, (level, index)), piece in zip(exchange.expected.pop(arrived), pieces):
                trees[slot].add(index, piece, level)
        self.comm.Waitall(exchange.sends)
        return self.model.xp.stack([tree.total for tree in trees.values()])  # [p, 2, B, K/G, s, e]


def of_tile(model: Model, pieces: list[tuple[Node, Array]], slot: int) -> list[tuple[Node, Array]]:
    """The pieces [2, B, K/G, n, e] that reach a slot's keys, each cut to them [2, B, K/G, s, e]."""
    keys = model.grid.tokens(slot)
    return [(node, piece[:, :, :, keys]) for node, piece in pieces if piece.shape[3] >= keys.stop]


def reaching(model: Model, slots: tuple[int, ...], slot: int) -> list[Node]:
    """The nodes of the tree over all slots at which the sums of some `slots` wait, if any of their queries see the keys
    of `slot`: what their rank sends for it, in order."""
    nodes = cover(tuple(range(model.config.tiles)), slots)
    seers = set(model.grid.readers(slot))
    return [(level, index) for level, index in nodes
            if seers.intersection(range(index << level, (index + 1) << level))]
