"""What a model may be: presets, and the refusal of everything impossible, in words that a user can act on."""

import dataclasses
import math
import re

import numpy as np
import pytest

from tsp_ref.errors import UserError
from tsp_ref.grid.grid import ALONE, Place, folded
from tsp_ref.model.config import PLANNING_ONLY, PRESETS, Config, make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import initial_parameters

DEALT_EVENLY = {"tiny": 8, "small": 8, "bench": 2}
MULTIPLES = [("hidden_size", "num_heads"), ("num_heads", "num_kv_heads"), ("num_kv_heads", "blocks"),
             ("ffn_size", "blocks"), ("seq_len", "tiles")]
SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "seq_len", "blocks",
         "tiles", "batch_size", "steps", "validation_batches")


def refusal(preset: str = "small", settings: tuple[str, ...] = (), **overrides: object) -> str:
    with pytest.raises(UserError) as caught:
        make_config(preset, list(settings), **overrides)
    return str(caught.value)


def broken_rules(sizes: dict[str, int]) -> list[str]:
    """The rules of shape, said once more and apart from the product: which field breaks one."""
    broken = [name for name, divisor in MULTIPLES if sizes[name] % sizes[divisor]]
    rows = math.ceil(sizes["vocab_size"] / sizes["blocks"])
    broken += ["vocab_size"] * (math.ceil(sizes["vocab_size"] / rows) < sizes["blocks"])
    whole_heads = sizes["hidden_size"] % sizes["num_heads"] == 0
    return broken + ["head"] * (whole_heads and sizes["hidden_size"] // sizes["num_heads"] % 2)


def shape(config: Config) -> dict[str, int]:
    return {name: getattr(config, name) for name in SIZES}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset: str) -> None:
    assert broken_rules(shape(make_config(preset))) == []
    assert make_config(preset).vocab_size >= 256


@pytest.mark.parametrize(("preset", "ranks"), DEALT_EVENLY.items())
def test_every_preset_of_ours_that_runs_can_be_dealt_evenly_to_eight_ranks_and_bench_to_two(
    preset: str, ranks: int
) -> None:
    config = make_config(preset)
    for rank in range(ranks):
        model = Model(config, np, *folded(rank, ranks))
        assert len(model.grid.blocks) == config.blocks // ranks
        assert len(model.grid.slots) == config.tiles // ranks
        assert model.rotary.shape == (config.tiles // ranks, 2, config.tile_len, config.head_dim)


def test_the_largest_model_is_for_planning_only_and_has_the_papers_size() -> None:
    assert PLANNING_ONLY[-1] == "7b"
    h, f, layers, vocabulary = 4096, 16384, 32, 32000
    attention, mlp, two_norms = 4 * h * h, 3 * h * f, 2 * h
    total = vocabulary * h + layers * (attention + mlp + two_norms) + h + vocabulary * h
    assert make_config("7b").num_parameters == total == 8_852_344_832


def test_a_field_without_a_preset_or_setting_keeps_its_default() -> None:
    assert make_config("small") == make_config() == Config()


def test_settings_are_laid_over_the_preset_and_overrides_over_the_settings() -> None:
    config = make_config("tiny", ["steps=7", "seed=3", "learning_rate=1e-4", "tied_head=True", "dtype=float64"], seed=5)
    assert (config.steps, config.seed, config.learning_rate) == (7, 5, 1e-4)
    assert (config.tied_head, config.dtype) == (True, "float64")
    assert config.hidden_size == PRESETS["tiny"]["hidden_size"]


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("False", False), ("0", False)])
def test_a_truth_value_is_read_from_its_text(text: str, value: bool) -> None:
    assert make_config(settings=[f"tied_head={text}"]).tied_head is value


@pytest.mark.parametrize(("field", "value", "remedy"), [
    ("num_heads", 48, "use 96 "),
    ("num_kv_heads", 32, "use 32 for num_heads, or another num_kv_heads"),
    ("num_kv_heads", 4, "use 8 for num_kv_heads, or another blocks"),
    ("blocks", 16, "use 16 for num_kv_heads, or another blocks"),
    ("ffn_size", 100, "use 96 or 104 for ffn_size, or another blocks"),
    ("vocab_size", 9, "use 8 or 15 for vocab_size, or fewer blocks"),
    ("head_dim", 7, "use an even number"),
    ("head_dim", -2, "use 0 or more"),
    ("rope_factor", 0.5, "use a finite number of at least 1"),
    ("rope_low_freq_factor", 0.0, "use a finite number above 0"),
    ("rope_high_freq_factor", 1.0, "use a finite number above rope_low_freq_factor=1.0"),
    ("rope_original_length", 0, "use a whole number of at least 1"),
    ("seq_len", 250, "use 240 or 256 for seq_len, or another tiles"),
    ("tiles", 48, "use 240 or 288 for seq_len, or another tiles"),
    ("hidden_size", 48, "use a multiple of 32"),
    ("hidden_size", 16, "use a multiple of 32"),
    ("dtype", "float16", "use float32 or float64"),
    ("dtype", "", "use float32 or float64"),
    ("warmup_steps", -1, "use 0 or more"),
    ("seed", -1, "use 0 or more"),
    ("beta1", 1.0, "use a number from 0 up to, not including, 1"),
    ("beta2", -0.5, "use a number from 0 up to, not including, 1"),
    ("beta2", math.nan, "use a number from 0 up to, not including, 1"),
    ("rope_theta", 0.0, "use a finite number above 0"),
    ("norm_eps", 0.0, "use a finite number above 0"),
    ("adam_eps", -1e-8, "use a finite number above 0"),
    ("learning_rate", math.nan, "use a finite number above 0"),
    ("learning_rate", math.inf, "use a finite number above 0"),
    ("final_rate", 1.5, "use a number from 0 to 1"),
    ("weight_decay", -0.1, "use a finite number, 0 or more"),
    ("clip_norm", math.nan, "use a finite number, 0 or more"),
])
def test_an_impossible_value_is_refused_by_field_value_and_remedy(field: str, value: object, remedy: str) -> None:
    for message in (refusal(**{field: value}), refusal(settings=(f"{field}={value}",))):
        assert f"{field}={value}" in message
        assert remedy in message
        assert "\n" not in message


@pytest.mark.parametrize("value", [0, -8])
@pytest.mark.parametrize("field", SIZES)
def test_a_size_below_one_is_refused(field: str, value: int) -> None:
    assert refusal(**{field: value}) == f"{field}={value} is not valid: use a whole number of at least 1"


@pytest.mark.parametrize(("setting", "message"), [
    ("steps", "--set steps is not of the form field=value, for example hidden_size=64"),
    ("steps=ten", "steps=ten is not valid: use a whole number"),
    ("steps=2.5", "steps=2.5 is not valid: use a whole number"),
    ("steps=", "steps= is not valid: use a whole number"),
    ("learning_rate=fast", "learning_rate=fast is not valid: use a number"),
    ("tied_head=yes", "tied_head=yes is not valid: use true or false"),
])
def test_a_setting_that_cannot_be_read_is_refused(setting: str, message: str) -> None:
    assert refusal(settings=(setting,)) == message


@pytest.mark.parametrize("field", ["width", "", "Steps", "group_size"])
def test_an_unknown_field_is_refused_with_all_that_are_known(field: str) -> None:
    message = refusal(settings=(f"{field}=3",))
    assert message.startswith(f"field {field} is unknown")
    assert all(item.name in message for item in dataclasses.fields(Config))


def test_an_unknown_preset_is_refused_with_all_that_are_known() -> None:
    assert refusal("huge") == "preset=huge is unknown: use one of " + ", ".join(PRESETS)


@pytest.mark.parametrize(("field", "value"), [
    ("hidden_size", 128.0), ("steps", 2.5), ("steps", "3"), ("learning_rate", "1e-3"), ("tied_head", "no")])
def test_a_value_of_another_type_than_the_fields_is_refused(field: str, value: object) -> None:
    assert f"{field}={value}" in refusal(**{field: value})


@pytest.mark.parametrize(("blocks", "tiles"), [(8, 16), (8, 4), (2, 2), (1, 16)])
def test_every_rank_on_an_axis_needs_a_block_or_a_tile(blocks: int, tiles: int) -> None:
    config = Config(blocks=blocks, tiles=tiles)
    for size in range(1, 20):
        for axes, field, most in (((Place(size - 1, size), ALONE), "blocks", blocks),
                                  ((ALONE, Place(size - 1, size)), "tiles", tiles)):
            if size <= most:
                Model(config, np, *axes)
            else:
                with pytest.raises(UserError, match=rf"^ranks={size} .* {field}={most}, .*; use 1 to {most} ranks, or"):
                    Model(config, np, *axes)
    assert config.max_ranks == min(blocks, tiles)


def test_a_shape_is_accepted_exactly_when_all_rules_hold() -> None:
    random = np.random.default_rng(0)
    accepted = 0
    for _ in range(3000):
        chosen = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 16, "vocab_size": 16, "seq_len": 16,
                  "blocks": 2, "tiles": 4}
        for name in random.choice(list(chosen), size=3, replace=False):
            chosen[str(name)] = int(random.choice([1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48]))
        if broken_rules(chosen):
            refusal(**chosen)
        else:
            make_config(**chosen)
            accepted += 1
    assert 200 < accepted < 2800


@pytest.mark.parametrize("field", [
    "hidden_size", "ffn_size", "vocab_size", "seq_len", "num_kv_heads", "tiles", "blocks"])
def test_every_value_that_a_refusal_suggests_is_valid(field: str) -> None:
    """Of all configurations that break one rule by one field."""
    wrong, tried = [], 0
    for value in range(1, 300):
        if len(broken_rules(shape(Config()) | {field: value})) != 1:
            continue
        message = refusal(**{field: value})
        named = re.search(r"use (\d+)(?: or (\d+))? for (\w+)", message)
        multiple = re.search(r"use a multiple of (\d+)", message)
        assert (named is None) != (multiple is None), message
        name = named[3] if named else field
        for text in named.groups()[:2] if named else multiple.groups():
            tried += text is not None
            if text is not None and broken_rules(shape(Config()) | {field: value, name: int(text)}):
                wrong.append(message)
    assert tried > 0
    assert wrong == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_number_of_parameters_is_that_of_the_initial_weights(preset: str, tied: bool) -> None:
    config = make_config(preset, tied_head=tied)
    weights = initial_parameters(Model(config, np))
    assert (weights.head is None) is tied
    assert config.num_parameters == sum(tensor.size for _, tensor in weights.tensors()) + weights.gains.size


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [3, 8])
def test_all_ranks_together_hold_every_parameter_once(ranks: int, tied: bool) -> None:
    config = make_config("tiny", tied_head=tied)
    held = [initial_parameters(Model(config, np, *folded(rank, ranks))) for rank in range(ranks)]
    gains = held[0].gains.size
    assert config.num_parameters == gains + sum(tensor.size for part in held for _, tensor in part.tensors())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_initial_weights_depend_on_the_seed_and_the_block_but_not_on_the_rank(dtype: str) -> None:
    config = make_config("tiny", dtype=dtype)
    whole = dict(initial_parameters(Model(config, np)).tensors())
    model = Model(config, np, *folded(1, 3))
    for name, part in initial_parameters(model).tensors():
        assert part.dtype == dtype
        assert part.tobytes() == whole[name][model.grid.blocks.start : model.grid.blocks.stop].tobytes()
    assert len({block.tobytes() for tensor in whole.values() for block in tensor}) == len(whole) * config.blocks
    other = dict(initial_parameters(Model(dataclasses.replace(config, seed=1), np)).tensors())
    assert all(not np.array_equal(whole[name], other[name]) for name in whole)
