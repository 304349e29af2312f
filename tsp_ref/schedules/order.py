"""The order in which ranks use the blocks of all owners: in rounds of one block of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from ..grid.grid import Grid, share

Order: TypeAlias = list[tuple[int, int]]
"""(owner, block) of each step."""


def owned_blocks(grid: Grid) -> list[range]:
    """The blocks of each rank on the axis of weights."""
    return [grid.blocks_of(rank) for rank in range(grid.weight_axis.size)]


def summed_blocks(grid: Grid) -> list[range]:
    """Where the ranks of the axis of tokens all hold the same blocks: which of them each rank sums the gradients of."""
    first, size = grid.blocks.start, grid.token_axis.size
    shares = [share(len(grid.blocks), rank, size) for rank in range(size)]
    return [range(first + part.start, first + part.stop) for part in shares]


def ring_orders(owned: list[range]) -> list[Order]:
    """Each rank's order in a ring r -> r+1: the first block of its own, of its left neighbour, of that one's left
    neighbour, ...; then the second of each, ..."""
    size = len(owned)
    return [in_rounds(owned, ((rank - step) % size for step in range(size))) for rank in range(size)]


def broadcast_orders(owned: list[range]) -> list[Order]:
    """Each rank's order where all use the same block at the same step: the first block of each owner, then the second
    of each, ..."""
    return [in_rounds(owned, range(len(owned)))] * len(owned)


def in_rounds(owned: list[range], owners: Iterable[int]) -> Order:
    """The first block of each owner, in the order of `owners`, then the second of each, ..."""
    owners, most = list(owners), max(map(len, owned))
    return [(owner, owned[owner][number]) for number in range(most) for owner in owners if number < len(owned[owner])]
