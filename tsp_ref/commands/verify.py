"""The command `verify`: N ranks against the single process in the same job, bit by bit, one verdict for each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

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
from ..process import threads
from ..process.terminal import console_for
from ..training.collect import holders, stream, stream_blocks
from ..training.data import load_text
from ..training.loop import Training
from ..training.strategy import Plan

Key = TypeVar("Key", int, tuple[int, int])


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


def verify(
    comm: Communicator, config: Config, plan: Plan, text_paths: list[str] | None = None, backend: Backend = HOST
) -> int:
    """Run `config.steps` training steps both ways and compare everything. 0 if every bit agrees, else 1.

    Both are computed by the same library, on the same kind of device: bits are compared on the host.
    """

    def prepare() -> Training:
        threads.require_one("verify")
        return Training(config, comm, plan, load_text(text_paths, config), backend)

    run = agreed(comm, prepare)
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
    reference_loss, reference_saved = reference.forward() if reference else (None, None)
    compare_copies(judge, "loss", run, loss, reference_loss, step)
    compare_activations(judge, run, saved, reference_saved, step)
    run.strategy.backward(saved, run.weights, run.gradients)
    if reference and reference_saved:
        reference.strategy.backward(reference_saved, reference.weights, reference.gradients)
    norm = run.update()
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
    config = run.config
    slots = list(range(config.tiles))
    pairs = [(block, slot) for block in range(config.blocks) for slot in slots]
    attention_kept = (("x", slots), ("q", pairs), ("tile_keys_values", pairs), ("heads", pairs), ("logsumexp", pairs))
    for layer in range(config.num_layers):
        for part, kept in (("attention", attention_kept), ("mlp", (("x", slots), ("projected", pairs)))):
            for name, keys in kept:
                mine = getattr(getattr(found, part)[layer], name)
                other = getattr(getattr(wanted, part)[layer], name) if wanted else {}
                compare_tiles(judge, f"layers.{layer}.{part}.{name}", run, keys, mine, other, step)
    for name in ("x", "logsumexp"):
        other = getattr(wanted.head, name) if wanted else {}
        compare_tiles(judge, f"head.{name}", run, slots, getattr(found.head, name), other, step)


def compare_tiles(
    judge: Judge, name: str, run: Training, keys: Sequence[Key], found: dict[Key, Array], wanted: dict[Key, Array],
    step: str
) -> None:
    """An array for each slot, or for each (block, slot), streamed to rank 0 by every rank that holds it.

    What nobody holds, because it is to be computed anew, has no verdict.
    """
    to_host = run.model.backend.to_host
    for key, ranks in zip(keys, holders(run.comm, keys, found.__contains__)):
        shape = wanted[key].shape if wanted else ()
        for holder in ranks:
            array = stream(run.comm, run.model, holder, shape, partial(found.__getitem__, key))
            if array is not None and wanted:
                where = f"block {key[0]}, slot {key[1]}" if isinstance(key, tuple) else f"slot {key}"
                judge.compare(name, f"{step}, {where}, rank {holder}", to_host(array), to_host(wanted[key]))
