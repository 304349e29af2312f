"""The one rule: a sum has the same bits whatever the order of arrival and whoever computed which leaf."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tsp_ref.grid.grid import share
from tsp_ref.grid.tree import Tree, add, cover

COUNTS = [1, 2, 3, 4, 5, 7, 8, 11, 16, 23, 32]


def draw(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((count, 64), dtype=np.float32))


def total(leaves: list[int], arrays: list[np.ndarray], order: Any) -> bytes:
    tree = Tree[np.ndarray](leaves)
    for leaf in order:
        tree.add(leaf, arrays[leaf].copy())
    return tree.total.tobytes()


def tournament(leaves: list[int], arrays: list[np.ndarray]) -> np.ndarray:
    """The stated sum, written from its definition: pairs of neighbours meet, and who has no opponent goes up."""
    players = {leaf: arrays[leaf] for leaf in leaves}
    while max(players) > 0:
        winners = {}
        for seat in sorted({player // 2 for player in players}):
            met = [players[player] for player in (2 * seat, 2 * seat + 1) if player in players]
            winners[seat] = met[0] if len(met) == 1 else met[0] + met[1]
        players = winners
    return players[0]


def in_words(leaves: Any, order: Any) -> str:
    tree = Tree[str](leaves, merge=lambda left, right: f"({left}+{right})")
    for leaf in order:
        tree.add(leaf, str(leaf))
    return tree.total


def most_waiting(count: int, size: int, first: int) -> int:
    """The most partials that wait while shards come round a ring, the first rank's first."""
    tree, most = Tree[None](range(count), merge=lambda left, right: None), 0
    for step in range(size):
        for leaf in share(count, (first - step) % size, size):
            tree.add(leaf, None)
            most = max(most, len(tree.pieces()))
    return most


def test_leaves_meet_as_in_a_tournament() -> None:
    assert in_words(range(4), range(4)) == "((0+1)+(2+3))"
    assert in_words(range(7), reversed(range(7))) == "(((0+1)+(2+3))+((4+5)+6))"


def test_absent_leaves_are_skipped() -> None:
    assert in_words([1, 2, 3, 6], [6, 3, 1, 2]) == "((1+(2+3))+6)"
    assert in_words([5], [5]) == "5"


@pytest.mark.parametrize("count", COUNTS)
def test_a_total_has_the_same_bits_for_every_order_of_arrival(count: int) -> None:
    arrays, leaves = draw(count), list(range(count))
    random = np.random.default_rng(1)
    totals = {total(leaves, arrays, random.permutation(count).tolist()) for _ in range(30)}
    assert totals == {tournament(leaves, arrays).tobytes()}


@pytest.mark.parametrize("seed", range(20))
def test_a_total_of_some_leaves_has_the_same_bits_for_every_order_of_arrival(seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays = draw(24, seed)
    leaves = sorted(random.choice(24, size=int(random.integers(1, 24)), replace=False).tolist())
    totals = {total(leaves, arrays, random.permutation(leaves).tolist()) for _ in range(10)}
    assert totals == {tournament(leaves, arrays).tobytes()}


def test_a_sum_in_the_order_of_leaves_has_other_bits() -> None:
    arrays = draw(8)
    in_order = arrays[0].copy()
    for array in arrays[1:]:
        in_order += array
    assert in_order.tobytes() != total(list(range(8)), arrays, range(8))
    assert in_order.dtype == np.float32


@pytest.mark.parametrize("seed", range(20))
def test_leaves_handed_in_by_the_stack_are_those_handed_in_one_by_one_in_every_bit(seed: int) -> None:
    """Runs of any length from any leaf on, in any order, and some with gaps; and what waits is the same too."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 40))
    arrays, leaves = draw(count, seed), list(range(count))
    cuts = sorted({0, count, *random.integers(0, count, size=int(random.integers(0, 6))).tolist()})
    runs = [leaves[first:end] for first, end in pairwise(cuts)]
    if seed % 2 and len(runs) > 2:  # two runs with others between them, as one
        runs.append(runs.pop(0) + runs.pop(1))
    stacked, single = Tree[np.ndarray](leaves), Tree[np.ndarray](leaves)
    for number in random.permutation(len(runs)):
        run = sorted(runs[number])
        stacked.add_stack(run, np.stack([arrays[leaf] for leaf in run]))
        for leaf in run:
            single.add(leaf, arrays[leaf].copy())
        found, wanted = stacked.pieces(), single.pieces()
        assert [node for node, _ in found] == [node for node, _ in wanted]
        assert [piece.tobytes() for _, piece in found] == [piece.tobytes() for _, piece in wanted]
    assert stacked.total.tobytes() == tournament(leaves, arrays).tobytes()


@pytest.mark.parametrize("seed", range(10))
def test_stacks_of_some_leaves_of_a_tree_are_summed_as_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays = draw(24, seed)
    leaves = sorted(random.choice(24, size=int(random.integers(2, 24)), replace=False).tolist())
    cut = int(random.integers(1, len(leaves)))
    tree = Tree[np.ndarray](leaves)
    for part in (leaves[cut:], leaves[:cut]):
        tree.add_stack(part, np.stack([arrays[leaf] for leaf in part]))
    assert tree.total.tobytes() == tournament(leaves, arrays).tobytes()


def test_what_waits_of_a_stack_keeps_no_more_than_itself_alive() -> None:
    """Of seven leaves from the first on, three sums wait, and of 1 to 3 the last two are one."""
    for first, count in ((0, 7), (1, 3), (3, 9)):
        tree, stack = Tree[np.ndarray](range(16)), np.ones((count, 8), dtype=np.float32)
        tree.add_stack(range(first, first + count), stack)
        for _, piece in tree.pieces():
            owner = piece if piece.base is None else piece.base
            assert owner.nbytes == piece.nbytes


@pytest.mark.parametrize("leaves", [[3], [2, 3], [1, 3]])
def test_a_stack_with_a_leaf_that_was_handed_in_is_refused(leaves: list[int]) -> None:
    tree = Tree[np.ndarray](range(8))
    tree.add(3, np.ones(2))
    with pytest.raises(ValueError, match=r"was added to the tree twice|holds only the nodes"):
        tree.add_stack(leaves, np.ones((len(leaves), 2)))
        _ = tree.total


def test_a_tree_of_some_leaves_takes_the_nodes_of_the_whole_one() -> None:
    """The sum of a node of which only some leaves are there, as of queries of which only some see a key."""
    for leaves in ([0], [1], [1, 2]):
        tree = Tree[str](leaves, merge=lambda left, right: f"({left}+{right})", of=8)
        tree.add(0, "0..3", level=2)
        assert tree.total == "0..3"
    with pytest.raises(ValueError, match="is not in the tree"):
        tree.add(1, "4..7", level=2)
    tree = Tree[str]([1, 6], merge=lambda left, right: f"({left}+{right})", of=8)
    for index in (1, 0):
        tree.add(index, ("0..3", "4..7")[index], level=2)
    assert tree.total == "(0..3+4..7)"


@pytest.mark.parametrize("count", COUNTS)
def test_pieces_of_ranks_merged_elsewhere_give_the_same_bits_for_every_number_of_ranks(count: int) -> None:
    random = np.random.default_rng(2)
    arrays, leaves = draw(count), tuple(range(count))
    for size in range(1, count + 1):
        sent = []
        for rank in range(size):
            part = tuple(share(count, rank, size))
            local = Tree[np.ndarray](leaves)
            for leaf in part:
                local.add(leaf, arrays[leaf].copy())
            assert tuple(node for node, _ in local.pieces()) == cover(leaves, part)
            sent += local.pieces()
        summed = Tree[np.ndarray](leaves)
        for number in random.permutation(len(sent)):
            (level, index), piece = sent[number]
            summed.add(index, piece, level)
        assert summed.total.tobytes() == tournament(list(leaves), arrays).tobytes()


def test_pieces_of_a_tree_with_absent_leaves_merge_elsewhere() -> None:
    leaves, arrays = (0, 3, 4, 5, 9, 12), draw(13)
    summed = Tree[np.ndarray](leaves)
    for part in ((3, 12), (5,), (0, 4, 9)):
        local = Tree[np.ndarray](leaves)
        for leaf in part:
            local.add(leaf, arrays[leaf].copy())
        assert tuple(node for node, _ in local.pieces()) == cover(leaves, part)
        for (level, index), piece in local.pieces():
            summed.add(index, piece, level)
    assert summed.total.tobytes() == tournament(list(leaves), arrays).tobytes()


def test_a_cover_is_the_few_largest_subtrees_of_a_part() -> None:
    leaves = tuple(range(16))
    assert cover(leaves, tuple(range(8, 16))) == ((3, 1),)
    assert cover(leaves, tuple(range(5, 11))) == ((0, 5), (0, 10), (1, 3), (1, 4))
    assert cover(leaves, leaves) == ((4, 0),)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32, 64])
def test_few_partials_wait_when_shards_of_two_four_or_eight_ranks_come_round_a_ring(count: int) -> None:
    for size in (size for size in (1, 2, 4, 8) if size <= count):
        assert max(most_waiting(count, size, first) for first in range(size)) <= count.bit_length()  # log2(n) + 1


@pytest.mark.parametrize("count", [3, 5, 8, 16, 21, 32, 64])
def test_few_partials_wait_when_shards_of_any_number_of_ranks_come_round_a_ring(count: int) -> None:
    """A run of leaves in the middle is cut off on both sides, so it may take twice as many as one at an end."""
    for size in range(1, count + 1):
        assert max(most_waiting(count, size, first) for first in range(size)) <= 2 * (count - 1).bit_length()


def test_a_leaf_is_added_in_place_to_the_partial_on_its_left() -> None:
    left, right = np.ones(2, dtype=np.float32), np.ones(2, dtype=np.float32)
    assert add(left, right) is left
    assert left.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("leaf", [0, 3])
def test_a_leaf_handed_in_twice_is_refused(leaf: int) -> None:
    tree = Tree[int](range(4))
    tree.add(leaf, 1)
    with pytest.raises(ValueError, match=rf"node \(0, {leaf}\) was added to the tree twice"):
        tree.add(leaf, 1)


def test_a_whole_sum_handed_in_twice_is_refused() -> None:
    tree = Tree[int]([5])
    tree.add(5, 1)
    with pytest.raises(ValueError, match="twice"):
        tree.add(5, 1)


@pytest.mark.parametrize(("index", "level"), [(1, 0), (4, 0), (-1, 0), (2, 1), (0, 3)])
def test_a_node_without_a_leaf_is_refused(index: int, level: int) -> None:
    with pytest.raises(ValueError, match=rf"node \({level}, {index}\) is not in the tree"):
        Tree[int]([0, 2, 3]).add(index, 1, level)


def test_a_total_before_the_last_leaf_is_refused_and_says_what_has_arrived() -> None:
    tree = Tree[int](range(4))
    for leaf in (3, 0, 1):
        tree.add(leaf, 1)
    with pytest.raises(ValueError, match=r"holds only the nodes \[\(0, 3\), \(1, 0\)\]"):
        _ = tree.total
