"""The command `overlap`: how much of the messages' time is hidden under the computation, measured in two ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..backends.host import HOST, Backend
from ..comm.communicator import Communicator
from ..comm.control import agreed, all_gather
from ..comm.mpi import cores
from ..errors import UserError
from ..model.config import Config
from ..process.room import require_room
from ..process.terminal import console_for
from ..training.data import Text, load_text, require_same_text
from ..training.strategy import Plan, choose_strategy
from .files import WholeFile, require_different, write_all
from .rehearsed import Rehearsed
from .rounds import NOISY, Overlap, Spread, Verdict
from .timeline import PictureOptions, Pictures

MODEL = ("bench", ["blocks=4", "num_layers=2"])
"""The model that is timed by default, a preset and what is set over it, chosen by measurement on 2 cores. Large enough:
a forward and backward takes more than a second, of which posting and looking are little. Four blocks give each of two
ranks two, so that one travels while it computes with the other; with two blocks of the whole size less can be hidden.
Two layers, and no more: every round runs them three times."""

RATIO = 0.5  # of messages to computation: messages that could all be hidden, and are too long to be overlooked
ROUNDS = 5  # after which a part whose rounds agree is done
REPEATS = 9  # rounds, at most

NOISE = """\
Too noisy to tell: the rounds contradict each other, as they do where other programs use the same cores. Try again when
the machine is quiet, with more --repeats, or with a larger model (--set batch_size=2)."""

TRY = "mpirun -n 2 python -m tsp_ref overlap"


@dataclass(frozen=True)
class OverlapOptions:
    """What the command line asks of `overlap`.

    link   the description of the link that messages are on; None: one is chosen, on which they take `ratio` of the
           computation's time; "none": the machine's own
    ratio  None: RATIO
    """

    config: Config
    plan: Plan
    text: list[str] | None = None
    json_file: str | None = None
    repeats: int = REPEATS
    link: str | None = None
    link_shared: bool = False
    ratio: float | None = None
    pictures: PictureOptions = field(default_factory=PictureOptions)


@dataclass(frozen=True)
class Obstacle:
    """Why nothing can be told of overlap, in a few words and in full, with what to run instead."""

    short: str
    full: str


def obstacle(ranks: int, ranks_in_process: int, ranks_on_node: int, cores: int) -> Obstacle | None:
    """What keeps these ranks from showing overlap, if anything does."""
    if ranks == 1:
        return Obstacle("no messages", f"One rank sends no messages: there is nothing to hide. Run {TRY}")
    if ranks_in_process > 1:
        return Obstacle("virtual ranks take turns", (
            "Virtual ranks run one at a time: while one computes no other does anything, so nothing can overlap, and a "
            f"rank's step and its waits, below, have the others' turns in them. To see overlap, run {TRY}"))
    if ranks_on_node > cores:
        return Obstacle("ranks share cores", (
            f"{ranks_on_node} ranks share {cores} core{'s' * (cores > 1)}: while one waits for a message another "
            "computes in its place, and nothing can be told of overlap, which needs a core for each rank. Run "
            f"{TRY if cores > 1 else 'it on a machine with 2 cores or more'}"))
    return None


def overlap(comm: Communicator, options: OverlapOptions, backend: Backend = HOST) -> int:
    """Time messages, computation and both by turns, for a forward and for forward and backward. Returns 0."""
    console = console_for(comm.rank)
    if backend.name == HOST.name:
        require_room(comm, options.config, options.plan)
    text, pictures, file = agreed(comm, lambda: _prepare(comm, options, backend))
    require_same_text(comm, text)
    hurdle = _agreed_obstacle(comm)
    if hurdle is not None:
        console.print(f"{hurdle.full}\n", highlight=False)
    full, forward = (Rehearsed(comm, options.config, options.plan, text, backward, backend)
                     for backward in (True, False))
    link = _link(console, full, options, hurdle)
    found = []
    for part, step in (("forward", forward), ("forward+backward", full)):
        found.append(_measured(console, part, step, options, hurdle))
    with pictures.recording():
        full.whole()
    pictures.collect()
    _show(console, found, link, comm.size)
    pictures.draw(console, f"forward and backward of {options.plan}")
    rows = [row.row() | {"link": link, "link_shared": options.link_shared} for row in found]
    write_all(comm, {file: json.dumps(rows, indent=1, allow_nan=False)})
    return 0


def _prepare(comm: Communicator, options: OverlapOptions, backend: Backend) -> tuple[Text, Pictures, WholeFile]:
    """All that can be refused, before anything is timed."""
    if options.plan.schedule == "single":
        raise UserError("--schedule single sends no messages: use one of tp, sp, tp+sp, fsdp+sp, tsp")
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats} is not valid: use 1 or more")
    if options.ratio is not None and not 0.01 <= options.ratio <= 100:
        raise UserError(f"--ratio {options.ratio:g} is not valid: use a number from 0.01 to 100")
    if options.ratio is not None and options.link is not None:
        raise UserError(f"--ratio {options.ratio:g} chooses a link, and --link {options.link} names one: use one of "
                        "the two")
    require_different({"--json": options.json_file, **options.pictures.files}, options.text or [])
    choose_strategy(options.plan, comm, options.config, backend)
    file = WholeFile("--json", options.json_file if comm.rank == 0 else None)
    return load_text(options.text, options.config), Pictures(comm, options.pictures, options.plan.schedule), file


def _agreed_obstacle(comm: Communicator) -> Obstacle | None:
    """The first rank's obstacle that has one, on every rank: hosts may have more ranks than cores or fewer."""
    here = np.array([comm.process_on_node[1], cores()])
    found = [obstacle(comm.size, comm.ranks_in_process, *map(int, row)) for row in all_gather(comm, here)]
    return next((each for each in found if each is not None), None)


def _link(console: Console, step: Rehearsed, options: OverlapOptions, hurdle: Obstacle | None) -> str:
    """The link that messages are on, as `--link` has it; chosen where none is given and something can be told."""
    if options.link is not None or hurdle is not None:
        return options.link or "none"
    ratio = RATIO if options.ratio is None else options.ratio
    link = step.choose_link(ratio, options.link_shared) or "none"
    shared = " --link-shared" if options.link_shared else ""
    console.print(f"chosen, for messages that take {ratio:g} of the computation's time:  --link {link}{shared}",
                  highlight=False)
    return link


def _measured(
    console: Console, part: str, step: Rehearsed, options: OverlapOptions, hurdle: Obstacle | None
) -> Overlap:
    """Rounds of one part: ROUNDS, and where they contradict each other more, `options.repeats` at most; one where
    nothing can be told."""
    most = 1 if hurdle is not None else options.repeats
    found = Overlap(str(options.plan), part, [], hurdle.short if hurdle else "", step.backend.name == "numpy")
    while len(found.rounds) < min(most, ROUNDS) or (len(found.rounds) < most and not found.settled):
        console.print(f"{part}, round {len(found.rounds) + 1}, {most} at most", highlight=False)
        found.rounds.append(step.round())
    return found


def _show(console: Console, found: list[Overlap], link: str, ranks: int) -> None:
    console.print(f"\n{found[0].schedule} on {ranks} rank{'s' * (ranks > 1)}, --link {link}\n"
                  "medians (and quartiles) of the rounds, ms", highlight=False)
    console.print(_table(found))
    if any(row.by_timings.text == NOISY for row in found):
        console.print(f"\n{' '.join(NOISE.split())}", highlight=False)


def _table(found: list[Overlap]) -> Table:
    """A row for each figure and a column for each part: so the figures fit 80 columns."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    for row in found:
        table.add_column(row.part, no_wrap=True)
    rows: dict[str, Callable[[Overlap], str]] = {
        "rounds": lambda row: str(len(row.rounds)),
        "messages alone": lambda row: _milliseconds(row.spread("comm")),
        "computation alone": lambda row: _milliseconds(row.spread("compute")),
        "both: the step as it is": lambda row: _milliseconds(row.spread("both")),
        "exposed: in waits, of both": lambda row: _milliseconds(row.spread("exposed")) if row.waits else "",
        "messages / computation": lambda row: f"{row.ratio:.2f}",
        "hidden, by the three times": lambda row: _told(row.by_timings, row.spread("hidden")),
        "hidden, by the waits": lambda row: _told(row.by_waits, row.spread("hidden_by_waits")),
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, found))
    return table


def _milliseconds(found: Spread) -> str:
    lower, middle, upper = (f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f}" for seconds in found)
    return middle if lower == upper else f"{middle} ({lower} to {upper})"


def _told(verdict: Verdict, fractions: Spread) -> str:
    if verdict.fraction is None:
        return verdict.text
    lower, upper = (min(max(value, 0.0), 1.0) for value in (fractions.lower, fractions.upper))
    return f"{verdict.text} ({lower:.0%} to {upper:.0%})"
