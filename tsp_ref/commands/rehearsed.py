"""A step that can be run whole or by halves, timed on all ranks, and a link on which its halves can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from ..backends.host import HOST, Backend
from ..comm.clocks import recording
from ..comm.communicator import Communicator, Event
from ..comm.control import all_gather, from_root
from ..comm.link import bandwidth_for, describe_link, parse_link
from ..comm.rehearsal import LocalCopies, busiest, replay
from ..comm.timeline import Timeline
from ..model.config import Config
from ..model.parameters import initial_parameters, zero_parameters
from ..training.data import TRAINING, Text, batch
from ..training.strategy import Plan, choose_strategy
from .rounds import Round

LATENCY = 50e-6  # seconds, of a link that is chosen: as a network within a room has it
TIMES = 3  # that a half is timed before the link is chosen; the first is slower, so the median and not the mean
TRIES = 4  # links, at most
NEAR = 0.15  # a part of the messages' time by which it may miss what was asked for


class Rehearsed:
    """A step, or its forward, of one plan on this rank. What is timed is timed by all ranks at once."""

    def __init__(
        self, comm: Communicator, config: Config, plan: Plan, text: Text, backward: bool, backend: Backend = HOST
    ) -> None:
        self.comm = comm
        self.backend = backend
        self.backward = backward
        self.whole = self._step(comm, config, plan, text)
        self.computed = self._step(LocalCopies(comm.rank, comm.size, backend.from_host), config, plan, text)
        self.script: list[Event] = []
        comm.script = self.script
        self.whole()
        comm.script = None

    def _step(self, comm: Communicator, config: Config, plan: Plan, text: Text) -> Callable[[], None]:
        strategy = choose_strategy(plan, comm, config, self.backend)
        weights, gradients = initial_parameters(strategy.model), zero_parameters(strategy.model, "gradients")
        tokens, targets = batch(strategy.model, text, TRAINING, 0)

        def step() -> None:
            with np.errstate(all="ignore"):  # without messages, what is computed means nothing
                _, saved = strategy.forward(weights, tokens, targets)
                if self.backward:
                    strategy.backward(saved, weights, gradients)

        return step

    def messages(self) -> None:
        """The messages alone."""
        replay(self.comm, self.script, self.backend.xp)

    def slowest(self, run: Callable[[], None]) -> float:
        """The seconds of the slowest rank, when all have begun together, until all that was launched is done."""
        self.backend.synchronise()
        from_root(self.comm, 0)
        begin = time.perf_counter()
        run()
        self.backend.synchronise()
        return max(self._of_all(time.perf_counter() - begin))

    def round(self) -> Round:
        """Messages, computation and both, one after the other, and the waits in the last; the same on every rank."""
        comm, compute = self.slowest(self.messages), self.slowest(self.computed)
        timelines: list[Timeline] = []

        def recorded() -> None:
            with recording(self.comm) as timeline:
                self.whole()
            timelines.append(timeline)

        both = self.slowest(recorded)
        exposed = self._of_all(timelines[0].lane(self.comm.rank).seconds("wait"))
        return Round(comm, compute, both, sum(exposed) / len(exposed))

    def _of_all(self, mine: float) -> list[float]:
        """A number of every rank's, on every rank."""
        # The dtype is said because MPI carries none: one rank's whole number would be read as another's float.
        return [float(row[0]) for row in all_gather(self.comm, np.array([mine], dtype=np.float64))]

    def choose_link(self, ratio: float, shared: bool) -> str | None:
        """Put the messages on a link on which alone they take `ratio` of the computation's time, and return its
        description, with which `--link` makes the same; None, and no link, where nothing is sent.

        The first guess is the busiest link's bytes over the time. Messages also wait for one another and are copied,
        so they are then sent without the computation, and the guess is corrected by what they took.
        """
        size = int(max(self._of_all(busiest(self.script, shared))))
        if size == 0:
            return None
        wanted = ratio * median(self.slowest(self.computed) for _ in range(TIMES))
        bandwidth, taken = bandwidth_for(size, wanted), 0.0
        for _ in range(TRIES):
            if taken:
                bandwidth = bandwidth_for(size, wanted, bandwidth, taken)
            # Every rank has the same numbers; one that calculates otherwise must not have a link of its own.
            text = describe_link(from_root(self.comm, int(bandwidth)), LATENCY)
            self.comm.link = link = parse_link(text, shared)
            bandwidth = link.bandwidth
            taken = median(self.slowest(self.messages) for _ in range(TIMES))
            if abs(taken - wanted) <= NEAR * wanted:
                break
        return text
