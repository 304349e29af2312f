"""The command `verify`: N ranks against the single process in the same job, bit by bit, one verdict for each tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
from rich.console import Console

from ..arrays import Array
from ..backends.host import HOST, Backend
from ..comm.communicator import Communicator
from ..comm.control import agreed, all_gather, from_root
from ..comm.virtual import VirtualWorld
from ..model.activations import Saved
from ..model.config import Config
from ..model.parameters import Parameters, named_views
from ..process import arithmetic, threads
from ..process.room import require_room
from ..process.terminal import console_for
from ..training.collect import holders, stream, stream_blocks
from ..training.data import load_text, require_same_text
from ..training.loop import Training
from ..training.strategy import Plan

KEPT = {"attention": ("x", "q", "keys_values", "heads", "logsumexp"), "mlp": ("x", "projected")}
KEPT_BY_HEAD = ("x", "logsumexp")
"""The names under which activations are kept."""

Kept: TypeAlias = "Array | dict[int, Array] | None"
"""[p, ...] of a rank's tiles, or block -> [p, ...]; None where it is recomputed."""


@dataclass
class Verdict:
    """What is known of one named tensor: how many of its pieces were compared, and the first that differed."""

    pieces: int = 0
    different: int = 0
    first: str = ""


@dataclass
class Judge:
    """Compares bits on rank 0, and keeps a verdict for each name."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def compare(self, name: str, piece: str, found: Array, wanted: Array) -> None:
        """One piece of the tensor `name`: equal only if dtype, shape and every bit are."""
        verdict = self.verdicts.setdefault(name, Verdict())
        verdict.pieces += 1
        same_form = found.dtype == wanted.dtype and found.shape == wanted.shape
        if same_form and found.tobytes() == wanted.tobytes():
            return
        verdict.different += 1
        if not verdict.first:
            gap = f"by up to {np.max(np.abs(found - wanted)):.3g}" if same_form else "in shape or dtype"
            verdict.first = f"first in {piece}, {gap}"

    def report(self, console: Console, ranks: int, steps: int) -> bool:
        """Print a line for each tensor and a closing one. Whether all agree."""
        for name, verdict in self.verdicts.items():
            if verdict.different:
                console.print(f"[red]DIFFERS[/]  {name}  {verdict.different} of {verdict.pieces} pieces, "
                              f"{verdict.first}", highlight=False)
            else:
                console.print(f"[green]equal[/]    {name}  {verdict.pieces} pieces", highlight=False)
        wrong = sum(verdict.different > 0 for verdict in self.verdicts.values())
        over = f"{len(self.verdicts)} tensors, {_count(ranks, 'rank')} against one process, {_count(steps, 'step')}"
        closing = f"[red]NOT EQUAL[/]: {wrong} of {over}" if wrong else f"[green]EQUAL[/], every bit: {over}"
        console.print(closing, highlight=False)
        return wrong == 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# Overflow shows in the loss, where it ends the run with one line; NumPy would warn on every rank besides.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def verify(
    comm: Communicator, config: Config, plan: Plan, text_paths: list[str] | None = None, backend: Backend = HOST
) -> int:
    """Run `config.steps` training steps both ways and compare everything. 0 if every bit agrees, else 1.

    Both are computed by the same library, on the same kind of device: bits are compared on the host.
    """

    def prepare() -> Training:
        threads.require_one("verify")
        return Training(config, comm, plan, load_text(text_paths, config), backend)

    if backend.name == HOST.name:
        require_room(comm, config, plan, beside=Plan("single"))
    run = agreed(comm, prepare)
    require_same_text(comm, run.text)
    if backend.name == HOST.name:
        arithmetic.require_alike(comm, "verify")
    # Rank 0 holds a whole second model to compare with; the run itself stays sharded.
    alone = VirtualWorld(1).communicators[0]
    reference = Training(config, alone, Plan("single"), run.text, backend) if comm.rank == 0 else None
    console, judge = console_for(comm.rank), Judge()
    for step in range(config.steps):
        console.print(f"step {step + 1}/{config.steps}", highlight=False)
        compare_step(judge, run, reference)
    equal = judge.report(console, comm.size, config.steps)
    return 1 - from_root(comm, int(equal))


def compare_step(judge: Judge, run: Training, reference: Training | None) -> None:
    """One step of both, compared after the forward, after the backward and after the update."""
    step = f"step {run.steps_done + 1}"
    loss, saved = run.forward()
    run.require_finite("loss", loss)
    reference_loss, reference_saved = reference.forward() if reference else (None, None)
    compare_copies(judge, "loss", run, loss, reference_loss, step)
    compare_activations(judge, run, saved, reference_saved, step)
    run.strategy.backward(saved, run.weights, run.gradients)
    if reference and reference_saved:
        reference.strategy.backward(reference_saved, reference.weights, reference.gradients)
    norm = run.update()
    run.require_finite("gradient norm", norm)
    to_host = run.model.backend.to_host
    compare_copies(judge, "gradient norm", run, norm, reference.update() if reference else None, step)
    # The update leaves the gradients as they are, so they can be compared after it.
    wanted = held_parameters(reference) if reference else {}
    for prefix, found in held_parameters(run).items():
        compare_parameters(judge, prefix, run, found, wanted.get(prefix), step)
        gains = to_host(wanted[prefix].gains) if reference else None
        compare_copies(judge, f"{prefix}gains", run, to_host(found.gains), gains, step)


def held_parameters(training: Training) -> dict[str, Parameters]:
    """All that a rank holds between steps, with what to call it."""
    return {"gradient of ": training.gradients, "updated ": training.weights,
            "first moment of ": training.optimizer.first, "second moment of ": training.optimizer.second}


def compare_copies(
    judge: Judge, name: str, run: Training, found: Array | float, wanted: Array | float | None, step: str
) -> None:
    """Something that every rank holds, so every rank's copy; arrays are the host's."""
    for rank, copy in enumerate(all_gather(run.comm, np.atleast_1d(found))):
        if wanted is not None:
            judge.compare(name, f"{step}, rank {rank}", copy, np.atleast_1d(wanted))


def compare_parameters(
    judge: Judge, prefix: str, run: Training, found: Parameters, wanted: Parameters | None, step: str
) -> None:
    """Every matrix of every block."""
    wanted_tensors, to_host = dict(wanted.tensors()) if wanted else {}, run.model.backend.to_host
    for name, block, holder, array in stream_blocks(run.comm, run.model, found, copies=True):
        if wanted is None:
            continue
        pairs = zip(named_views(run.config, name, to_host(array)).items(),
                    named_views(run.config, name, to_host(wanted_tensors[name][block])).values())
        for (matrix, one), other in pairs:
            full = name if matrix == "table" else f"{name}.{matrix}"
            judge.compare(prefix + full, f"{step}, block {block}, rank {holder}", one, other)


def compare_activations(judge: Judge, run: Training, found: Saved, wanted: Saved | None, step: str) -> None:
    """Every activation that the forward keeps, tile by tile."""
    for layer in range(run.config.num_layers):
        for sublayer, names in KEPT.items():
            mine = getattr(found, sublayer)[layer]
            other = getattr(wanted, sublayer)[layer] if wanted else None
            for name in names:
                compare_tiles(judge, f"layers.{layer}.{sublayer}.{name}", run, getattr(mine, name),
                              getattr(other, name, None), step)
    for name in KEPT_BY_HEAD:
        compare_tiles(judge, f"head.{name}", run, getattr(found.head, name),
                      getattr(wanted.head, name) if wanted else None, step)


def compare_tiles(judge: Judge, name: str, run: Training, found: Kept, wanted: Kept, step: str) -> None:
    """What is kept of each tile, or of each with each block, streamed to rank 0 by every rank that holds it.

    What nobody holds, because it is to be recomputed, has no verdict.
    """
    config, to_host, own = run.config, run.model.backend.to_host, run.model.grid.slots
    blocks = range(config.blocks) if isinstance(found, dict) else [None]
    pairs = [(block, slot) for block in blocks for slot in range(config.tiles)]
    for (block, slot), ranks in zip(pairs, holders(run.comm, pairs, partial(holds, own, found))):
        # A single process holds all slots, in their order.
        other = tile_of(wanted, block, slot) if wanted is not None and ranks else None
        for holder in ranks:
            mine = partial(lambda pair: tile_of(found, pair[0], own.index(pair[1])), (block, slot))
            array = stream(run.comm, run.model, holder, other.shape if other is not None else (), mine)
            if array is not None and other is not None:
                where = f"slot {slot}" if block is None else f"block {block}, slot {slot}"
                judge.compare(name, f"{step}, {where}, rank {holder}", to_host(array), to_host(other))


def holds(own: tuple[int, ...], kept: Kept, pair: tuple[int | None, int]) -> bool:
    """Whether a rank with these slots keeps something of a tile with a block."""
    block, slot = pair
    return kept is not None and slot in own and (block is None or (isinstance(kept, dict) and block in kept))


def tile_of(kept: Kept, block: int | None, place: int) -> Array:
    """What is kept of the tile at a place among those that a rank holds."""
    of_block = kept[block] if isinstance(kept, dict) else kept  # type: ignore[index]
    tile: Array = of_block[place]  # type: ignore[index]
    return tile
