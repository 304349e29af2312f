"""Who helps messages on, a slow link, random delays, synchronous sends: no bit changes, and nothing ever hangs."""

import random
import sys

import numpy as np
import pytest
from cases import case_config, random_text, single_digest

from tsp_ref.comm.communicator import PROGRESS
from tsp_ref.comm.link import Link
from tsp_ref.comm.mpi import MPICommunicator
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

SCHEDULES = ("tp", "sp", "tp+sp", "tsp")
CONFIG = case_config("grouped-query", "float32", num_layers=1, hidden_size=32, batch_size=1)
SMALLEST = case_config("grouped-query", "float32", num_layers=1, hidden_size=16, num_heads=8, num_kv_heads=4,
                       ffn_size=16, seq_len=8, batch_size=1, blocks=4, tiles=4)  # of four ranks


class RandomDelays(Link):
    """A link on which every message takes another time."""

    def __init__(self, seed):
        super().__init__(1e9)
        self.random = random.Random(seed)

    def through(self, verb, peer, size, now):
        """A random time from now, up to a third of a millisecond, most often none."""
        return super().through(verb, peer, size, now) + self.random.choice((0.0, 0.0, 0.0, 3e-4)) * self.random.random()


def step_digest(comm, schedule, config=CONFIG):
    """The digest after one training step; what it is made of is collected in the usual way."""
    training = Training(config, comm, Plan(schedule), random_text(), np)
    training.step()
    comm.travel_by("wait", None)
    return digest(training)


def wanted(comm, config=CONFIG):
    """The single process's, on rank 0."""
    return "" if comm.rank else single_digest(config, steps=1)


@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(2, 3, 4)
def test_every_way_of_progress_over_a_slow_link_gives_the_same_bits(comm, schedule, progress):
    comm.travel_by(progress, Link(100e6, 50e-6))
    assert step_digest(comm, schedule) == wanted(comm)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(4)
def test_fifty_runs_with_random_delays_each_give_the_same_bits(comm, schedule):
    """Fifty for each schedule."""
    truth = wanted(comm, SMALLEST)
    for seed in range(50):
        comm.travel_by(PROGRESS[seed % 2], RandomDelays(4 * seed + comm.rank))
        assert step_digest(comm, schedule, SMALLEST) == truth, f"seed {seed}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(2, 3, 4, 8)
def test_nothing_relies_on_a_send_that_completes_before_its_receive(comm, schedule):
    synchronous = MPICommunicator(sys.modules["mpi4py.MPI"], synchronous=True)
    assert step_digest(synchronous, schedule) == wanted(comm)
    synchronous.finish()
