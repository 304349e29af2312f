"""The one rule: every sum over blocks, and every sum over the slots of tiles, is the same fixed binary tree.

Float addition is not associative, so a sum in order of arrival has other bits at every run. Here the order is part of
the model: leaves 0..n-1 are paired as in a tournament, (0+1)+(2+3) and so on, and a partial sum waits until the partial
beside it is there. Which rank computed a leaf, and when it arrived, changes no bit.

One sum needs no tree: a tile's softmax over all keys that it sees is one call, whose shape depends on the tile alone.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
def _occupied(leaves: tuple[int, ...], levels: int) -> frozenset[Node]:
    """Every node that is a leaf or above one."""
    nodes: set[Node] = set()
    for level in range(levels + 1):
        nodes.update((level, leaf >> level) for leaf in leaves)
    return frozenset(nodes)


class Tree(Generic[Partial]):
    """A sum over `leaves` in the tree's fixed order, fed in any order.

    leaves  the indices that take part; absent ones (masked tiles) are skipped, their sibling passes upward unmerged
    merge   what joins a left and a right partial; it may reuse either's memory
    of      how many leaves there would be if none were absent, where nodes of that larger tree are handed in
    """

    def __init__(
        self, leaves: Iterable[int], merge: Callable[[Partial, Partial], Partial] = add, of: int = 0
    ) -> None:
        self.leaves = tuple(leaves)
        self.merge = merge
        self._root: Node = (max(max(self.leaves), of - 1).bit_length(), 0)
        self._occupied = _occupied(self.leaves, self._root[0])
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

    def add_stack(self, leaves: Sequence[int], stack: Any) -> None:
        """Hand in several leaves at once, ascending: stack[i] is the partial of leaves[i], and merge is addition.
        Siblings are added pair by pair, the whole stack in one operation a level: the same sums as one by one."""
        level, first = 0, leaves[0]
        if len(leaves) != leaves[-1] + 1 - first:  # with gaps: no pairs
            for leaf, partial in zip(leaves, stack):
                self.add(leaf, partial)
            return
        while len(stack) > 1:
            # What has no sibling in the stack is copied, so that it does not keep all of the stack alive.
            if first % 2:
                self.add(first, stack[0].copy(), level)
                first, stack = first + 1, stack[1:]
            if len(stack) % 2:
                self.add(first + len(stack) - 1, stack[-1].copy(), level)
            stack = stack[0 : len(stack) // 2 * 2 : 2] + stack[1::2]
            level, first = level + 1, first // 2
        if len(stack):
            self.add(first, stack[0], level)

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
