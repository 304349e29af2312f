"""How many tiles, or blocks of heads, go through an operation at a time is a matter of speed: no bit depends on it."""

import numpy as np
import pytest
from cases import MODULES, case_config, plans, single_digest, virtual_digest

from tsp_ref.errors import UserError
from tsp_ref.model import model as model_module
from tsp_ref.model.config import PRESETS, make_config
from tsp_ref.model.model import STACK_BYTES, Model, tiles_at_a_time
from tsp_ref.ops import attention
from tsp_ref.training.strategy import Plan

SIZES = dict(num_layers=1, hidden_size=32, num_heads=8, num_kv_heads=4, blocks=4, tiles=7, seq_len=28)
STACKS = (1, 2, 3, 4, 7, 100, None)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("schedule", MODULES)
def test_every_number_of_tiles_at_a_time_has_the_digest_of_one(schedule, ranks, dtype):
    config = case_config("grouped-query", dtype, **SIZES)
    wanted = virtual_digest(config, Plan("single", stack=1), 1, steps=1)
    for stack in STACKS:
        for plan in plans(schedule, ranks, stack=stack):
            assert virtual_digest(config, plan, ranks, seed=ranks, steps=1) == wanted, (stack, plan)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_single_process_has_it_too_whatever_it_recomputes(dtype):
    config = case_config("grouped-query", dtype, **SIZES)
    wanted = virtual_digest(config, Plan("single", stack=1), 1, steps=1)
    for recompute in ("none", "attention", "full"):
        for stack in STACKS:
            assert virtual_digest(config, Plan("single", recompute=recompute, stack=stack), 1, steps=1) == wanted


@pytest.mark.parametrize("plan, ranks", [(Plan("single"), 1), (Plan("tp"), 2), (Plan("sp"), 2), (Plan("tsp"), 2)],
                         ids=str)
@pytest.mark.parametrize("padded", [1, 6000, 1 << 30])
def test_how_many_blocks_attend_at_a_time_and_how_many_tiles_are_padded_together_changes_no_bit(
    plan, ranks, padded, monkeypatch
):
    config = case_config("grouped-query", "float32", **SIZES)
    wanted = single_digest(config, steps=1)
    for module in (attention, model_module):
        monkeypatch.setattr(module, "PADDED_BYTES", padded)
    if plan.schedule == "single":
        groups = [len(blocks) for blocks in Model(config, np).head_groups]
        assert groups == {1: [1] * 4, 6000: [3, 1], 1 << 30: [4]}[padded]
    assert virtual_digest(config, plan, ranks, steps=1) == wanted


def largest(config):
    """Bytes of the largest array of one tile in a stack: its own, or the gradient of a block that it leaves."""
    tokens = config.batch_size * config.tile_len
    width = config.ffn_size // config.blocks
    own = tokens * max(config.hidden_size, 2 * width)
    return max(own, 3 * config.hidden_size * width) * np.dtype(config.dtype).itemsize


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("changes", [{}, dict(batch_size=1), dict(tiles=1), dict(tiles=3, seq_len=300), dict(tiles=64)])
def test_tiles_at_a_time_are_a_power_of_two_and_as_many_as_fit(preset, dtype, changes):
    config = make_config(preset, dtype=dtype, **changes)
    count = tiles_at_a_time(config)
    assert count >= 1 and count & (count - 1) == 0 and count <= config.tiles
    assert count * largest(config) <= STACK_BYTES or count == 1
    assert 2 * count > config.tiles or 2 * count * largest(config) > STACK_BYTES


def test_some_take_one_tile_at_a_time_and_some_all():
    counts = [tiles_at_a_time(make_config(preset)) for preset in ("7b", "tiny")]
    assert counts == [1, 16]


def test_a_model_takes_as_many_tiles_at_a_time_as_it_is_told_or_as_it_chooses():
    config = case_config("plain", "float32")
    for stack, sizes in ((3, [3, 3, 2]), (1, [1] * 8), (100, [8]), (None, [tiles_at_a_time(config)])):
        assert [len(part.slots) for part in Model(config, np, stack=stack).stacks] == sizes


@pytest.mark.parametrize("stack", [0, -1])
def test_less_than_one_tile_at_a_time_is_refused(stack):
    with pytest.raises(UserError, match=f"--stack {stack} is not valid: use 1 or more tiles at a time, or leave it"):
        Model(case_config("plain", "float32"), np, stack=stack)
