"""Bitwise: TSP on virtual ranks against the single process, whatever the order in which messages arrive."""

import numpy as np
import pytest
from cases import CASES, case_config, random_text, single_training

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.commands.verify import Judge, compare_step
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan


def tsp_digest(config, ranks, seed, steps):
    """The digest of a TSP run on virtual ranks."""

    def main(comm):
        training = Training(config, comm, Plan("tsp"), random_text(), np)
        for _ in range(steps):
            training.step()
        text = digest(training)
        comm.finish()
        return text

    return VirtualWorld(ranks, seed).run(main)[0]


def single_digest(config, steps):
    """The digest of the single process."""
    training = single_training(config, random_text())
    for _ in range(steps):
        training.step()
    return digest(training)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_five_steps_on_virtual_ranks_have_the_digest_of_the_single_process(case, ranks, dtype):
    config = case_config(case, dtype)
    assert tsp_digest(config, ranks, seed=ranks, steps=5) == single_digest(config, steps=5)


def test_a_hundred_random_orders_of_arrival_change_no_bit():
    config = case_config("grouped-query", "float32", num_layers=1, blocks=4, num_kv_heads=4, tiles=8)
    wanted = single_digest(config, steps=1)
    for seed in range(100):
        assert tsp_digest(config, ranks=4, seed=seed, steps=1) == wanted, f"seed {seed}"


def test_every_tensor_of_three_virtual_ranks_is_the_single_process_s():
    config = case_config("nine blocks, eleven tiles", "float32")

    def main(comm):
        judge = Judge()
        reference = single_training(config, random_text()) if comm.rank == 0 else None
        run = Training(config, comm, Plan("tsp"), random_text(), np)
        for _ in range(2):
            compare_step(judge, run, reference)
        return judge.verdicts

    verdicts = VirtualWorld(3, seed=2).run(main)[0]
    assert len(verdicts) > 40
    assert {name: verdict.first for name, verdict in verdicts.items() if verdict.different} == {}


def test_other_seeds_text_or_sizes_give_other_digests():
    config = case_config("plain", "float32")
    digests = {single_digest(other, steps=2) for other in (
        config, case_config("plain", "float32", seed=1), case_config("plain", "float32", learning_rate=1e-3),
        case_config("plain", "float32", blocks=4), case_config("plain", "float64"))}
    assert len(digests) == 5
