"""The collectives that schedules share, each written out in messages: all-gather, reduce-scatter, reduce, all-reduce.

Each works along one axis: the ranks of the communicator that it is given, of which the grid says what they hold.

Sums travel as pieces of trees. A rank that holds some of a tree's leaves sends the few maximal subtrees that these
fill. Their receiver knows from the leaves alone which nodes will come, and merges them in order of arrival: the tree
makes that order immaterial. Where a rank's slots fill one subtree, as when N and T are powers of two, the volume is
that of a ring reduce-scatter; else a few pieces are sent where one would do (source of all: ours).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from ..arrays import Array, Tiles
from ..comm.communicator import Communicator
from ..comm.request import Request
from ..grid.grid import share
from ..grid.tree import Node, Tree, add, cover
from ..model.model import Model
from .tags import Tag

Item = TypeVar("Item")

AHEAD = 2
"""How many blocks may be under way to or from a rank while it works on another."""


def leave(comm: Communicator, model: Model, sends: list[Request]) -> None:
    """Let sends leave while other work goes on; what they send must stay as it is. The keys and values of AHEAD blocks,
    and as many gradients of such, may be under way: then the first have to have left."""
    model.leaving.append(sends)
    if len(model.leaving) > 2 * AHEAD:
        comm.Waitall(model.leaving.popleft())


def put_off(model: Model, rest: Callable[[], Any]) -> None:
    """The rest of a part's backward, waiting for gradients, is done after the part that comes next, under which they
    travel. What a rest returns, if anything, is put off by another part."""
    later = [more for earlier in model.put_off if (more := earlier())]
    model.put_off = [*later, rest]


def finish_all(comm: Communicator, model: Model) -> None:
    """Do all that was put off, and see everything leave."""
    while model.put_off:
        model.put_off = [more for earlier in model.put_off if (more := earlier())]
    while model.leaving:
        comm.Waitall(model.leaving.popleft())


class GatherKeysValues:
    """All-gather of the keys and values of one block of heads over the sequence. Made, it is under way; finish it when
    they are needed.

    own [tiles, 2, B, K/G, s, e], of this rank's tiles; it is being sent, so it must stay as it is.
    """

    def __init__(self, comm: Communicator, model: Model, own: Array, tag: Tag) -> None:
        self.comm = comm
        self.model = model
        self.parts = {
            peer: model.empty("buffers", len(model.grid.slots_of(peer)), *own.shape[1:]) for peer in comm.others}
        self.receives = [comm.Irecv(part, peer, tag) for peer, part in self.parts.items()]
        leave(comm, model, [comm.Isend(own, peer, tag) for peer in comm.others])
        self.parts[comm.rank] = own

    def finish(self) -> Array:
        """All keys and values in the order of the text [2, B, K/G, S, e]."""
        grid = self.model.grid
        _, *pair, _, head_dim = self.parts[self.comm.rank].shape
        self.comm.Waitall(self.receives)
        whole = self.model.empty("buffers", *pair, self.model.config.seq_len, head_dim)  # [2, B, K/G, S, e]
        for peer, part in self.parts.items():
            for position, slot in enumerate(grid.slots_of(peer)):
                whole[:, :, :, grid.tokens(slot)] = part[position]
        self.parts.clear()
        return whole


class ScatterKeysValues:
    """Reduce-scatter of the gradients of one block's keys and values: what this rank has computed of others' goes home,
    one message to each, and what they have computed of its own is merged. Made, it is under way; finish it when the
    gradients are needed.

    dkv: slot -> a tree over the slots that read this slot's keys, with the leaves of this rank's slots; leaves
    [2, B, K/G, s, e]. Once finished, the trees of this rank's own slots are complete. Sender and receiver both list the
    pieces in the order of `dkv`, which is the same on every rank: that is how a piece finds its tree.
    """

    def __init__(self, comm: Communicator, model: Model, dkv: dict[int, Tree[Array]], tag: Tag) -> None:
        self.comm = comm
        self.receives: list[Request] = []
        self.places: list[list[tuple[Tree[Array], Node]]] = []
        config, grid = model.config, model.grid
        tile = (2, config.batch_size, config.kv_heads_per_block, config.tile_len, config.head_dim)
        for peer in comm.others:
            expected = [
                (tree, node)
                for slot, tree in dkv.items() if slot in grid.slots
                for node in cover(tree.leaves, tuple(leaf for leaf in grid.slots_of(peer) if leaf in tree.leaves))
            ]
            if expected:
                self.places.append(expected)
                self.receives.append(comm.Irecv(model.empty("buffers", len(expected), *tile), peer, tag))
        sends: list[Request] = []
        for peer in comm.others:
            pieces = [piece for slot in grid.slots_of(peer) for _, piece in dkv[slot].pieces()]
            if pieces:
                # A piece is a slice of one tile out of a longer gradient; a message must be contiguous.
                message = model.empty("buffers", len(pieces), *tile)
                for position, piece in enumerate(pieces):
                    message[position] = piece
                sends.append(comm.Isend(message, peer, tag))
        leave(comm, model, sends)

    def finish(self) -> None:
        """Merge what arrives, in the order in which it does."""
        while self.receives:
            arrived = self.comm.Waitany(self.receives)
            for (tree, (level, index)), piece in zip(self.places.pop(arrived), self.receives.pop(arrived).array):
                tree.add(index, piece, level)


def in_turn(owned: list[range], rank: int, steps: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(owner, index) for all that the ranks own, in rounds of one of each owner's: `steps` says how many ranks back the
    owners of a round are, one after the other."""
    steps = list(steps)
    for position in range(max(map(len, owned))):
        for step in steps:
            owner = (rank - step) % len(owned)
            if position < len(owned[owner]):
                yield owner, owned[owner][position]


def own_last(size: int) -> list[int]:
    """The steps of a backward's rounds: others' blocks, whose gradients have a way to go, before this rank's own."""
    return [*range(1, size), 0]


Turn: TypeAlias = tuple[int, int]
"""(round, step): when a block is worked on. A rank's own come last in a round, so that their step is N."""


def turn(owned: list[range], rank: int, owner: int, block: int) -> Turn:
    """When a rank works on an owner's block, its own last in each round."""
    return block - owned[owner].start, (rank - owner) % len(owned) or len(owned)


def when_own_is_last(owned: list[range], rank: int) -> list[tuple[Turn, int, int]]:
    """(turn, rank, block): when which others work on this rank's blocks, if each takes its own last."""
    size = len(owned)
    return [((position, step), (rank + step) % size, block)
            for position, block in enumerate(owned[rank]) for step in range(1, size)]


class Ahead(Iterator[Item]):
    """Each item only when `count` more have been started: so its messages travel under the work on theirs. Made, the
    first `count` have started."""

    def __init__(self, started: Iterable[Item], count: int = 1) -> None:
        self._items = iter(started)
        self._begun = deque(islice(self._items, count))

    def __next__(self) -> Item:
        self._begun.extend(islice(self._items, 1))
        if not self._begun:
            raise StopIteration
        return self._begun.popleft()


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
    """Reduce: weight-gradient partials go straight home, block by block, to the rank that sums them.

    shape      of a block's gradient
    expected   (turn, rank, block): when whose partials of which of this rank's blocks are sent, in order

    At each turn call `receive` and then `send`: in this order, and for turns at which this rank has no work as well,
    because others may have, and wait until what they sent is received. AHEAD sends, and the receives of AHEAD ranks,
    may be under way, so that they travel under the computation of the next blocks; beside them a rank holds only those
    pieces of its own blocks that wait for another.
    """

    def __init__(
        self, comm: Communicator, model: Model, shape: tuple[int, ...], tag: Tag,
        expected: Iterable[tuple[Turn, int, int]]
    ) -> None:
        self.comm = comm
        self.model = model
        self.shape = shape
        self.tag = tag
        self.phase = comm.phase  # the books' entry for all its messages, whenever they are posted
        self.expected = deque(expected)
        # Of one turn's receives none may be waited for before all are posted.
        turns = [when for when, _, _ in self.expected]
        self.ahead = max([AHEAD, *map(turns.count, turns)])
        self.trees: dict[int, Tree[Array]] = {}
        self.arriving: deque[list[Arrival]] = deque()
        self.leaving: deque[list[Request]] = deque()

    def send(self, owner: int, block: int, partial: Tree[Array]) -> None:
        """Hand in what this rank has computed of a block: a tree over slots, with the leaves of its own."""
        if owner == self.comm.rank:
            for (level, index), piece in partial.pieces():
                self._tree(block).add(index, piece, level)
            return
        self.leaving.append([self.comm.Isend(piece, owner, self.tag) for _, piece in partial.pieces()])
        if len(self.leaving) > AHEAD:
            self.comm.Waitall(self.leaving.popleft())

    def receive(self, until: Turn | None) -> None:
        """Irecv what is expected up to a turn; without one, all that is left."""
        while self.expected and (until is None or self.expected[0][0] <= until):
            _, peer, block = self.expected.popleft()
            nodes = cover(tuple(range(self.model.grid.num_tiles)), self.model.grid.slots_of(peer))
            self.arriving.append([
                Arrival(self.comm.Irecv(self.model.empty("buffers", *self.shape), peer, self.tag), self._tree(block),
                        node) for node in nodes])
            if len(self.arriving) > self.ahead:
                self._merge_oldest()

    def finish(self) -> list[Array]:
        """The whole gradient of each of this rank's blocks, when everything has arrived and left."""
        with self.comm.counting(self.phase):
            self.receive(None)
        while self.arriving:
            self._merge_oldest()
        while self.leaving:
            self.comm.Waitall(self.leaving.popleft())
        return [tree.total for _, tree in sorted(self.trees.items())]

    def write(self, gradients: Array, tied: bool = False) -> None:
        """Write the whole gradients of this rank's blocks into theirs [m, ...]; if tied, add to what is there."""
        for out, total in zip(gradients, self.finish()):
            out[...] = out + total if tied else total

    def _tree(self, block: int) -> Tree[Array]:
        return self.trees.setdefault(block, Tree(range(self.model.grid.num_tiles)))

    def _merge_oldest(self) -> None:
        arrivals = self.arriving.popleft()
        while arrivals:
            merge_one(self.comm, arrivals)


def all_gather_gradients(home: ReduceToOwner, gradients: Array, tied: bool = False) -> Callable[[], None]:
    """All-gather, which makes an all-reduce of a reduce: every rank sends the gradients that it has summed to all.
    Returns the wait for it.

    gradients [m, ...] is written: each block by its total, which for those of other ranks is received in its place. If
    tied, what was there is part of the total.
    """
    comm, totals, count = home.comm, home.finish(), len(gradients)
    mine = share(count, comm.rank, comm.size)
    if tied:
        totals = [gradients[position] + total for position, total in zip(mine, totals)]
    with comm.counting(home.phase):
        requests = [comm.Irecv(gradients[position], peer, home.tag)
                    for peer in comm.others for position in share(count, peer, comm.size)]
        requests += [comm.Isend(total, peer, home.tag) for peer in comm.others for total in totals]
    for position, total in zip(mine, totals):
        gradients[position] = total
    return lambda: comm.Waitall(requests)


class AllReduceTiles:
    """All-reduce of what every rank computes with its own blocks, tile by tile: an exchange to the rank that sums, and
    a gather. A slot's sum sets off when all blocks of this rank are in it, and travels under the work on the next slot.

    order  the slots, dealt to the ranks that sum them and then taken in rounds, one of each rank's: complete them so

    AHEAD slots are under way to the ranks that sum, and as many totals from them. A total is received in the place of
    the piece that was sent for it.
    """

    def __init__(
        self, comm: Communicator, model: Model, tag: Tag, merge: Callable[[Array, Array], Array] = add
    ) -> None:
        self.comm = comm
        self.model = model
        self.tag = tag
        slots = model.grid.slots
        self.trees = {slot: Tree[Array](range(model.grid.num_blocks), merge) for slot in slots}
        self.missing = dict.fromkeys(slots, len(model.grid.blocks))
        dealt = [share(len(slots), rank, comm.size) for rank in range(comm.size)]
        turns = list(in_turn(dealt, 0, range(0, -comm.size, -1)))
        self.order = [slots[index] for _, index in turns]
        self.summed_by = {slots[index]: rank for rank, index in turns}
        self.output: Tiles = {}
        self.exchanged: deque[tuple[int, Tree[Array], list[Arrival], list[Request]]] = deque()
        self.gathered: deque[list[Request]] = deque()

    def add(self, slot: int, block: int, leaf: Array) -> None:
        """What this rank has computed of a slot with one of its blocks."""
        self.trees[slot].add(block, leaf)
        self.missing[slot] -= 1
        if self.missing[slot] == 0:
            self._set_off(slot, self.trees.pop(slot))

    def _set_off(self, slot: int, partial: Tree[Array]) -> None:
        arrivals: list[Arrival] = []
        sends: list[Request] = []
        if self.summed_by[slot] == self.comm.rank:
            shape = partial.pieces()[0][1].shape
            arrivals = [
                Arrival(self.comm.Irecv(self.model.empty("buffers", *shape), peer, self.tag), partial, node)
                for peer in self.comm.others
                for node in cover(partial.leaves, tuple(self.model.grid.blocks_of(peer)))
            ]
        else:
            sends = [self.comm.Isend(piece, self.summed_by[slot], self.tag) for _, piece in partial.pieces()]
        self.exchanged.append((slot, partial, arrivals, sends))
        if len(self.exchanged) > AHEAD:
            self._gather_oldest()

    def finish(self) -> Tiles:
        """The totals of all slots, on every rank."""
        while self.exchanged:
            self._gather_oldest()
        while self.gathered:
            self.comm.Waitall(self.gathered.popleft())
        return {slot: self.output[slot] for slot in self.model.grid.slots}

    def _gather_oldest(self) -> None:
        slot, partial, arrivals, sends = self.exchanged.popleft()
        while arrivals:
            merge_one(self.comm, arrivals)
        self.comm.Waitall(sends)
        if self.summed_by[slot] == self.comm.rank:
            self.output[slot] = partial.total
            self.gathered.append([self.comm.Isend(partial.total, peer, self.tag) for peer in self.comm.others])
        else:
            self.output[slot] = partial.pieces()[0][1]
            self.gathered.append([self.comm.Irecv(self.output[slot], self.summed_by[slot], self.tag)])
        if len(self.gathered) > AHEAD:
            self.comm.Waitall(self.gathered.popleft())


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
