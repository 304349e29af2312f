"""One bit pattern on any number of ranks, and how a sum in order of arrival loses it.

Objective: after this lesson you can say what makes N ranks train bit for bit what one process trains, and what it
looks like when a program only nearly does.

    mpirun -n 4 python lessons/07_one_bit_pattern.py
    python lessons/07_one_bit_pattern.py --ranks 4 --shuffle 7

Look at: the digests of the first table, a SHA-256 over the bits of all losses, the last gradients, all weights and both
moments of the optimizer after a few steps. Then look at the second table, where the same code runs with the tree over
blocks and tiles replaced by a sum in order of arrival. Its losses look right. Which step betrays it?

Try it: in `on_virtual_ranks`, leave out the seed: `VirtualWorld(size)`. Messages are then delivered in the order in
which they were posted, every time alike, and the check that another order of delivery gives another digest fails: a sum
in order of arrival looks reproducible for as long as nothing disturbs the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from stage import Lesson, drawn_text, run, sums_in_order_of_arrival

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.model import tilewise
from tsp_ref.model.config import make_config
from tsp_ref.schedules import all_reduce, gradients, keys_values, tsp
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

STEPS = 3
CONFIG = make_config("tiny", num_layers=1, tiles=8, steps=STEPS, warmup_steps=1)
TREE_RUNS = ((1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (8, 1))
ARRIVAL_RUNS = ((1, 1), (2, 1), (4, 1), (4, 2))
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of a run: the digest of all bits (on rank 0), each step's loss, its gradient of the gains."""

    digest: str
    losses: list[float]
    gains_gradient: bytes


Runs: TypeAlias = dict[tuple[int, int], list[Outcome]]
"""(number of virtual ranks, seed) -> what each of them saw."""


def train(comm: Communicator, schedule: str) -> Outcome:
    """A few steps of the tiny model with one layer."""
    training = Training(CONFIG, comm, Plan(schedule), drawn_text(), np)
    for _ in range(STEPS):
        training.step()
    return Outcome(digest(training), training.losses, training.gradients.gains.tobytes())


def on_virtual_ranks(size: int, seed: int, schedule: str = "tsp") -> list[Outcome]:
    """A run on virtual ranks inside this process, in an order of ranks and deliveries drawn from the seed."""
    return VirtualWorld(size, seed).run(lambda comm: train(comm, schedule))


def first_difference(losses: list[float], others: list[float]) -> int | None:
    """The first step, counted from 1, at which two runs have another loss."""
    return next((step for step, (one, other) in enumerate(zip(losses, others), 1) if one != other), None)


def table_of(runs: dict[str, Outcome], truth: Outcome) -> Table:
    """One row per run: its digest, its losses, and when they leave the single process's."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("run", "digest", *(f"loss {step}" for step in range(1, STEPS + 1)), "differs since"):
        table.add_column(heading, no_wrap=True)
    for name, outcome in runs.items():
        step = first_difference(outcome.losses, truth.losses)
        since = f"step {step}" if step else "nowhere" if outcome.digest == truth.digest else "no loss, other bits"
        table.add_row(name, outcome.digest[:12], *(f"{loss:.9f}" for loss in outcome.losses), since)
    return table


def name(size: int, seed: int) -> str:
    """A virtual run's name."""
    return f"{size} virtual, seed {seed}" if size > 1 else "1 virtual"


def copies(outcomes: list[Outcome]) -> tuple[int, int]:
    """How many different lists of losses, and how many different gradients of the gains, the ranks of a run hold."""
    return len({tuple(outcome.losses) for outcome in outcomes}), len({outcome.gains_gradient for outcome in outcomes})


def with_the_tree(lesson: Lesson, truth: Outcome, job: Outcome, runs: Runs) -> None:
    """Several numbers of ranks, and another order of messages."""
    lesson.part("With the tree")
    alone, firsts = lesson.rank == 0, {name(*run): outcomes[0] for run, outcomes in runs.items()}
    lesson.say(f"{CONFIG.num_parameters:,} parameters, {STEPS} steps. Virtual ranks live inside rank 0; the seed draws "
               "the order\nin which they run and their messages arrive.")
    lesson.say(table_of({"single process": truth, f"this job, N = {lesson.size}": job} | firsts, truth))
    lesson.check("this job's digest equals the single process's", not alone or job.digest == truth.digest)
    lesson.check(f"so do those of the {len(TREE_RUNS)} virtual runs above: 1, 2, 3 and 8 ranks under one seed each, 4 "
                 "ranks under two",
                 not alone or {outcome.digest for outcome in firsts.values()} == {truth.digest})
    lesson.check("every virtual rank of a run holds the same losses and gradients of gains, every bit",
                 not alone or {copies(outcomes) for outcomes in runs.values()} == {(1, 1)})
    wanted = all_gather(lesson.comm, np.array(truth.losses, dtype=np.float64))[0]
    lesson.check("every rank of this job saw the losses of the single process, every bit",
                 np.array(job.losses, dtype=np.float64).tobytes() == wanted.tobytes())


def without_the_tree(lesson: Lesson, truth: Outcome, runs: Runs) -> None:
    """The same model and text, with sums in order of arrival."""
    lesson.part("With sums in order of arrival")
    alone, firsts = lesson.rank == 0, {run: outcomes[0] for run, outcomes in runs.items()}
    lesson.say(table_of({name(*run): outcome for run, outcome in firsts.items()}, truth))
    lesson.say("Same model, same text, same messages; only the order of additions is that of arrival. One rank\n"
               "differs, too: it adds from left to right, which is neither the tree's order nor that of two ranks.")
    different = {outcome.digest for (_, seed), outcome in firsts.items() if seed == 1} | {truth.digest}
    lesson.check("1, 2 and 4 ranks give three digests, none of them the tree's", not alone or len(different) == 4)
    lesson.check("4 ranks with another order of delivery give another digest",
                 not alone or firsts[4, 1].digest != firsts[4, 2].digest)
    gaps = [abs(one / other - 1) for outcome in firsts.values() for one, other in zip(outcome.losses, truth.losses)]
    lesson.check(f"yet all losses agree with the tree's within {TOLERANCE:g}: a tolerance would have passed them",
                 max(gaps, default=0.0) < TOLERANCE)


def ranks_apart(lesson: Lesson, runs: Runs) -> None:
    """What order of arrival does to a value that every rank holds a copy of."""
    lesson.part("Ranks that no longer agree")
    alone = lesson.rank == 0
    losses, gains = copies(runs[4, 2]) if alone else (0, 0)
    lesson.say("The loss and the gradient of the gains are sums that every rank makes for itself, from the same\n"
               f"pieces. Different lists of losses among the 4 ranks of the last run: {losses}. Different gradients\n"
               f"of the gains, which each rank applies to its own copy: {gains}.")
    lesson.check("without the tree, ranks of one run hold different gradients of the gains", not alone or gains > 1)


def main(lesson: Lesson) -> None:
    """The lesson, part by part. Rank 0 alone compares whole runs; the other ranks leave that verdict to it."""
    lesson.require_comparable_bits()
    lesson.require_ranks(CONFIG.max_ranks)
    job, truth = train(lesson.comm, "tsp"), Outcome("", [0.0] * STEPS, b"")
    tree_runs: Runs = {}
    arrival_runs: Runs = {}
    if lesson.rank == 0:
        truth = on_virtual_ranks(1, 0, "single")[0]
        tree_runs = {run: on_virtual_ranks(*run) for run in TREE_RUNS}
        with sums_in_order_of_arrival(tilewise, tsp, all_reduce, gradients, keys_values):
            arrival_runs = {run: on_virtual_ranks(*run) for run in ARRIVAL_RUNS}
    with_the_tree(lesson, truth, job, tree_runs)
    without_the_tree(lesson, truth, arrival_runs)
    ranks_apart(lesson, arrival_runs)


if __name__ == "__main__":
    run(__doc__, main)
