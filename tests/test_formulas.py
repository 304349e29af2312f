"""The accounts say exactly what the formulas say: every message, every byte held between layers, every product."""

from fractions import Fraction

import numpy as np
import pytest
from accounts import all_plans, sent_by, virtual_accounts
from cases import CASES, case_config, cut, cut_in_strips

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.formulas.memory import activation_bytes, gain_bytes, itemsize, model_state_bytes
from tsp_ref.formulas.messages import Sizes, closed_layer, step_messages
from tsp_ref.formulas.work import step_flops
from tsp_ref.grid.grid import ALONE, Grid, Place, folded
from tsp_ref.model.config import make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import initial_parameters
from tsp_ref.ops import attention
from tsp_ref.schedules import sp, tp, tsp
from tsp_ref.training.strategy import FOLDED, Plan, choose_strategy

EVERYWHERE = [("nine blocks, eleven tiles", ranks) for ranks in (1, 2, 3, 4, 8)]
SOMEWHERE = [("plain", 2), ("tied head", 3), ("grouped-query", 4)]
SIZES = {"grouped-query": dict(num_layers=1)}  # that every layer counts, the others say


def check(config, ranks, plan):
    """One step: each rank's accounts against the formulas."""
    folded_ = plan.schedule in FOLDED
    for accounts in virtual_accounts(config, ranks, plan):
        wanted = step_messages(plan.schedule, config, accounts.grid, plan.recompute)
        size = itemsize(config)
        assert accounts.sent == {(part, direction, purpose.name): (traffic.messages, traffic.elements * size)
                                 for (part, direction, purpose), traffic in wanted.items()}
        assert accounts.memory.model_state_peak == model_state_bytes(config, accounts.grid)
        assert accounts.kept == activation_bytes(config, accounts.grid, plan.recompute, folded_)
        assert accounts.flops == step_flops(config, accounts.grid, plan.recompute, folded_)


@pytest.mark.parametrize(("case", "ranks"), EVERYWHERE + SOMEWHERE)
def test_the_accounts_of_every_schedule_are_the_formulas_to_the_byte(case, ranks):
    for plan in all_plans(ranks):
        check(case_config(case, "float32", **SIZES.get(case, {})), ranks, plan)


@pytest.mark.parametrize(("recompute", "ranks"), [("attention", 3), ("full", 4)])
def test_the_accounts_of_recomputation_are_the_formulas_to_the_byte(ranks, recompute):
    for plan in all_plans(ranks, recompute=recompute):
        check(case_config("grouped-query", "float64", num_layers=1), ranks, plan)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_accounts_of_the_contiguous_layout_are_the_formulas_to_the_byte(ranks):
    for plan in all_plans(ranks, layout="contiguous"):
        check(case_config("plain", "float32"), ranks, plan)


@pytest.mark.parametrize("strip, diagonal", [(4, 8), (8, 3), (2, 4)])
def test_the_accounts_are_the_formulas_where_a_tile_is_several_strips_and_takes_its_own_keys_in_chunks(
    strip, diagonal, monkeypatch
):
    config = case_config("grouped-query", "float32", num_layers=1, tiles=4)
    assert config.tile_len == 8
    cut_in_strips(monkeypatch, strip)
    monkeypatch.setattr(attention, "DIAGONAL", diagonal)
    for plan, ranks in ((Plan("single", counted=True), 1), (Plan("tsp", counted=True), 2)):
        check(config, ranks, plan)


def test_more_ranks_than_blocks_or_tiles_are_in_the_formulas():
    check(case_config("plain", "float32", blocks=2), 4, Plan("sp", counted=True))
    check(case_config("plain", "float32", tiles=2), 4, Plan("tp", counted=True))
    check(case_config("plain", "float32", blocks=4), 8, Plan("tp+sp", "2x4", counted=True))


EVEN = [
    ("tp", Place(rank, size), ALONE) for size in (2, 4, 8) for rank in (0, size - 1)] + [
    ("sp", ALONE, Place(rank, size)) for size in (2, 4, 8) for rank in (0, size - 1)] + [
    ("tsp", *folded(rank, size)) for size in (2, 4, 8) for rank in range(size)] + [
    ("tp+sp", Place(1, first), Place(rank, second)) for first, second in ((2, 4), (4, 2), (2, 2)) for rank in (0, 1)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kv_heads", [8, 16])
@pytest.mark.parametrize(("schedule", "weights", "tokens"), EVEN)
def test_where_all_divides_evenly_a_layer_sends_what_the_closed_form_says(
        schedule, weights, tokens, kv_heads, direction):
    config = make_config("tiny", hidden_size=96, num_heads=16, num_kv_heads=kv_heads, ffn_size=160, num_layers=3,
                         batch_size=3)
    grid = Grid(config.blocks, config.tiles, config.tile_len, weights, tokens)
    sent = sum(traffic.elements for (part, way, _), traffic in step_messages(schedule, config, grid).items()
               if part in ("attention", "mlp") and way == direction)
    assert closed_layer(schedule, direction, config, weights, tokens) == Fraction(sent, config.num_layers)


def test_the_closed_forms_are_those_of_the_docstring():
    config = make_config("tiny", hidden_size=96, num_heads=16, num_kv_heads=8, ffn_size=160, batch_size=3)
    tokens, h, g, wide = 3 * config.seq_len * 96, 96, 2, Fraction(160, 96)
    layer = (2 + Fraction(2, g) + 3 * wide) * h * h
    ours = [closed_layer(schedule, "forward", config, *places) for schedule, places in (
        ("tp", (Place(0, 8), ALONE)), ("sp", (ALONE, Place(0, 8))), ("tsp", folded(0, 8)),
        ("tp+sp", (Place(0, 2), Place(0, 4))))]
    assert ours == [Fraction(7, 8) * 4 * tokens, Fraction(7, 8) * 2 * tokens / g,
                    Fraction(7, 8) * (Fraction(2 * tokens, g) + layer),
                    Fraction(1, 2) * tokens + Fraction(2 * tokens, g * 2) * Fraction(3, 4)]
    assert config.blocks * (Sizes(config).attention + Sizes(config).mlp) == layer


def layer_bytes(schedule, config, ranks):
    """What a layer's forward sends under a schedule, counted: each rank's bytes."""

    def main(comm):
        model = Model(config, np, *schedule.place(comm))
        weights = initial_parameters(model)
        shape = (config.batch_size, config.seq_len, config.hidden_size)
        x = cut(model, np.random.default_rng(3).standard_normal(shape, dtype=np.float32))
        x, _ = schedule.attention_forward(comm, model, x, weights, 0)
        schedule.mlp_forward(comm, model, x, weights, 0)
        return sum(size for _, size in sent_by(comm).values())

    return VirtualWorld(ranks, seed=1).run(main)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_tsp_sends_less_than_tp_forward_exactly_when_the_batch_has_more_than_8h_tokens(ranks):
    hidden = 32
    for factor, batch in ((4, 2), (8, 1), (8, 2), (16, 1)):
        config = make_config("tiny", hidden_size=hidden, ffn_size=4 * hidden, num_heads=8, num_kv_heads=8, num_layers=1,
                             batch_size=batch, seq_len=factor * hidden // batch)
        ours, theirs, least = (layer_bytes(schedule, config, ranks) for schedule in (tsp, tp, sp))
        for mine, other, sequence in zip(ours, theirs, least):
            assert (mine > other, mine == other, mine < other) == (factor < 8, factor == 8, factor > 8)
            assert mine > sequence, "TSP always moves more than SP"


def grids(plan, size, config):
    """The grid of each rank under a plan."""
    ranks = VirtualWorld(size).communicators
    return [choose_strategy(plan, comm, config, np).model.grid for comm in ranks]


def sides(plan):
    """T and Σ of a plan's mesh."""
    return [int(side) for side in plan.mesh.split("x")] if plan.mesh else [0, 0]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("case", ["plain", "tied head"])
def test_a_rank_s_share_of_the_model_state_is_1_over_n_1_1_over_t_and_1_over_n(case, size):
    config = case_config(case, "float32")
    whole, gains = model_state_bytes(config), gain_bytes(config)
    for plan in all_plans(size):
        parts = {"tp": size, "sp": 1, "fsdp+sp": size, "tsp": size, "tp+sp": sides(plan)[0]}[plan.schedule]
        for grid in grids(plan, size, config):
            assert (model_state_bytes(config, grid) - gains) * parts == whole - gains


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_rank_s_share_of_what_is_kept_between_layers_is_1_1_over_n_1_over_sigma_and_1_over_n(size):
    config = case_config("grouped-query", "float32")
    whole = activation_bytes(config, recompute="full")
    assert whole == config.batch_size * config.seq_len * (3 * config.hidden_size + 1) * 4
    for plan in all_plans(size):
        parts = {"tp": 1, "sp": size, "fsdp+sp": size, "tsp": size, "tp+sp": sides(plan)[1]}[plan.schedule]
        for grid in grids(plan, size, config):
            assert activation_bytes(config, grid, "full", plan.schedule in FOLDED) * parts == whole


def test_what_tp_keeps_in_blocks_is_divided_too():
    """Without recomputation TP keeps less than everything: only the parts' inputs are whole on every rank."""
    config = case_config("plain", "float32")
    inputs = config.batch_size * config.seq_len * (5 * config.hidden_size + 1) * 4
    accounts = virtual_accounts(config, 8, Plan("tp", counted=True))
    assert {each.kept for each in accounts} == {inputs + (activation_bytes(config) - inputs) // 8}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_rank_computes_as_much_as_every_other_where_zigzag_divides_evenly(size):
    config = case_config("plain", "float32", tiles=16)
    for plan in all_plans(size):
        work = {sum(step_flops(config, grid, folded=plan.schedule in FOLDED).values())
                for grid in grids(plan, size, config)}
        assert len(work) == 1


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_all_ranks_together_compute_what_one_process_computes(size):
    config = case_config("grouped-query", "float32")
    alone = step_flops(config, Grid(config.blocks, config.tiles, config.tile_len))
    for layout in ("zigzag", "contiguous"):
        for plan in all_plans(size, layout=layout):
            work = [step_flops(config, grid, folded=plan.schedule in FOLDED) for grid in grids(plan, size, config)]
            assert {key: sum(each[key] for each in work) for key in alone} == alone


@pytest.mark.parametrize("case", CASES)
def test_a_message_or_a_product_more_would_be_seen(case):
    config = case_config(case, "float32")
    accounts = virtual_accounts(config, 2, Plan("tsp", counted=True))[0]
    wanted = step_messages("tsp", config, accounts.grid)
    assert len(accounts.sent) == len(wanted) == 17
    assert all(messages > 0 and size > 0 for messages, size in accounts.sent.values())
