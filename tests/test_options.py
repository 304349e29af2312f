"""What a model may have beside the plain one: heads of another size, biases, norms of heads, scaled rope, and any
vocabulary.

That all of them together are the textbook's, have the right gradients and send what the formulas say is in the other
tests, as the case "every option"; here is what each alone does, and what must never be trained.
"""

from typing import Any

import numpy as np
import pytest
from cases import (
    case_config,
    cut,
    gradient_gaps,
    perturbed_parameters,
    plans,
    random_batch,
    random_text,
    schedule_calls,
    single_digest,
    single_training,
    sum_over,
    virtual_digest,
)
from test_formulas import check
from test_naive_and_single import TOLERANCE, both_models, relative, too_large

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.errors import UserError
from tsp_ref.formulas.memory import model_state_bytes
from tsp_ref.formulas.messages import closed_layer, step_messages
from tsp_ref.grid.grid import Grid, Place, folded
from tsp_ref.model.config import Config, make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import bias_view, initial_parameters, zero_parameters
from tsp_ref.model.tilewise import apart, together
from tsp_ref.ops.rope_scaling import RopeScaling, scaled_frequencies
from tsp_ref.reference import naive, single
from tsp_ref.training.optimizer import AdamW
from tsp_ref.training.strategy import Plan

OPTIONS: dict[str, dict[str, Any]] = {
    "head size": dict(head_dim=10),
    "biases": dict(qkv_bias=True),
    "norms of heads": dict(qk_norm=True),
    "scaled rope": dict(rope_factor=8.0, rope_original_length=16),
    "any vocabulary": dict(vocab_size=261),
}
SCHEDULES = ("tp", "sp", "tp+sp", "tsp")


def with_option(option: str, dtype: str, **changes: Any) -> Config:
    """A model of one layer, two key/value heads a block, with one option on."""
    return case_config("grouped-query", dtype, num_layers=1, blocks=4, **OPTIONS[option], **changes)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("option", OPTIONS)
def test_with_each_option_naive_and_single_agree(option: str, dtype: str) -> None:
    changes = dict(num_layers=1, blocks=4, **OPTIONS[option])
    assert too_large(*both_models("grouped-query", dtype, **changes), TOLERANCE[dtype]) == {}


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_changes_the_loss(option: str) -> None:
    plain = case_config("grouped-query", "float64", num_layers=1, blocks=4)
    assert first_loss(plain) != first_loss(with_option(option, "float64"))


def first_loss(config: Config) -> float:
    """Of the single process, on bytes."""
    model = Model(config, np)
    tokens, targets = (cut(model, whole % 256) for whole in random_batch(config))
    return single.model_forward(model, perturbed_parameters(model), tokens, targets)[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("option", [*OPTIONS, "all"])
def test_with_each_option_ranks_have_the_bits_of_the_single_process(option: str, schedule: str, dtype: str) -> None:
    config = case_config("every option", dtype) if option == "all" else with_option(option, dtype)
    for plan in plans(schedule, 3):
        assert virtual_digest(config, plan, 3, seed=1, steps=1) == single_digest(config, 1)


@pytest.mark.parametrize("recompute", ["attention", "full"])
@pytest.mark.parametrize("plan, ranks", [("tp", 2), ("tsp", 4)])
def test_so_they_have_with_all_options_where_the_backward_recomputes(plan: str, ranks: int, recompute: str) -> None:
    config = case_config("every option", "float32")
    found = virtual_digest(config, Plan(plan, recompute=recompute), ranks, seed=2, steps=1)
    assert found == single_digest(config, 1)


@pytest.mark.parametrize("stack", [1, 2, 8])
def test_how_many_tiles_are_taken_at_a_time_changes_no_bit_of_any_option(stack: int) -> None:
    config = case_config("every option", "float32")
    assert virtual_digest(config, Plan("single", stack=stack), 1, steps=1) == single_digest(config, 1)


@pytest.mark.parametrize("plan, ranks", [(Plan("tp"), 2), (Plan("sp"), 2), (Plan("tp+sp", "2x2"), 4), (Plan("tsp"), 3)],
                         ids=str)
def test_gradients_of_all_options_on_virtual_ranks_are_central_differences(plan: Plan, ranks: int) -> None:
    config = case_config("every option", "float64")

    def main(comm: Any) -> dict[str, float]:
        return gradient_gaps(*schedule_calls(config, plan, comm), sum_over(comm), "loss")

    for gaps in VirtualWorld(ranks, seed=1).run(main):
        assert {name: gap for name, gap in gaps.items() if not gap < 1e-7} == {}
        assert {f"layers.0.attention.b{part}" for part in "qkv"} <= set(gaps)


def step_of_single(config: Config) -> tuple[Model, Any, Any, Any]:
    """Model, weights, gradients and the textbook's gradients of a step on random tokens."""
    model = Model(config, np)
    weights, gradients = perturbed_parameters(model), zero_parameters(model, "gradients")
    tokens, targets = random_batch(config)
    _, saved = single.model_forward(model, weights, cut(model, tokens), cut(model, targets))
    single.model_backward(model, saved, weights, gradients)
    wanted = naive.loss_and_gradients(config, naive.assemble(config, weights), tokens, targets)["gradients"]
    return model, weights, gradients, wanted


def test_the_gains_of_queries_and_keys_have_gradients_of_their_own_size() -> None:
    """Among all gains theirs are small: here they are compared alone."""
    config = with_option("norms of heads", "float64")
    h, e = config.hidden_size, config.head_dim
    _, _, gradients, wanted = step_of_single(config)
    for part in (slice(h, h + e), slice(h + e, h + 2 * e)):
        assert np.max(np.abs(wanted["gains"][0, part])) > 0
        assert relative(gradients.gains[0, part], wanted["gains"][0, part]) < 1e-12
    assert not gradients.gains[1:, h:].any()


def test_what_travels_together_comes_apart() -> None:
    model = Model(with_option("norms of heads", "float64"), np)
    e = model.config.head_dim
    dnormed, dgains = np.random.default_rng(0).standard_normal((2, 3, 4, 5)), np.ones((2, 2, e))
    found = apart(model, together(model, dnormed, dgains), dnormed.shape)
    assert np.array_equal(found[0], dnormed) and np.array_equal(found[1], dgains.reshape(2, -1))
    assert apart(model, dnormed, dnormed.shape) == (dnormed, 0.0)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_are_no_token_s_have_no_gradient_no_part_in_the_loss_and_are_never_trained(tied: bool) -> None:
    config = with_option("any vocabulary", "float64", tied_head=tied)
    rows = config.tokens_in_block(config.blocks - 1)
    assert 0 < rows < config.rows_per_block and config.blocks * config.rows_per_block > config.vocab_size
    model, weights, gradients, _ = step_of_single(config)
    tokens, targets = (cut(model, whole) for whole in random_batch(config))
    before = single.model_forward(model, weights, tokens, targets)[0]
    for tensor, gradient in zip({id(weights.embedding): weights.embedding, id(weights.head_table): weights.head_table}
                                .values(), (gradients.embedding, gradients.head_table)):
        assert not gradient[-1, rows:].any() and gradient[-1, :rows].any()
        tensor[-1, rows:] = 100.0
    assert single.model_forward(model, weights, tokens, targets)[0] == before
    training = single_training(config, random_text())
    for _ in range(3):
        training.step()
    assert not training.weights.embedding[-1, rows:].any() and not training.weights.head_table[-1, rows:].any()
    assert training.weights.embedding[:-1].all()


def test_biases_begin_at_zero_and_are_not_decayed_and_gains_that_are_not_used_stay_one() -> None:
    config = case_config("every option", "float64", weight_decay=0.5)
    model = Model(config, np)
    weights, before = perturbed_parameters(model), perturbed_parameters(model)
    begun = initial_parameters(model)
    AdamW(model).update(weights, zero_parameters(model, "gradients"), 0, 1.0)
    for now, then, first in zip(weights.attention, before.attention, begun.attention):
        width = bias_view(config, now).shape[-1]
        assert not bias_view(config, first).any()
        assert now[:, -width:].tobytes() == then[:, -width:].tobytes()
        assert (np.abs(now[:, :-width]) < np.abs(then[:, :-width])).all()
    training = single_training(config, random_text())
    training.step()
    h = config.hidden_size
    assert (training.weights.gains[1:, h:] == 1.0).all() and (training.weights.gains[0, h:] != 1.0).all()


def test_the_number_of_parameters_counts_no_row_and_no_gain_that_is_not_used() -> None:
    config = case_config("every option", "float32")
    weights = initial_parameters(Model(config, np))
    held = sum(tensor.size for _, tensor in weights.tensors()) + weights.gains.size
    assert model_state_bytes(config) == 4 * 4 * held
    empty = 2 * (config.blocks * config.rows_per_block - config.vocab_size) * config.hidden_size
    assert config.num_parameters == held - empty - 2 * 2 * config.head_dim


@pytest.mark.parametrize(("preset", "parameters"), [
    ("smollm-135m", 134_515_008), ("tinyllama-1.1b", 1_100_048_384), ("llama-3-8b", 8_030_261_248),
    ("qwen3-0.6b", 596_049_920)])
def test_models_that_have_a_name_have_as_many_parameters_as_their_checkpoints(preset: str, parameters: int) -> None:
    assert make_config(preset).num_parameters == parameters


def test_a_head_size_is_found_from_the_others_if_it_is_not_given() -> None:
    assert make_config("tiny").head_dim == 8
    assert make_config("tiny", head_dim=8) == make_config("tiny")
    assert make_config("tiny", ["hidden_size=60", "head_dim=8"]).head_dim == 8, "which need not divide h"


def test_fewer_key_value_heads_than_blocks_are_refused_with_the_schedules_that_need_no_more_blocks() -> None:
    with pytest.raises(UserError) as caught:
        make_config("tiny", num_kv_heads=2)
    message = str(caught.value)
    assert message.startswith("num_kv_heads=2 is not a multiple of blocks=8: use 8 for num_kv_heads, or another blocks")
    assert "--schedule sp, and of tp+sp with one rank for weights (--mesh 1xN)" in message
    config = case_config("plain", "float32", num_kv_heads=2, blocks=2, num_layers=1)
    for plan in (Plan("sp"), Plan("tp+sp", "1x4")):
        assert virtual_digest(config, plan, 4, steps=1) == single_digest(config, 1)


def test_frequencies_are_scaled_as_their_turns_within_the_original_length_say() -> None:
    length = 64
    turns = np.array([40.0, 4.0, 2.5, 1.0, 0.25])
    found = scaled_frequencies(np, turns * 2 * np.pi / length, RopeScaling(8.0, 1.0, 4.0, length))
    np.testing.assert_allclose(found * length / (2 * np.pi), [40.0, 4.0, 0.5 * 2.5 + 0.5 * 2.5 / 8, 1 / 8, 0.25 / 8])


@pytest.mark.parametrize("option", OPTIONS)
def test_the_accounts_of_each_option_are_the_formulas_to_the_byte(option: str) -> None:
    config = with_option(option, "float32")
    for plan, ranks in ((Plan("tsp", counted=True), 3), (Plan("tp+sp", "2x2", counted=True, recompute="full"), 4)):
        check(config, ranks, plan)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("schedule", "weights", "tokens"), [
    ("tp", Place(1, 4), Place()), ("sp", Place(), Place(1, 4)), ("tsp", *folded(1, 4)),
    ("tp+sp", Place(1, 2), Place(0, 2))])
def test_the_closed_forms_hold_with_every_option(
    schedule: str, weights: Place, tokens: Place, direction: str
) -> None:
    config = case_config("every option", "float32", num_layers=3)
    grid = Grid(config.blocks, config.tiles, config.tile_len, weights, tokens)
    sent = sum(traffic.elements for (part, way, _), traffic in step_messages(schedule, config, grid).items()
               if part in ("attention", "mlp") and way == direction)
    assert closed_layer(schedule, direction, config, weights, tokens) * config.num_layers == sent
