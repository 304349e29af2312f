"""The order in which a rank uses the blocks of all owners: in rounds of one block of each."""

from __future__ import annotations

from collections.abc import Sequence

from ..grid.grid import Grid, share

AHEAD = 2
"""How many blocks' keys and values, or gradients, may be in flight to or from a rank while it works on another's."""


def owned_blocks(grid: Grid) -> list[range]:
    """The blocks of each rank on the axis of weights."""
    return [grid.blocks_of(rank) for rank in range(grid.weight_axis.size)]


def summed_blocks(grid: Grid) -> list[range]:
    """Where the ranks of the axis of tokens all hold the same blocks: which of them each rank sums the gradients of."""
    first, size = grid.blocks.start, grid.token_axis.size
    shares = [share(len(grid.blocks), rank, size) for rank in range(size)]
    return [range(first + part.start, first + part.stop) for part in shares]


def rounds(owned: list[range], owners: Sequence[int]) -> list[tuple[int, int]]:
    """(owner, block) of all blocks: the first of each owner, in the order of `owners`, then the second of each, ..."""
    most = max(map(len, owned))
    return [(owner, owned[owner][number]) for number in range(most) for owner in owners if number < len(owned[owner])]


def backwards_from(rank: int, size: int) -> list[int]:
    """This rank, its left neighbour, the left neighbour's, ...: whose blocks come by in a ring r -> r+1."""
    return [(rank - step) % size for step in range(size)]
