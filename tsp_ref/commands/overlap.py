"""The command `overlap`: how much of the messages' time is hidden under the computation, measured."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..backends.host import HOST, Backend
from ..comm.communicator import Communicator, Event
from ..comm.control import agreed, all_gather, from_root
from ..comm.rehearsal import LocalCopies, replay
from ..errors import UserError
from ..model.config import Config
from ..model.parameters import initial_parameters, zero_parameters
from ..process.terminal import console_for
from ..training.data import TRAINING, Text, batch, load_text
from ..training.strategy import Plan, choose_strategy
from .files import WholeFile
from .timeline import PictureOptions, Pictures


@dataclass(frozen=True)
class OverlapOptions:
    """What the command line asks of `overlap`."""

    config: Config
    plan: Plan
    text: list[str] | None = None
    json_file: str | None = None
    repeats: int = 5
    pictures: PictureOptions = field(default_factory=PictureOptions)


@dataclass(frozen=True)
class Overlap:
    """Medians, in seconds, of the slowest rank's time: messages alone, computation alone, and the step as it is.

    hidden_fraction = (comm + compute - both) / min(comm, compute): 1 if the shorter of the two costs no time at all, 0
    if one comes after the other.
    """

    schedule: str
    part: str
    comm_seconds: float
    compute_seconds: float
    both_seconds: float

    @property
    def hidden_fraction(self) -> float:
        """How much of what can be hidden is."""
        shorter = min(self.comm_seconds, self.compute_seconds)
        return (self.comm_seconds + self.compute_seconds - self.both_seconds) / shorter if shorter else 1.0


class Rehearsed:
    """A step, or its forward, of one plan on this rank, that can be run whole or by halves."""

    def __init__(
        self, comm: Communicator, options: OverlapOptions, text: Text, backward: bool, backend: Backend = HOST
    ) -> None:
        self.comm = comm
        self.backend = backend
        self.backward = backward
        self.whole = self._step(comm, options, text)
        self.computed = self._step(LocalCopies(comm.rank, comm.size, backend.from_host), options, text)
        self.script: list[Event] = []
        comm.script = self.script
        self.whole()
        comm.script = None

    def _step(self, comm: Communicator, options: OverlapOptions, text: Text) -> Callable[[], None]:
        strategy = choose_strategy(options.plan, comm, options.config, self.backend)
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


def overlap(comm: Communicator, options: OverlapOptions, backend: Backend = HOST) -> int:
    """Time messages, computation and both by turns, for a forward and for forward and backward. Returns 0."""
    console = console_for(comm.rank)
    text, pictures, file = agreed(comm, lambda: _prepare(comm, options, backend))
    found = []
    for part, backward in (("forward", False), ("forward+backward", True)):
        step = Rehearsed(comm, options, text, backward, backend)
        runs = (step.messages, step.computed, step.whole)
        seconds: list[list[float]] = [[], [], []]
        for number in range(options.repeats):
            console.print(f"{part}, round {number + 1}/{options.repeats}", highlight=False)
            for taken, run in zip(seconds, runs):
                taken.append(_slowest(comm, run, backend))
        found.append(Overlap(str(options.plan), part, *map(median, seconds)))
    with pictures.recording():
        step.whole()
    pictures.collect()
    console.print(_table(found))
    pictures.draw(console, f"forward and backward of {options.plan}")
    rows = [dataclasses.asdict(row) | {"hidden_fraction": row.hidden_fraction} for row in found]
    file.write(json.dumps(rows, indent=1))
    return 0


def _prepare(
    comm: Communicator, options: OverlapOptions, backend: Backend
) -> tuple[Text, Pictures, WholeFile]:
    """All that can be refused, before anything is timed."""
    if options.plan.schedule == "single":
        raise UserError("--schedule single sends no messages: use one of tp, sp, tp+sp, tsp")
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats} is not valid: use 1 or more")
    choose_strategy(options.plan, comm, options.config, backend)
    file = WholeFile("--json", options.json_file if comm.rank == 0 else None)
    return load_text(options.text, options.config), Pictures(comm, options.pictures, options.plan.schedule), file


def _slowest(comm: Communicator, run: Callable[[], None], backend: Backend) -> float:
    """The time of the slowest rank, when all have begun together, until all that was launched is done."""
    backend.synchronise()
    from_root(comm, 0)
    begin = time.perf_counter()
    run()
    backend.synchronise()
    mine = np.array([time.perf_counter() - begin])
    return max(float(row[0]) for row in all_gather(comm, mine))


def _table(rows: list[Overlap]) -> Table:
    table = Table(title="What is hidden", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("schedule", "of", "messages", "computation", "both", "messages / computation", "hidden"):
        table.add_column(heading, justify="left" if heading in ("schedule", "of") else "right", no_wrap=True)
    for row in rows:
        ratio = row.comm_seconds / row.compute_seconds
        table.add_row(row.schedule, row.part, *(f"{1e3 * value:.1f} ms" for value in (
            row.comm_seconds, row.compute_seconds, row.both_seconds)), f"{ratio:.2f}", f"{row.hidden_fraction:.0%}")
    return table
