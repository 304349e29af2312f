"""Virtual ranks with clocks: what a message, a wait and a computation cost can be worked out by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import case_config, digest_after, random_text, single_digest

from tsp_ref.comm.virtual_time import TimedCommunicator, TimedWorld
from tsp_ref.errors import MessageError
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan


class Worker:
    """A rank's computation, in seconds."""

    def __init__(self, comm: TimedCommunicator) -> None:
        self.comm, self.seconds = comm, 0.0
        comm.work = lambda: self.seconds

    def compute(self, seconds: float) -> None:
        """So many more."""
        self.seconds += seconds


def clocks(world: TimedWorld, main: Callable[[Any, Worker], None]) -> list[float]:
    """Run main(comm, worker) on every rank; the clocks at its end."""

    def rank(comm: Any) -> float:
        main(comm, Worker(comm))
        comm.tick()
        comm.finish()
        return comm.clock

    return world.run(rank)


def numbers(size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.uint8)


def test_a_message_takes_its_bytes_over_the_bandwidth_and_the_latency_from_the_later_of_both_posts() -> None:
    def main(comm: Any, worker: Worker) -> None:
        worker.compute(3.0 if comm.rank else 1.0)
        comm.Wait(comm.Irecv(numbers(100), 0, 1) if comm.rank else comm.Isend(numbers(100), 1, 1))

    assert clocks(TimedWorld(2, bandwidth=50.0, latency=0.5), main) == [5.0, 5.5]


def test_a_message_travels_under_a_computation_and_what_is_hidden_costs_nothing() -> None:
    def main(comm: Any, worker: Worker) -> None:
        request = comm.Irecv(numbers(100), 0, 1) if comm.rank else comm.Isend(numbers(100), 1, 1)
        worker.compute(7.0 if comm.rank else 1.5)
        comm.Wait(request)

    assert clocks(TimedWorld(2, bandwidth=50.0), main) == [2.0, 7.0]


def test_messages_of_one_link_go_one_after_the_other_and_those_of_two_links_at_once() -> None:
    def main(comm: Any, worker: Worker) -> None:
        if comm.rank == 0:
            comm.Waitall([comm.Isend(numbers(100), peer, 1) for peer in (1, 1, 2)])
        elif comm.rank == 1:
            comm.Waitall([comm.Irecv(numbers(100), 0, 1) for _ in range(2)])
        else:
            comm.Wait(comm.Irecv(numbers(100), 0, 1))

    assert clocks(TimedWorld(3, bandwidth=100.0), main) == [2.0, 2.0, 1.0]


def test_what_arrives_first_in_virtual_time_is_waited_for_first_whatever_the_order_of_the_requests() -> None:
    order = []

    def main(comm: Any, worker: Worker) -> None:
        if comm.rank == 0:
            requests = [comm.Irecv(numbers(10), 1, 1), comm.Irecv(numbers(10), 2, 1)]
            while requests:
                request = requests.pop(comm.Waitany(requests))
                order.append((request.peer, comm.clock))
        else:
            worker.compute(9.0 / comm.rank)
            comm.Wait(comm.Isend(numbers(10), 0, 1))

    clocks(TimedWorld(3, bandwidth=10.0), main)
    assert order == [(2, 5.5), (1, 10.0)]


def test_whether_a_message_is_there_is_answered_as_of_the_ranks_own_moment() -> None:
    seen = []

    def main(comm: Any, worker: Worker) -> None:
        if comm.rank:
            request = comm.Irecv(numbers(10), 0, 1)
            for _ in range(3):
                worker.compute(0.4)
                seen.append(comm.Test(request))
            comm.Wait(request)
        else:
            comm.Wait(comm.Isend(numbers(10), 1, 1))

    clocks(TimedWorld(2, bandwidth=10.0), main)
    assert seen == [False, False, True]


def test_a_deadlock_is_named_not_waited_for() -> None:
    with pytest.raises(MessageError, match=r"deadlock, every rank waits: .*tag 7"):
        clocks(TimedWorld(2), lambda comm, worker: comm.Wait(comm.Irecv(numbers(1), 1 - comm.rank, 7)))


def test_jitter_lengthens_a_computation_by_up_to_its_part_alike_for_one_seed() -> None:
    def main(comm: Any, worker: Worker) -> None:
        worker.compute(1.0)

    found = [clocks(TimedWorld(2, jitter=0.2, seed=seed), main) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert all(1.0 < clock < 1.2 for row in found for clock in row)


@pytest.mark.parametrize("schedule", ["tp", "sp", "tp+sp", "fsdp+sp", "tsp"])
def test_clocks_change_no_bit(schedule: str) -> None:
    config = case_config("plain", "float32", num_layers=1)
    found = TimedWorld(4, bandwidth=1e6, jitter=0.3).run(
        lambda comm: digest_after(config, Plan(schedule), comm, steps=1))
    assert found[0] == single_digest(config, steps=1)


def step_seconds(plan: Plan, bandwidth: float, rate: float) -> float:
    """The slowest rank's clock after a forward and a backward on 4 ranks."""
    config = case_config("plain", "float32", num_layers=1)

    def rank(comm: Any) -> float:
        training = Training(config, comm, plan, random_text(), np)
        comm.work = lambda: training.model.work.total / rate
        _, saved = training.forward()
        training.strategy.backward(saved, training.weights, training.gradients)
        comm.tick()
        return comm.clock

    return max(TimedWorld(4, bandwidth).run(rank))


def test_a_step_takes_no_less_than_its_messages_or_its_computation_alone_and_no_more_than_both() -> None:
    plan = Plan("tsp", counted=True)
    messages, computation = step_seconds(plan, 1e6, math.inf), step_seconds(plan, math.inf, 1e8)
    both = step_seconds(plan, 1e6, 1e8)
    assert messages > 0 < computation
    assert max(messages, computation) <= both < messages + computation
