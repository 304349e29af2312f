"""The one rule: every sum over blocks, and every sum over the slots of tiles, is the same fixed binary tree.

Float addition is not associative, so a sum in order of arrival has other bits at every run. Here the order is part of
the model: leaves 0..n-1 are paired as in a tournament, (0+1)+(2+3) and so on, and a partial sum waits until the partial
beside it is there. Which rank computed a leaf, and when it arrived, changes no bit.

One sum needs no tree: a tile's softmax over all keys that it sees is one call, whose shape depends on the tile alone.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Generic, TypeAlias, TypeVar

Partial = TypeVar("Partial")

Node: TypeAlias = tuple[int, int]
"""(level, index): the sum of the leaves from index·2^level up to, not including, (index+1)·2^level."""


def add(left: Any, right: Any) -> Any:
    """left + right, in place: a partial that has been handed to a tree belongs to the tree."""
    left += right
    return left


@lru_cache(maxsize=4096)
def _occupied(leaves: tuple[int, ...]) -> frozenset[Node]:
    """Every node that is a leaf or above one."""
    nodes: set[Node] = set()
    for level in range(max(leaves).bit_length() + 1):
        nodes.update((level, leaf >> level) for leaf in leaves)
    return frozenset(nodes)


class Tree(Generic[Partial]):
    """A sum over `leaves` in the tree's fixed order, fed in any order.

    leaves  the indices that take part; absent ones (masked tiles) are skipped, their sibling passes upward unmerged
    merge   what joins a left and a right partial; it may reuse either's memory
    """

    def __init__(self, leaves: Iterable[int], merge: Callable[[Partial, Partial], Partial] = add) -> None:
        self.leaves = tuple(leaves)
        self.merge = merge
        self._occupied = _occupied(self.leaves)
        self._root: Node = (max(self.leaves).bit_length(), 0)
        self._waiting: dict[Node, Partial] = {}

    def add(self, index: int, partial: Partial, level: int = 0) -> None:
        """Hand in the partial of leaf `index`, or of a whole node of a higher level, and merge as far as possible."""
        node = (level, index)
        if node not in self._occupied:
            raise ValueError(f"node {node} is not in the tree over leaves {self.leaves}")
        while node != self._root:
            level, index = node
            sibling = (level, index ^ 1)
            if sibling in self._occupied:
                if sibling not in self._waiting:
                    break
                other = self._waiting.pop(sibling)
                partial = self.merge(other, partial) if index % 2 else self.merge(partial, other)
            node = (level + 1, index // 2)
        if node in self._waiting:
            raise ValueError(f"node {node} was added to the tree twice")
        self._waiting[node] = partial

    @property
    def total(self) -> Partial:
        """The sum of all leaves, once all have arrived."""
        # Anything that waits beside the root came twice.
        if list(self._waiting) != [self._root]:
            raise ValueError(f"the tree over leaves {self.leaves} holds only the nodes {sorted(self._waiting)}")
        return self._waiting[self._root]

    def pieces(self) -> list[tuple[Node, Partial]]:
        """The partials that wait for a sibling, sorted: the few maximal subtrees of the leaves handed in so far."""
        return sorted(self._waiting.items(), key=lambda item: item[0])


@lru_cache(maxsize=4096)
def cover(leaves: tuple[int, ...], part: tuple[int, ...]) -> tuple[Node, ...]:
    """The nodes at which a tree over `leaves` waits when only `part` has been handed in.

    This is what a rank that holds `part` sends, in order, and therefore what its receiver expects.
    """
    tree: Tree[None] = Tree(leaves, merge=lambda left, right: None)
    for leaf in part:
        tree.add(leaf, None)
    return tuple(node for node, _ in tree.pieces())
