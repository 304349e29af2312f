"""The grid: blocks of weights, tiles of tokens, and who owns which on N ranks.

A model's weights are cut in G blocks and its sequences in T tiles, whatever N is; a run only decides who owns them.
No array that enters an operation has a shape that depends on N, so no rounding does. (Source: ours.)
"""

from __future__ import annotations

from dataclasses import dataclass


def share(count: int, rank: int, size: int) -> range:
    """The consecutive part of `range(count)` that `rank` of `size` owns: even, or uneven by one."""
    return range(rank * count // size, (rank + 1) * count // size)


def zigzag(slot: int, tiles: int) -> int:
    """The tile in a slot. Slots hold the tiles in the order 0, T-1, 1, T-2, ...

    A tile of queries costs as much causal attention as it has tokens before it, so a cheap tile is followed by an
    expensive one: where N divides T/2 every rank has exactly as much to do. (Zigzag is the usual remedy, and the
    paper's; its exact rule there was not available to us, and this order of slots is ours.)
    """
    return slot // 2 if slot % 2 == 0 else tiles - 1 - slot // 2


@dataclass(frozen=True)
class Grid:
    """The grid as `rank` of `size` sees it. A single process is rank 0 of 1 and owns everything."""

    num_blocks: int
    num_tiles: int
    tile_len: int
    rank: int = 0
    size: int = 1

    def blocks_of(self, rank: int) -> range:
        """The weight blocks that a rank owns."""
        return share(self.num_blocks, rank, self.size)

    def slots_of(self, rank: int) -> range:
        """The token slots that a rank owns."""
        return share(self.num_tiles, rank, self.size)

    @property
    def blocks(self) -> range:
        """This rank's weight blocks."""
        return self.blocks_of(self.rank)

    @property
    def slots(self) -> range:
        """This rank's token slots."""
        return self.slots_of(self.rank)

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
