"""The command `train`: the loop with its display, its log and its digest."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..accounting.memory import MODEL_STATE
from ..backends.host import HOST, Backend
from ..comm.communicator import Communicator
from ..comm.control import agreed
from ..model.config import Config
from ..process import arithmetic, threads
from ..process.room import require_room
from ..process.terminal import console_for
from ..training.collect import digest
from ..training.data import load_text, require_same_text
from ..training.loop import StepReport, Training
from ..training.strategy import Plan
from .files import LineFile, require_different
from .holdings import holdings_table, short
from .timeline import PictureOptions, Pictures


@dataclass(frozen=True)
class TrainOptions:
    """What the command line asks of `train`."""

    config: Config
    plan: Plan
    text: list[str] | None = None
    digest: bool = False
    log: str | None = None
    pictures: PictureOptions = field(default_factory=PictureOptions)


# Overflow shows in the loss, where it ends the run with one line; NumPy would warn on every rank besides.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def train(comm: Communicator, options: TrainOptions, backend: Backend = HOST) -> int:
    """Train, and report on rank 0. Returns the exit code."""
    if backend.name == HOST.name:
        require_room(comm, options.config, options.plan)
    training, pictures = agreed(comm, lambda: _prepare(comm, options, backend))
    require_same_text(comm, training.text)
    console = console_for(comm.rank)
    if backend.name == HOST.name and options.digest:
        arithmetic.require_alike(comm, "--digest")
    elif backend.name == HOST.name:
        arithmetic.warn_unless_alike(comm, console)
    # Last of what may be refused, because it makes a file.
    log = agreed(comm, lambda: LineFile("--log", options.log if comm.rank == 0 else None))
    _greet(console, training, options)
    with contextlib.closing(log):
        log.write({"start": dataclasses.asdict(options.config), "plan": dataclasses.asdict(options.plan),
                   "ranks": comm.size})
        _run_steps(console, training, pictures, log)
        pictures.collect()
        validation = training.validate()
        console.print(f"validation loss {validation:.4f} on held-out text; training loss "
                      f"{training.losses[0]:.4f} -> {training.losses[-1]:.4f}", highlight=False)
        log.write({"validation_loss": validation})
        console.print(holdings_table(training))
        peak = backend.peak_bytes()
        if peak is not None:
            console.print(f"rank 0's pool of GPU memory took {short(peak)}B at most, temporary arrays and all; its "
                          f"messages were staged in {short(comm.pinned_peak)}B of the host's", highlight=False)
        pictures.draw(console, f"step {options.config.steps} of {options.plan}")
        if options.digest:
            text = digest(training)
            log.write({"digest": text})
            console.print(f"digest sha256:{text}", soft_wrap=True, highlight=False)
    return 0


def _prepare(
    comm: Communicator, options: TrainOptions, backend: Backend
) -> tuple[Training, Pictures]:
    """All that can be refused but the log, before the first message of the model."""
    if options.digest:
        threads.require_one("--digest")
    require_different({"--log": options.log, **options.pictures.files}, options.text or [])
    text = load_text(options.text, options.config)
    pictures = Pictures(comm, options.pictures, options.plan.schedule)
    training = Training(options.config, comm, options.plan, text, backend)
    return training, pictures


def _greet(console: Console, training: Training, options: TrainOptions) -> None:
    config, comm = training.config, training.comm
    ranks = "1 rank" if comm.size == 1 else f"{comm.size} ranks"
    console.print(f"{options.plan} on {ranks}: {config.num_parameters:,} parameters in {config.dtype}, "
                  f"{config.batch_size} sequences of {config.seq_len} bytes a step, {config.blocks} weight blocks, "
                  f"{config.tiles} token tiles")
    console.print(f"arrays: {training.model.backend.describe()}", highlight=False, markup=False)
    console.print(f"text: {training.text.source}, {len(training.text.training):,} bytes to learn, "
                  f"{len(training.text.validation):,} held out", highlight=False, markup=False)


def _run_steps(console: Console, training: Training, pictures: Pictures, log: LineFile) -> None:
    """A live bar on a terminal; elsewhere about twenty plain lines. Pictures show the last step: by then all memory has
    been touched before."""
    config = training.config
    progress = Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[line]}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal or console.quiet)
    every = max(1, config.steps // 20)
    with progress:
        task = progress.add_task("train", total=config.steps, line="")
        for number in range(1, config.steps + 1):
            begin = time.perf_counter()
            with pictures.recording() if number == config.steps else contextlib.nullcontext():
                report = training.step()
            seconds = time.perf_counter() - begin
            line = _line(training, report, seconds)
            progress.update(task, advance=1, line=line)
            if not console.is_terminal and (report.step % every == 0 or report.step in (1, config.steps)):
                console.print(f"step {report.step:>4}/{config.steps}  {line}", highlight=False)
            log.write(dataclasses.asdict(report) | {"seconds": seconds})


def _line(training: Training, report: StepReport, seconds: float) -> str:
    tokens = training.config.batch_size * training.config.seq_len
    held = training.model.memory.held
    state = sum(held[kind] for kind in MODEL_STATE)
    return (f"loss {report.loss:.4f}  norm {report.norm:.2f}  {tokens / seconds:,.0f} tokens/s  "
            f"this rank holds {short(state)}B")
