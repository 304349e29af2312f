"""The command `messages`: a training step of one rank on paper, every message, computation and wait in order."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from ..backends.host import HOST, Backend
from ..comm.communicator import Communicator, Event
from ..comm.control import agreed, from_root, text_from
from ..errors import UserError
from ..model.config import Config
from ..pictures.score import CALLS, IN_LAYERS, Visit, lines_of, score, totals
from ..process.room import require_room
from ..process.terminal import console_for
from ..training.data import load_text, require_same_text
from ..training.loop import Training
from ..training.strategy import SCHEDULES, Plan

DIRECTIONS = ("forward", "backward")
PARTS = {"embedding": DIRECTIONS, "attention": DIRECTIONS, "mlp": DIRECTIONS, "head": DIRECTIONS,
         "loss": ("forward",), "gains": ("backward",), "optimizer": ("backward",)}
"""The sub-layers of a step, with those that come once in it, and the directions in which each has anything to do."""

NARROWEST = 60  # columns

HELP = """\
Run a training step and print what one rank did in it, line by line in the order in which it did it: a schedule as a
score on paper. Without mpirun, on 4 virtual ranks.

  python -m tsp_ref messages --rank 1 --part mlp --direction forward --layer 0

prints how the MLP's blocks go round the ring: each is received from the left neighbour and sent on to the right while
the one before is computed with.

  Irecv, Isend   messages posted: the block that they are about, the peer, bytes, purpose (the message's tag)
  compute        a block of weights meets this rank's tiles, which are numbered by their slots
  wait           the rank goes on when this message is complete; "from" it was received, "to" it was sent

What is posted in one sub-layer for another is marked: "for mlp 1" is a prefetch for layer 1's MLP, "of mlp 1" are its
gradients, deferred. Such a message is printed too where only the other sub-layer is asked for, under the name of the
one in which it was posted. The last line counts all that was posted for what is asked for, wherever that was.
"""


def small_grid(ranks: int) -> list[str]:
    """Settings with which a sub-layer of the preset `tiny` fits a screen; more ranks need the preset's own."""
    return ["blocks=4", "tiles=8"] if ranks <= 4 else []


@dataclass(frozen=True)
class Choice:
    """Which sub-layers the command line asks for; None: all."""

    part: str | None = None
    direction: str | None = None
    layer: int | None = None

    def __call__(self, visit: Visit) -> bool:
        """Whether a sub-layer is asked for."""
        return (self.part in (None, visit.sublayer) and self.direction in (None, visit.direction)
                and self.layer in (None, visit.layer))

    def __str__(self) -> str:
        layer = None if self.layer is None else f"layer {self.layer}"
        return ", ".join(filter(None, (self.part, self.direction, layer))) or "the step"

    def check(self, config: Config) -> None:
        """A `UserError` for what no step of this model has."""
        if self.part is not None and self.part not in PARTS:
            raise UserError(f"--part {self.part} is unknown: use one of {', '.join(PARTS)}")
        if self.direction is not None and self.direction not in DIRECTIONS:
            raise UserError(f"--direction {self.direction} is unknown: use one of {', '.join(DIRECTIONS)}")
        if self.part is not None and self.direction not in (None, *PARTS[self.part]):
            raise UserError(f"--direction {self.direction} with --part {self.part} is nothing: use "
                            f"{PARTS[self.part][0]}, or leave it out")
        if self.layer is None:
            return
        if not 0 <= self.layer < config.num_layers:
            raise UserError(f"--layer {self.layer} is not one of num_layers={config.num_layers}: use 0 to "
                            f"{config.num_layers - 1}")
        if self.part not in (None, *IN_LAYERS):
            raise UserError(f"--layer {self.layer} with --part {self.part}, which is in no layer: use one of "
                            f"{', '.join(IN_LAYERS)}, or leave --layer out")


@dataclass(frozen=True)
class MessagesOptions:
    """What the command line asks of `messages`.

    config_for  the configuration for so many ranks
    """

    config_for: Callable[[int], Config]
    plan: Plan
    rank: int = 0
    choice: Choice = Choice()
    text: list[str] | None = None


# Overflow shows in the loss, where it ends the run with one line; NumPy would warn on every rank besides.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def messages(comm: Communicator, options: MessagesOptions, backend: Backend = HOST) -> int:
    """Run a training step on all ranks, and print on rank 0 what one of them did. Returns 0."""
    console = console_for(comm.rank)
    if backend.name == HOST.name:
        require_room(comm, agreed(comm, lambda: options.config_for(comm.size)), options.plan)
    training = agreed(comm, lambda: _prepare(comm, options, backend))
    require_same_text(comm, training.text)
    width = from_root(comm, max(NARROWEST, console.width))
    script: list[Event] = []
    comm.script = script
    training.step()
    comm.script = None
    mine = comm.rank == options.rank
    text = "\n".join(_page(script, training, options, width)) if mine else ""
    _print(console, text_from(comm, options.rank, text))
    return 0


def _prepare(comm: Communicator, options: MessagesOptions, backend: Backend) -> Training:
    """All that can be refused, before the step."""
    if options.plan.schedule == "single":
        raise UserError("--schedule single sends no messages: use one of "
                        f"{', '.join(name for name in SCHEDULES if name != 'single')}")
    if not 0 <= options.rank < comm.size:
        raise UserError(f"--rank {options.rank} is not one of this job's {comm.size}: use 0 to {comm.size - 1}")
    config = options.config_for(comm.size)
    options.choice.check(config)
    return Training(config, comm, options.plan, load_text(options.text, config), backend)


def _page(script: list[Event], training: Training, options: MessagesOptions, width: int) -> list[str]:
    """All that is printed."""
    config, choice = training.config, options.choice
    lines = lines_of(script, config.num_layers)
    ranks = "1 rank" if training.comm.size == 1 else f"{training.comm.size} ranks"
    title = (f"{options.plan} on {ranks}, {config.blocks} blocks, {config.tiles} tiles: what rank {options.rank} "
             f"posted, computed and waited for in a training step, in order; {choice}; sizes in bytes")
    wanted = [line for line in lines if choice(line.of)]
    sums = "; ".join(f"{count:,} {CALLS[verb]}, {size:,} bytes" for verb, (count, size) in totals(wanted).items())
    closing = f"posted for {choice}: {sums}"
    return [*textwrap.wrap(title, width), *score(lines, choice, width), "", *textwrap.wrap(closing, width)]


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
