"""The command `compare`: every schedule at this N on the same text, measured, side by side."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..accounting.memory import KINDS, Memory
from ..accounting.phase import Phase
from ..accounting.work import Work
from ..arrays import Array
from ..backends.host import HOST, Backend
from ..comm.communicator import Communicator
from ..comm.control import agreed, all_gather, from_root, gather_texts
from ..comm.virtual import VirtualWorld
from ..errors import AgreedError, UserError
from ..formulas.memory import model_state_bytes
from ..model.config import Config
from ..process import arithmetic, threads
from ..process.room import require_room
from ..process.terminal import console_for
from ..training.collect import digest
from ..training.data import Text, load_text, require_same_text
from ..training.loop import Training
from ..training.strategy import Plan, choose_strategy, meshes
from .files import WholeFile, require_different, write_all
from .holdings import short

ROUNDS = 3

Result = TypeVar("Result")


@dataclass
class Row:
    """What was measured of one schedule: all but the digest are the largest over the ranks. Bytes, messages and seconds
    are of one training step; activations are what is kept between forward and backward; balance is the most
    floating-point operations of a rank over the mean of all."""

    schedule: str
    mesh: str | None
    digest: str = ""
    model_state_bytes: int = 0
    activation_bytes: int = 0
    peak_bytes: int = 0
    forward_bytes_sent: int = 0
    backward_bytes_sent: int = 0
    messages: int = 0
    balance: float = 1.0
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Peak:
    """When the rank that holds most held most: the phase, and the bytes of each kind."""

    phase: Phase
    held: dict[str, int]


# A loss that overflows ends the run with one line; NumPy would warn on every rank besides.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def compare(
    comm: Communicator, config: Config, plan: Plan, text_paths: list[str] | None, json_file: str | None,
    backend: Backend = HOST
) -> int:
    """Measure all schedules at this N, with the plan's layout and recomputation; 0 if they agree in every bit, else 1.

    First each schedule is trained for `config.steps` steps with everything counted. Then each is timed, without
    counting, by turns, so that a disturbance of the machine does not fall on one alone.
    """
    console = console_for(comm.rank)
    require_room(comm, config, Plan("single"))
    text, file = agreed(comm, lambda: _prepare(comm, config, text_paths, json_file, backend))
    require_same_text(comm, text)
    arithmetic.require_alike(comm, "compare")
    plans, refused = _plans(comm, config, plan)
    for each in plans:
        require_room(comm, config, each)
    _greet(console, comm, config, text, plan, plans)
    rows: list[Row] = []
    peaks: list[Peak] = []
    for number, each in enumerate(plans):
        console.print(f"counting {each} ({number + 1}/{len(plans)})", highlight=False)
        row, peak = _run(comm, each, partial(_measure, config, each, text), (Row("", None), Peak(("", ""), {})))
        rows.append(row)
        peaks.append(peak)
    for row, seconds in zip(rows, _time(console, comm, config, plans, text)):
        row.step_seconds = seconds
    write_all(comm, {file: json.dumps([dataclasses.asdict(row) for row in rows], indent=1, allow_nan=False)})
    _report(console, config, plans, rows, peaks, refused)
    agree = len({row.digest for row in rows}) == 1
    console.print("[green]One digest[/], every bit of every schedule" if agree else "[red]THE DIGESTS DIFFER[/]",
                  highlight=False)
    return 1 - from_root(comm, int(agree))


def _prepare(
    comm: Communicator, config: Config, text_paths: list[str] | None, json_file: str | None, backend: Backend
) -> tuple[Text, WholeFile]:
    """All that can be refused, before anything is measured."""
    threads.require_one("compare")
    require_different({"--json": json_file}, text_paths or [])
    backend.counted(Memory(), Work())  # which refuses where nothing could be counted
    return load_text(text_paths, config), WholeFile("--json", json_file if comm.rank == 0 else None)


def _plans(comm: Communicator, config: Config, plan: Plan) -> tuple[list[Plan], list[str]]:
    """The plans that this model can be dealt out by on these ranks, and why not by others; a single process first."""
    candidates = [("tp", None), ("sp", None), *(("tp+sp", mesh) for mesh in meshes(comm.size)),
                  ("fsdp+sp", None), ("tsp", None)]
    counted = dataclasses.replace(plan, counted=True)
    plans, refused = [dataclasses.replace(counted, schedule="single")], []
    for schedule, mesh in candidates:
        each = dataclasses.replace(counted, schedule=schedule, mesh=mesh)
        try:
            choose_strategy(each, comm, config, np)
        except UserError as error:
            refused.append(f"{each}: {error}")
        else:
            plans.append(each)
    if len(plans) == 1:
        raise AgreedError(f"no schedule can run: {refused[-1]}")
    return plans, refused


def _run(comm: Communicator, plan: Plan, run: Callable[[Communicator], Result], nothing: Result) -> Result:
    """Run something on all ranks; of a single process on rank 0 alone, while the others wait and have `nothing`."""
    if plan.schedule != "single":
        return run(comm)
    # Agreed, because what rank 0 alone refuses must stop all.
    return agreed(comm, lambda: run(VirtualWorld(1).communicators[0]) if comm.rank == 0 else nothing)


def _measure(config: Config, plan: Plan, text: Text, comm: Communicator) -> tuple[Row, Peak]:
    """Train, counted, and take the accounts' figures."""
    before = _sent(comm)
    training = Training(config, comm, plan, text, np)
    for _ in range(config.steps):
        training.step()
    sent = (_sent(comm) - before) // config.steps  # the ledger has entries of what was measured before
    memory = training.model.memory
    mine = np.array([memory.model_state_peak, training.kept_bytes, memory.total_peak, sent[0, 1], sent[1, 1],
                     sent[0, 0] + sent[1, 0], training.model.work.total], dtype=np.int64)
    phase, held = max(memory.peaks.items(), key=lambda item: sum(item[1].values()))
    figures = np.array(all_gather(comm, mine))  # [N, 7]
    state, activations, peak, forward, backward, messages, work = (int(value) for value in figures.max(axis=0))
    row = Row(plan.schedule, plan.mesh, digest(training), state, activations, peak, forward, backward, messages,
              balance=work / float(figures[:, -1].mean()))
    return row, _largest_peak(comm, phase, held)


def _sent(comm: Communicator) -> Array:
    """Messages and bytes that this rank has sent in forwards and in backwards until now: [2, 2]."""
    return np.array([comm.ledger.sums("send", direction=direction) for direction in ("forward", "backward")])


def _largest_peak(comm: Communicator, phase: Phase, held: dict[str, int]) -> Peak:
    """The peak of the rank that held most, on every rank."""
    rows = [json.loads(text) for text in gather_texts(comm, json.dumps([sum(held.values()), phase, held]))]
    _, (sublayer, direction), kinds = max(rows, key=lambda row: int(row[0]))
    return Peak((sublayer, direction), kinds)


def _time(console: Console, comm: Communicator, config: Config, plans: list[Plan], text: Text) -> list[float]:
    """Seconds of a step of each plan, the slowest rank's, the median of some rounds."""
    seconds: list[list[float]] = [[] for _ in plans]
    for number in range(ROUNDS):
        console.print(f"timing, round {number + 1}/{ROUNDS}", highlight=False)
        for taken, plan in zip(seconds, plans):
            plain = dataclasses.replace(plan, counted=False)
            mine = _run(comm, plan, partial(_time_one_step, config, plain, text), 0.0)
            taken.append(max(float(row[0]) for row in all_gather(comm, np.array([mine], dtype=np.float64))))
    return [median(taken) for taken in seconds]


def _time_one_step(config: Config, plan: Plan, text: Text, comm: Communicator) -> float:
    """The second step: in the first, memory is touched for the first time."""
    training = Training(config, comm, plan, text, np)
    training.step()
    from_root(comm, 0)  # all ranks begin together
    begin = time.perf_counter()
    training.step()
    return time.perf_counter() - begin


def _greet(
    console: Console, comm: Communicator, config: Config, text: Text, plan: Plan, plans: list[Plan]
) -> None:
    console.print(f"{len(plans) - 1} schedules on {comm.size} ranks, and a single process: {config.num_parameters:,} "
                  f"parameters in {config.dtype}, {config.batch_size} sequences of {config.seq_len} bytes a step, "
                  f"{plan.layout} layout, recompute {plan.recompute}, {config.steps} steps of {text.source}",
                  highlight=False)


def _report(
    console: Console, config: Config, plans: list[Plan], rows: list[Row], peaks: list[Peak], refused: list[str]
) -> None:
    console.print(_main_table(plans, rows), _ratio_table(plans, rows), _peak_table(plans, peaks), sep="\n")
    for reason in refused:
        console.print(f"left out: {reason}", highlight=False)
    state = model_state_bytes(config)
    console.print(f"largest over the ranks; bytes, messages and seconds are of one step. A model's state is "
                  f"{short(state)}B by the formula, {short(rows[0].model_state_bytes)}B as counted.", highlight=False)


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("schedule", "digest", "in") else "right", no_wrap=True)
    return table


def _main_table(plans: list[Plan], rows: list[Row]) -> Table:
    table = _table("Every schedule, in bytes", ["schedule", "digest", "state", "activations", "peak", "sent forward",
                                                "backward", "messages", "balance", "s/step"])
    smallest = min(row.peak_bytes for row in rows)
    for plan, row in zip(plans, rows):
        peak = short(row.peak_bytes)
        table.add_row(
            str(plan), row.digest[:8], short(row.model_state_bytes), short(row.activation_bytes),
            f"[green]{peak}[/]" if row.peak_bytes == smallest else peak, short(row.forward_bytes_sent),
            short(row.backward_bytes_sent), f"{row.messages:,}", f"{row.balance:.3f}", f"{row.step_seconds:.3f}")
    return table


MEASURES: dict[str, Callable[[Row], float]] = {
    "state": lambda row: row.model_state_bytes,
    "activations": lambda row: row.activation_bytes,
    "peak": lambda row: row.peak_bytes,
    "sent": lambda row: row.forward_bytes_sent + row.backward_bytes_sent,
    "messages": lambda row: row.messages,
    "s/step": lambda row: row.step_seconds,
}


def _ratio_table(plans: list[Plan], rows: list[Row]) -> Table:
    """TSP's figures as parts of each other schedule's."""
    table = _table("\nTSP against each: its figure over theirs", ["schedule", *MEASURES])
    tsp = next((row for row in rows if row.schedule == "tsp"), None)
    for plan, row in zip(plans, rows):
        if tsp is not None and row is not tsp:
            ratios = [measure(tsp) / measure(row) if measure(row) else None for measure in MEASURES.values()]
            table.add_row(str(plan), *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
    return table


def _peak_table(plans: list[Plan], peaks: list[Peak]) -> Table:
    """What the peak is made of."""
    table = _table("\nWhat is held at the peak", ["schedule", "in", *KINDS])
    for plan, peak in zip(plans, peaks):
        table.add_row(str(plan), " ".join(peak.phase), *(short(peak.held.get(kind, 0)) for kind in KINDS))
    return table
