"""Who owns what: blocks and slots dealt once, consecutive and even, and causal work equal, or known to be unequal."""

from fractions import Fraction

import numpy as np
import pytest

from tsp_ref.errors import UserError
from tsp_ref.grid.grid import ALONE, Grid, Place, folded, share, zigzag

GRIDS = [(1, 1), (8, 16), (8, 4), (3, 5), (32, 64), (7, 16)]
WORLDS = [(blocks, tiles, size) for blocks, tiles in GRIDS for size in range(1, min(blocks, tiles) + 1)]


def grids(blocks: int, tiles: int, size: int, tile_len: int = 4, layout: str = "zigzag") -> list[Grid]:
    return [Grid(blocks, tiles, tile_len, *folded(rank, size), layout) for rank in range(size)]


def along_tokens(tiles: int, size: int, layout: str, tile_len: int = 4) -> list[Grid]:
    """What the ranks of an axis of tokens see."""
    return [Grid(1, tiles, tile_len, ALONE, Place(rank, size), layout) for rank in range(size)]


def positions(grid: Grid, slot: int) -> np.ndarray:
    return np.arange(grid.num_tiles * grid.tile_len, dtype=np.int64)[grid.tokens(slot)]


@pytest.mark.parametrize(("blocks", "tiles", "size"), WORLDS)
def test_every_block_and_slot_is_dealt_to_one_rank_in_order(blocks: int, tiles: int, size: int) -> None:
    world = grids(blocks, tiles, size)
    assert [block for grid in world for block in grid.blocks] == list(range(blocks))
    assert [slot for grid in world for slot in grid.slots] == list(range(tiles))


@pytest.mark.parametrize(("blocks", "tiles", "size"), WORLDS)
def test_every_rank_owns_a_block_and_a_slot_and_none_two_more_than_another(blocks: int, tiles: int, size: int) -> None:
    world = grids(blocks, tiles, size)
    for counts in ([len(grid.blocks) for grid in world], [len(grid.slots) for grid in world]):
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("count", [1, 5, 8, 16])
def test_a_share_is_even_where_the_number_of_ranks_divides(count: int) -> None:
    for size in (size for size in range(1, count + 1) if count % size == 0):
        assert [len(share(count, rank, size)) for rank in range(size)] == [count // size] * size


@pytest.mark.parametrize(("blocks", "tiles", "size"), [(8, 16, 8), (8, 16, 3), (7, 16, 5)])
def test_all_ranks_agree_on_who_owns_what(blocks: int, tiles: int, size: int) -> None:
    world = grids(blocks, tiles, size)
    for grid in world:
        assert [grid.blocks_of(rank) for rank in range(size)] == [other.blocks for other in world]
        assert [grid.slots_of(rank) for rank in range(size)] == [other.slots for other in world]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(("blocks", "tiles", "size"), WORLDS)
def test_stacks_are_a_rank_s_slots_so_many_at_a_time(blocks: int, tiles: int, size: int, layout: str) -> None:
    for grid in grids(blocks, tiles, size, layout=layout):
        for most in (1, 2, 3, 4, tiles, 2 * tiles):
            stacks = grid.stacks(most)
            assert [slot for stack in stacks for slot in stack.slots] == list(grid.slots)
            assert [stack.number for stack in stacks] == list(range(len(stacks)))
            assert all(grid.slots[stack.tiles] == stack.slots for stack in stacks)
            assert all(len(stack.slots) == most for stack in stacks[:-1]) and 1 <= len(stacks[-1].slots) <= most
            assert all(stack.place == (stack.slots[0], len(stack.slots)) for stack in stacks)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_the_tiles_of_a_rank_are_those_of_its_slots_in_order(layout: str) -> None:
    for grid in along_tokens(11, 3, layout):
        for rank in range(3):
            assert grid.tiles_of(rank) == [grid.tile(slot) for slot in grid.slots_of(rank)]


def test_slots_hold_the_tiles_from_both_ends_in_turn() -> None:
    assert [zigzag(slot, 8) for slot in range(8)] == [0, 7, 1, 6, 2, 5, 3, 4]
    assert [zigzag(slot, 5) for slot in range(5)] == [0, 4, 1, 3, 2]


@pytest.mark.parametrize("tiles", [1, 2, 3, 5, 8, 16, 64])
def test_zigzag_is_a_permutation(tiles: int) -> None:
    assert sorted(zigzag(slot, tiles) for slot in range(tiles)) == list(range(tiles))


@pytest.mark.parametrize("tile_len", [1, 3, 4])
@pytest.mark.parametrize("tiles", [2, 4, 6, 8, 16, 32])
def test_causal_work_is_equal_on_all_ranks(tiles: int, tile_len: int) -> None:
    """Counted token by token: the keys that each of a rank's queries sees."""
    seen = np.tri(tiles * tile_len, dtype=np.int64)
    for size in (size for size in range(1, tiles // 2 + 1) if tiles // 2 % size == 0):
        work = [sum(int(seen[positions(grid, slot)].sum()) for slot in grid.slots)
                for grid in grids(tiles, tiles, size, tile_len)]
        assert work == [int(seen.sum()) // size] * size


@pytest.mark.parametrize("tile_len", [1, 4])
@pytest.mark.parametrize("tiles", [1, 2, 5, 16])
def test_slots_hold_every_token_once(tiles: int, tile_len: int) -> None:
    grid = Grid(1, tiles, tile_len)
    held = np.concatenate([positions(grid, slot) for slot in range(tiles)])
    assert sorted(held.tolist()) == list(range(tiles * tile_len))
    assert all(len(positions(grid, slot)) == tile_len for slot in range(tiles))


@pytest.mark.parametrize("tile_len", [1, 4])
@pytest.mark.parametrize("tiles", [1, 2, 5, 16])
def test_a_slot_sees_the_tokens_up_to_its_last(tiles: int, tile_len: int) -> None:
    grid = Grid(1, tiles, tile_len)
    seen = np.tri(tiles * tile_len, dtype=np.bool_)
    for slot in range(tiles):
        assert grid.visible(slot) == seen[positions(grid, slot)].any(axis=0).sum()


@pytest.mark.parametrize("tile_len", [1, 4])
@pytest.mark.parametrize("tiles", [1, 2, 5, 16])
def test_the_readers_of_a_slot_are_the_slots_with_a_query_that_sees_one_of_its_keys(tiles: int, tile_len: int) -> None:
    grid = Grid(1, tiles, tile_len)
    seen = np.tri(tiles * tile_len, dtype=np.bool_)
    for slot in range(tiles):
        readers = [other for other in range(tiles)
                   if seen[np.ix_(positions(grid, other), positions(grid, slot))].any()]
        assert list(grid.readers(slot)) == readers


@pytest.mark.parametrize(("blocks", "tiles", "size"), WORLDS)
def test_contiguous_a_rank_holds_consecutive_tiles_in_the_order_of_slots(blocks: int, tiles: int, size: int) -> None:
    world = grids(blocks, tiles, size, layout="contiguous")
    assert sorted(slot for grid in world for slot in grid.slots) == list(range(tiles)), "all are dealt once"
    held = [sorted(grid.tile(slot) for slot in grid.slots) for grid in world]
    assert held == [list(share(tiles, rank, size)) for rank in range(size)]
    for grid, zigzagged in zip(world, grids(blocks, tiles, size)):
        assert list(grid.slots) == sorted(grid.slots)
        assert [grid.slots_of(rank) for rank in range(size)] == [other.slots for other in world]
        assert grid.blocks == zigzagged.blocks, "blocks know no layout"


def test_a_layout_says_who_holds_a_slot_and_never_what_is_in_it() -> None:
    alone = Grid(8, 16, 4)
    for grid in grids(8, 16, 3, layout="contiguous"):
        for slot in range(16):
            assert (grid.tile(slot), grid.readers(slot)) == (alone.tile(slot), alone.readers(slot))


def test_one_process_holds_every_slot_in_either_layout() -> None:
    assert Grid(8, 16, 4).slots == Grid(8, 16, 4, layout="contiguous").slots == tuple(range(16))


@pytest.mark.parametrize("tile_len", [1, 3, 4])
@pytest.mark.parametrize("tiles", [1, 2, 5, 16])
def test_pairs_are_the_keys_that_queries_see_with_half_of_a_tile_against_itself(tiles: int, tile_len: int) -> None:
    grid = Grid(1, tiles, tile_len)
    seen = np.tri(tiles * tile_len, dtype=np.int64)
    for slot in range(tiles):
        own = positions(grid, slot)
        before_the_tile = int(seen[own, : own[0]].sum())
        assert grid.pairs(slot) == before_the_tile + tile_len**2 / 2
    assert sum(map(grid.pairs, range(tiles))) == (tiles * tile_len) ** 2 / 2


@pytest.mark.parametrize("tiles", [16, 32, 64])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_busiest_rank_has_the_mean_s_attention_in_zigzag_and_nearly_twice_as_much_contiguous(
    tiles: int, size: int
) -> None:
    """Mean over largest is 1 in zigzag, and contiguous 2/3, 4/7, 8/15 on 2, 4, 8 ranks: the last of N ranks has 2N-1
    times as much to do as the first."""
    for layout, efficiency in (("zigzag", Fraction(1)), ("contiguous", Fraction(size, 2 * size - 1))):
        work = [Fraction(sum(map(grid.pairs, grid.slots))) for grid in along_tokens(tiles, size, layout)]
        assert sum(work) / size / max(work) == efficiency


@pytest.mark.parametrize(("axes", "message"), [
    ((Place(0, 9), ALONE), "ranks=9 is not possible: with blocks=8, not every rank would hold a weight block; use 1 to "
                           "8 ranks, or raise blocks with --set"),
    ((ALONE, Place(0, 17)), "ranks=17 is not possible: with tiles=16, not every rank would hold a token tile; use 1 to "
                            "16 ranks, or raise tiles with --set"),
    (folded(0, 9), "with blocks=8, not every rank would hold a weight block"),
])
def test_more_ranks_on_an_axis_than_there_is_to_deal_out_are_refused(axes: tuple[Place, Place], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Grid(8, 16, 4, *axes)
    assert message in str(caught.value)


def test_the_axes_are_dealt_out_apart_from_each_other() -> None:
    """Sixteen ranks for the tiles are possible with eight blocks, and the other way round."""
    for weights, tokens in ((ALONE, Place(15, 16)), (Place(7, 8), ALONE), (Place(3, 8), Place(5, 16))):
        grid = Grid(8, 16, 4, weights, tokens)
        assert grid.blocks == share(8, weights.rank, weights.size)
        assert grid.slots == tuple(share(16, tokens.rank, tokens.size))


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(UserError, match="--layout diagonal is unknown: use one of zigzag, contiguous"):
        Grid(8, 16, 4, layout="diagonal")


def test_tiles_and_tokens_are_the_same_on_any_number_of_ranks() -> None:
    alone = Grid(8, 16, 4)
    for size in range(1, 9):
        for grid in grids(8, 16, size):
            for slot in range(16):
                assert (grid.tile(slot), grid.tokens(slot)) == (alone.tile(slot), alone.tokens(slot))
