"""`verify` sees a single wrong bit, wherever it is and whichever rank holds it."""

import numpy as np
import pytest
from cases import case_config, random_text, single_training

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.commands.verify import Judge, compare_step, held_parameters
from tsp_ref.model.parameters import named_views
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

RANKS = 3
SCHEDULES = ("tp", "sp", "tp+sp", "fsdp+sp", "tsp")
CONFIG = case_config("grouped-query", "float32", num_layers=1, blocks=4, num_kv_heads=4, tiles=4, batch_size=1)


def flip(array):
    """Change the last bit of an array's last number."""
    last = (-1,) * array.ndim
    array[last] = np.nextafter(array[last], np.float32(9))


def verdicts_with(plant, schedule="tsp"):
    """The names of what differs in one step on three ranks, when plant(run) has tampered with the last rank's run."""

    def main(comm):
        judge = Judge()
        reference = single_training(CONFIG, random_text()) if comm.rank == 0 else None
        run = Training(CONFIG, comm, Plan(schedule), random_text(), np)
        if comm.rank == comm.size - 1:
            plant(run)
        compare_step(judge, run, reference)
        return {name for name, verdict in judge.verdicts.items() if verdict.different}

    return VirtualWorld(RANKS).run(main)[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_differs_when_nothing_was_planted(schedule):
    assert verdicts_with(lambda run: None, schedule) == set()


@pytest.mark.parametrize("part, name", [
    ("attention", "x"), ("attention", "q"), ("attention", "keys_values"), ("attention", "heads"),
    ("attention", "logsumexp"), ("mlp", "x"), ("mlp", "projected"), ("head", "x"), ("head", "logsumexp")])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_wrong_bit_in_a_kept_activation_is_seen(schedule, part, name):
    def plant(run):
        honest = run.forward

        def forward():
            loss, saved = honest()
            holder = saved.head if part == "head" else getattr(saved, part)[0]
            kept = getattr(holder, name)
            flip((kept[max(kept)] if isinstance(kept, dict) else kept)[-1])  # of the last tile
            return loss, saved

        run.forward = forward

    wanted = f"head.{name}" if part == "head" else f"layers.0.{part}.{name}"
    assert wanted in verdicts_with(plant, schedule)


@pytest.mark.parametrize("name", ["loss", "gradient norm"])
def test_a_number_that_one_rank_has_wrong_is_seen(name):
    def plant(run):
        method = "forward" if name == "loss" else "update"
        honest = getattr(run, method)

        def wrong():
            result = honest()
            return (result[0] + 1e-9, result[1]) if name == "loss" else result + 1e-9

        setattr(run, method, wrong)

    assert verdicts_with(plant) == {name}


@pytest.mark.parametrize("schedule, prefix", [
    ("tsp", "gradient of "), ("tsp", "updated "), ("tsp", "first moment of "), ("tsp", "second moment of "),
    ("tp", "updated "), ("sp", "gradient of "), ("sp", "updated "), ("tp+sp", "first moment of ")])
@pytest.mark.parametrize("tensor", ["embedding", "layers.0.attention", "layers.0.mlp", "head", "gains"])
def test_one_wrong_bit_in_what_is_held_between_steps_is_seen(schedule, prefix, tensor):
    changed = set()

    def plant(run):
        honest = run.update

        def update():
            norm = honest()
            parameters = held_parameters(run)[prefix]
            if tensor == "gains":
                flip(parameters.gains)
                changed.add(f"{prefix}gains")
                return norm
            for field, matrix in named_views(CONFIG, tensor, dict(parameters.tensors())[tensor][-1]).items():
                flip(matrix)
                changed.add(prefix + (tensor if field == "table" else f"{tensor}.{field}"))
            return norm

        run.update = update

    assert verdicts_with(plant, schedule) == changed != set()
