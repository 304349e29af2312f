"""AdamW on blocks, against the textbook's on one flat array; warm-up, cosine, clipping."""

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest

from tsp_ref.grid.grid import folded
from tsp_ref.model.config import Config, make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, initial_parameters, zero_parameters
from tsp_ref.training.optimizer import AdamW, clip_factor, learning_rate

STEPS = 5


def config_of(dtype: str = "float64", **overrides: object) -> Config:
    return make_config("tiny", dtype=dtype, warmup_steps=8, weight_decay=0.3, **overrides)


def arrays(parameters: Parameters) -> list[np.ndarray]:
    return [*(tensor for _, tensor in parameters.tensors()), parameters.gains]


def flat(parameters: Parameters) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays(parameters)])


def random_gradients(model: Model, step: int) -> Parameters:
    """Keyed by tensor and step and cut to the rank's blocks, so that any number of ranks is given the same."""
    gradients = zero_parameters(model, "gradients")
    owned = model.grid.blocks
    for number, (_, tensor) in enumerate(gradients.tensors()):
        whole = (model.config.blocks, *tensor.shape[1:])
        tensor[...] = draw([step, number], whole, model.config.dtype)[owned.start : owned.stop]
    gradients.gains[...] = draw([step, 1000], gradients.gains.shape, model.config.dtype)
    return gradients


def draw(seed: list[int], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=dtype)


def trained(model: Model, factor: float = 1.0, gradients: list[Parameters] | None = None) -> tuple[Parameters, AdamW]:
    """The weights after five steps, and their optimizer."""
    weights, optimizer = initial_parameters(model), AdamW(model)
    for step in range(STEPS):
        optimizer.update(weights, gradients[step] if gradients else random_gradients(model, step), step, factor)
    return weights, optimizer


def textbook(
    config: Config, weights: np.ndarray, decayed: np.ndarray, gradients: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Weights, m and v after Adam with decoupled decay, all of it in the warm-up. decayed: 1 where decay applies."""
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    for t, g in enumerate(gradients, start=1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        rate = config.learning_rate * t / config.warmup_steps
        decay = config.weight_decay * decayed * weights
        weights = weights - rate * (m_hat / (np.sqrt(v_hat) + config.adam_eps) + decay)
    yield from (weights, m, v)


@pytest.mark.parametrize("constants", [{}, dict(beta1=0.8, beta2=0.99, adam_eps=1e-3)], ids=["default", "others"])
@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.parametrize("tied", [False, True])
def test_five_steps_are_the_textbooks(tied: bool, factor: float, constants: dict[str, float]) -> None:
    model = Model(config_of(tied_head=tied, **constants), np)
    start = flat(initial_parameters(model))
    decayed = np.ones_like(start)
    decayed[-initial_parameters(model).gains.size :] = 0.0
    weights, optimizer = trained(model, factor)
    gradients = [factor * flat(random_gradients(model, step)) for step in range(STEPS)]
    wanted = textbook(model.config, start, decayed, gradients)
    for found, other in zip((weights, optimizer.first, optimizer.second), wanted):
        np.testing.assert_allclose(flat(found), other, rtol=1e-12, atol=1e-15)


def test_an_update_leaves_the_gradients_as_they_are() -> None:
    model = Model(config_of(), np)
    gradients = [random_gradients(model, step) for step in range(STEPS)]
    before = copy.deepcopy(gradients)
    trained(model, 0.5, gradients)
    assert all(flat(now).tobytes() == flat(then).tobytes() for now, then in zip(gradients, before))


def test_decay_shrinks_matrices_and_leaves_gains_alone() -> None:
    model = Model(config_of(), np)
    weights, before = initial_parameters(model), initial_parameters(model)
    AdamW(model).update(weights, zero_parameters(model, "gradients"), 0, 1.0)
    kept = 1.0 - learning_rate(model.config, 0) * model.config.weight_decay
    assert kept < 1.0
    for (_, now), (_, then) in zip(weights.tensors(), before.tensors()):
        assert now.tobytes() == (then * kept).tobytes()
    assert weights.gains.tobytes() == before.gains.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_blocks_of_any_partition_get_the_same_bits(size: int, dtype: str) -> None:
    config = config_of(dtype)
    whole = trained(Model(config, np), 0.37)
    parts = [trained(Model(config, np, *folded(rank, size)), 0.37) for rank in range(size)]
    for pick in (lambda run: run[0], lambda run: run[1].first, lambda run: run[1].second):
        for number, (name, tensor) in enumerate(pick(whole).tensors()):
            dealt = np.concatenate([arrays(pick(part))[number] for part in parts])
            assert dealt.tobytes() == tensor.tobytes(), name
        assert {pick(part).gains.tobytes() for part in parts} == {pick(whole).gains.tobytes()}


def test_a_float32_run_stays_in_float32() -> None:
    weights, optimizer = trained(Model(config_of("float32"), np), 0.37)
    for parameters in (weights, optimizer.first, optimizer.second):
        assert {array.dtype for array in arrays(parameters)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0])
def test_gradients_within_the_norm_are_not_clipped(norm: float) -> None:
    assert clip_factor(Config(clip_norm=1.0), norm) == 1.0


def test_gradients_beyond_the_norm_are_scaled_to_it() -> None:
    assert clip_factor(Config(clip_norm=1.0), 4.0) == 0.25
    assert clip_factor(Config(clip_norm=0.5), 4.0) == 0.125


def test_a_clip_norm_of_zero_turns_clipping_off() -> None:
    assert clip_factor(Config(clip_norm=0.0), 1e9) == 1.0


def test_the_rate_warms_up_in_a_line_to_its_peak() -> None:
    config = Config(learning_rate=8e-3, warmup_steps=8, steps=20)
    assert [learning_rate(config, step) for step in range(8)] == [1e-3 * step for step in range(1, 9)]


def test_the_rate_begins_at_its_peak_without_a_warm_up() -> None:
    assert learning_rate(Config(warmup_steps=0), 0) == Config().learning_rate


def test_the_rate_falls_to_its_minimum_at_the_last_step() -> None:
    config = Config(steps=60, warmup_steps=10)
    rates = [learning_rate(config, step) for step in range(9, 60)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(config.final_rate * config.learning_rate, rel=1e-12)


@pytest.mark.parametrize(("steps", "warmup"), [(2, 1), (11, 10), (1, 0), (3, 1)])
def test_the_last_step_after_a_warm_up_is_at_the_final_rate_however_short_the_fall(steps: int, warmup: int) -> None:
    config = Config(steps=steps, warmup_steps=warmup, learning_rate=1.0, final_rate=0.1)
    assert learning_rate(config, steps - 1) == pytest.approx(0.1, rel=1e-12)


def test_the_rate_does_not_fall_within_the_warm_up() -> None:
    config = Config(steps=3, warmup_steps=3, learning_rate=3.0, final_rate=0.1)
    assert [learning_rate(config, step) for step in range(3)] == [1.0, 2.0, 3.0]


def test_the_rate_falls_as_half_a_cosine() -> None:
    """Slowly, quickly, slowly: the difference to the middle is odd around it."""
    config = Config(steps=1_000_000, warmup_steps=0)
    middle = (config.learning_rate + config.final_rate * config.learning_rate) / 2
    high = (config.learning_rate - config.final_rate * config.learning_rate) / 2
    for share in (0.25, 0.5, 0.75):
        wanted = middle + high * math.cos(math.pi * share)
        assert learning_rate(config, round(share * 1_000_000)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (3, 10)])
def test_the_rate_is_above_zero_and_never_beyond_its_peak_in_the_shortest_runs(steps: int, warmup: int) -> None:
    config = Config(steps=steps, warmup_steps=warmup)
    assert all(0 < learning_rate(config, step) <= config.learning_rate for step in range(steps))
