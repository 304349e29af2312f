"""The grid: blocks of weights, tiles of tokens, and who holds which.

A model's weights are cut in G blocks and its sequences in T tiles, whatever N is; a run only decides who holds them.
No array that enters an operation has a shape that depends on N, so no rounding does. (Source: ours.)

Blocks are dealt along one axis of ranks, tiles along another. That is all that the schedules differ in here: tensor
parallelism has an axis for the blocks alone, sequence parallelism one for the tiles alone, a mesh has both, and TSP
folds both on the same ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..errors import UserError

LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Place:
    """A rank's position on an axis of `size` ranks. An axis of one rank deals out nothing."""

    rank: int = 0
    size: int = 1


ALONE = Place()


def folded(rank: int, size: int) -> tuple[Place, Place]:
    """TSP's two axes: the same ranks for the blocks and for the tiles."""
    return Place(rank, size), Place(rank, size)


def share(count: int, rank: int, size: int) -> range:
    """The consecutive part of `range(count)` that `rank` of `size` holds: even, or uneven by one."""
    return range(rank * count // size, (rank + 1) * count // size)


def zigzag(slot: int, tiles: int) -> int:
    """The tile in a slot. Slots hold the tiles in the order 0, T-1, 1, T-2, ...

    A tile of queries costs as much causal attention as it has tokens before it, so a cheap tile is followed by an
    expensive one: where N divides T/2 every rank has exactly as much to do. (Zigzag is the usual remedy, and the
    paper's; its exact rule there was not available to us, and this order of slots is ours.)
    """
    return slot // 2 if slot % 2 == 0 else tiles - 1 - slot // 2


@lru_cache(maxsize=4096)
def _slots(layout: str, tiles: int, rank: int, size: int) -> tuple[int, ...]:
    part = share(tiles, rank, size)
    # The order of the slots is that of every sum over tiles, so it stays, whoever holds them.
    return tuple(part) if layout == "zigzag" else tuple(slot for slot in range(tiles) if zigzag(slot, tiles) in part)


class Stack(NamedTuple):
    """Some of a rank's tiles, that are taken through an operation at a time."""

    number: int  # among the rank's stacks
    tiles: slice  # of the rank's tiles, the first axis of all its arrays
    slots: tuple[int, ...]

    @property
    def place(self) -> tuple[int, int]:
        """(the first slot, how many): what a communicator is told when the work on a stack begins."""
        return self.slots[0], len(self.slots)


@dataclass(frozen=True)
class Grid:
    """The grid as one rank sees it. A single process is alone on both axes and holds everything.

    weight_axis  this rank's place among the ranks that the blocks are dealt to
    token_axis   this rank's place among the ranks that the tiles are dealt to
    layout       zigzag: a rank holds consecutive slots; contiguous: consecutive tiles of the text. The same bits.
    """

    num_blocks: int
    num_tiles: int
    tile_len: int
    weight_axis: Place = ALONE
    token_axis: Place = ALONE
    layout: str = "zigzag"

    def __post_init__(self) -> None:
        for axis, field, count, what in ((self.weight_axis, "blocks", self.num_blocks, "weight block"),
                                         (self.token_axis, "tiles", self.num_tiles, "token tile")):
            if axis.size > count:
                raise UserError(f"ranks={axis.size} is not possible: with {field}={count}, not every rank would hold a "
                                f"{what}; use 1 to {count} ranks, or raise {field} with --set")
        if self.layout not in LAYOUTS:
            raise UserError(f"--layout {self.layout} is unknown: use one of {', '.join(LAYOUTS)}")

    def blocks_of(self, position: int) -> range:
        """The weight blocks that the rank at a position of the weight axis holds."""
        return share(self.num_blocks, position, self.weight_axis.size)

    def slots_of(self, position: int) -> tuple[int, ...]:
        """The token slots that the rank at a position of the token axis holds, ascending."""
        return _slots(self.layout, self.num_tiles, position, self.token_axis.size)

    def tiles_of(self, position: int) -> list[int]:
        """The tiles, in the order of their slots, that the rank at a position of the token axis holds."""
        return [self.tile(slot) for slot in self.slots_of(position)]

    @property
    def blocks(self) -> range:
        """This rank's weight blocks."""
        return self.blocks_of(self.weight_axis.rank)

    @property
    def slots(self) -> tuple[int, ...]:
        """This rank's token slots."""
        return self.slots_of(self.token_axis.rank)

    def stacks(self, size: int) -> list[Stack]:
        """This rank's tiles, so many at a time."""
        starts = range(0, len(self.slots), size)
        return [Stack(number, slice(start, start + size), self.slots[start : start + size])
                for number, start in enumerate(starts)]

    def tile(self, slot: int) -> int:
        """The tile, in the order of the text, that a slot holds."""
        return zigzag(slot, self.num_tiles)

    def tokens(self, slot: int) -> slice:
        """The positions in the sequence that a slot holds."""
        tile = self.tile(slot)
        return slice(tile * self.tile_len, (tile + 1) * self.tile_len)

    def visible(self, slot: int) -> int:
        """n, how many keys a slot's queries see: every token up to the slot's last."""
        return (self.tile(slot) + 1) * self.tile_len

    def readers(self, slot: int) -> tuple[int, ...]:
        """The slots whose queries see this slot's keys: those of the same tile and of later ones."""
        return tuple(other for other in range(self.num_tiles) if self.tile(other) >= self.tile(slot))

    def pairs(self, slot: int) -> float:
        """How many pairs of a query and a key causal attention needs of a slot: s·(n - s/2), where half of the tile
        against itself counts as masked."""
        return self.tile_len * (self.visible(slot) - self.tile_len / 2)
