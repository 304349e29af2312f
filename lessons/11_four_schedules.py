"""Four schedules, one bit pattern: entirely different messages that end in the same bits.

Objective: after this lesson you can say what TP, SP, TP+SP and TSP each send, which of their sums cross from rank to
rank, and why all four still train bit for bit what one process trains; and show how far they part when their sums are
made in order of arrival.

    mpirun -n 4 python lessons/11_four_schedules.py
    python lessons/11_four_schedules.py --ranks 4 --shuffle 7

(TP is tensor parallelism and cuts weights, SP is sequence parallelism and cuts tokens, TP+SP cuts each along an axis of
its own, and TSP, arXiv 2604.26294, cuts both along the same one. One grid and one tree, which make them agree in every
bit, are this project's.)

Look at: the first table, where rows differ in all but the digest; the table of what travels, where TP and TSP have
nothing in common but a few numbers; the products, which are dealt out differently and are the same all together; and
the last table, where only the order of additions has changed. Its losses look right.

Try it: in `train`, give TP another grid: in place of `CONFIG`, write
`replace(CONFIG, tiles=16) if plan.schedule == "tp" else CONFIG`. No weight, token or formula is another, but the sums
over tiles have more and smaller terms, and the first two checks fail, and no other. The grid is a part of the model.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TypeAlias
from unittest import mock

from stage import Lesson, Sent, drawn_text, names, run, sent_since, sums_in_order_of_arrival

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.commands.holdings import short
from tsp_ref.model import tilewise
from tsp_ref.model.config import make_config
from tsp_ref.schedules import all_reduce, gradients, keys_values, sp, tp, tp_sp, tsp
from tsp_ref.schedules.tags import Tag
from tsp_ref.training.collect import digest, stream_blocks
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan, mesh_sides, meshes

STEPS = 2
CONFIG = make_config("tiny", num_layers=1, tiles=8, steps=STEPS, warmup_steps=1)
TOLERANCE = 1e-5
DIRECTIONS = ("forward", "backward")
KINDS: dict[str, tuple[Tag, ...]] = {
    "weights": (Tag.EMBEDDING_WEIGHTS, Tag.ATTENTION_WEIGHTS, Tag.MLP_WEIGHTS, Tag.HEAD_WEIGHTS),
    "terms over blocks": (Tag.EMBEDDING_SUMS, Tag.ATTENTION_SUMS, Tag.MLP_SUMS, Tag.HEAD_SUMS),
    "keys, values": (Tag.KEYS_VALUES,),
    "their gradients": (Tag.KEYS_VALUES_GRADIENTS,),
    "weights' gradients": (Tag.EMBEDDING_GRADIENTS, Tag.ATTENTION_GRADIENTS, Tag.MLP_GRADIENTS, Tag.HEAD_GRADIENTS),
    "few numbers": (Tag.LOSS, Tag.GAIN_GRADIENTS, Tag.GRADIENT_NORM),
}
"""What travels: purposes that are the same thing for different parts of the model, together."""
KIND_OF = {tag.name: kind for kind, tags in KINDS.items() for tag in tags}
VIRTUAL_PLANS = (Plan("tp"), Plan("sp"), Plan("tp+sp", "2x2"), Plan("tsp"))
SEEDS = (1, 2)

Traces: TypeAlias = "dict[tuple[Plan, int], Trace]"
"""(plan, seed) -> a run on four virtual ranks."""


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of a run: the digest of all bits ("" but on rank 0), the losses, what it sent, what it held."""

    digest: str
    losses: list[float]
    sent: Sent
    blocks: int
    tiles: int


def train(comm: Communicator, plan: Plan) -> Outcome:
    """A few steps of the tiny model with one layer."""
    before, training = sent_since(comm, {}), Training(CONFIG, comm, plan, drawn_text(), np)
    for _ in range(STEPS):
        training.step()
    grid = training.model.grid
    return Outcome(digest(training), training.losses, sent_since(comm, before), len(grid.blocks), len(grid.slots))


def plans(size: int) -> list[Plan]:
    """Every schedule on so many ranks, and every mesh of them."""
    return [Plan("tp"), Plan("sp"), *(Plan("tp+sp", mesh) for mesh in meshes(size)), Plan("tsp")]


def variants(size: int) -> list[Plan]:
    """The same, with other tiles on each rank, and with what the forward has not kept recomputed in the backward."""
    square = "x".join(map(str, mesh_sides(None, size)))
    return [Plan("tp", recompute="full"), Plan("sp", layout="contiguous", recompute="attention"),
            Plan("tp+sp", square, layout="contiguous", recompute="full"), Plan("tsp", recompute="full"),
            Plan("tsp", layout="contiguous", recompute="attention")]


# One digest.


def show_digests(lesson: Lesson, outcomes: dict[Plan, Outcome], truth: Outcome) -> None:
    """Every schedule's digest beside the single process's."""
    lesson.part("One digest")
    lesson.say(f"{CONFIG.num_parameters:,} parameters in G={CONFIG.blocks} blocks, T={CONFIG.tiles} tiles, {STEPS} "
               "steps of training. What ranks hold of the blocks and of\nthe tiles, and a SHA-256 over the bits of all "
               "losses, the last gradients, all weights and both moments:")
    lesson.say(digests_table(lesson, outcomes, truth))
    lesson.say("Layout: which tiles a rank holds. Recompute: what is not kept for the backward, but computed twice.")
    different = {outcome.digest for outcome in outcomes.values()} | {truth.digest}
    lesson.check(f"one digest: all {len(outcomes)} runs have the single process's, in every bit",
                 lesson.rank > 0 or len(different) == 1)
    wanted = all_gather(lesson.comm, np.array(truth.losses, dtype=np.float64))[0].tobytes()
    lesson.check("on every rank, each run's losses are the single process's, in every bit",
                 all(np.array(outcome.losses).tobytes() == wanted for outcome in outcomes.values()))


def digests_table(lesson: Lesson, outcomes: dict[Plan, Outcome], truth: Outcome) -> Table:
    """A row for each run."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("schedule", "layout", "recompute", "blocks", "tiles", "digest"):
        table.add_column(heading, no_wrap=True)
    table.add_row("single process", "", "", str(CONFIG.blocks), str(CONFIG.tiles), truth.digest[:16])
    for plan, outcome in outcomes.items():
        held = all_gather(lesson.comm, np.array([outcome.blocks, outcome.tiles], dtype=np.int64))
        counts = [names(sorted({int(row[axis]) for row in held})) for axis in (0, 1)]
        table.add_row(str(plan), plan.layout, plan.recompute, *counts, outcome.digest[:16])
    return table


# What travels.


def by_kind(lesson: Lesson, sent: Sent) -> Array:
    """Bytes that all ranks together sent in a step, by kind and direction: [kinds, 2]."""
    mine = np.zeros((len(KINDS), len(DIRECTIONS)), dtype=np.int64)
    for (_, direction, purpose), (_, size) in sent.items():
        mine[list(KINDS).index(KIND_OF[purpose]), DIRECTIONS.index(direction)] += size
    together: Array = np.sum(all_gather(lesson.comm, mine), axis=0) // STEPS
    return together


def show_messages(lesson: Lesson, outcomes: dict[Plan, Outcome]) -> None:
    """What each schedule sends, from the ledgers."""
    lesson.part("Entirely different messages")
    lesson.say("Bytes that all ranks together send in a step, forward + backward, from the ledgers:")
    counts = {str(plan): by_kind(lesson, outcome.sent) for plan, outcome in outcomes.items()}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("schedule", *KINDS):
        table.add_column(heading.replace(" ", "\n", 1), justify="left" if heading == "schedule" else "right")
    for name, rows in counts.items():
        table.add_row(name, *(" + ".join(map(short, row)) if sum(row) else "" for row in rows.tolist()))
    lesson.say(table)
    if lesson.size == 1:
        lesson.say("One rank sends nothing under any schedule. Run it on more ranks, too.")
    lesson.say("Terms over blocks are what a rank's own blocks add to an output, or to an input's gradient: they\n"
               "travel where tokens meet different blocks on different ranks. Under TSP the blocks come to the tokens.")
    check_kinds(lesson, counts)


def check_kinds(lesson: Lesson, counts: dict[str, Array]) -> None:
    """What the schedules have in common, and what not."""
    used = {name: {kind for kind, row in zip(KINDS, rows) if kind != "few numbers" and row.any()}
            for name, rows in counts.items()}
    meshes = [name for name in used if name.startswith("tp+sp") and "1" not in name.split()[1].split("x")]
    lesson.check("but for a few numbers, TP sends nothing of a kind that SP or TSP sends",
                 not used["tp"] & (used["sp"] | used["tsp"]))
    if meshes:
        lesson.check(f"{' and '.join(meshes)}: of each kind that TP or SP sends",
                     all(used[name] == used["tp"] | used["sp"] for name in meshes))
    lesson.check("TSP, and it alone, sends weights; all else that it sends is what SP sends, too",
                 all(("weights" in kinds) == (name == "tsp" and lesson.size > 1) for name, kinds in used.items())
                 and used["tsp"] - {"weights"} == used["sp"])
    keys = list(KINDS).index("keys, values")
    lesson.check("SP and TSP send the same bytes of keys and values, forward and backward",
                 counts["sp"][keys].tolist() == counts["tsp"][keys].tolist())


# Why the bits are the same.


@lru_cache(maxsize=4096)
def drawn_for(product: tuple[tuple[str, str], tuple[int, ...], tuple[int, ...]]) -> int:
    """A number as good as random, the same for all products of a phase and of two shapes."""
    return int.from_bytes(hashlib.sha256(repr(product).encode()).digest()[:5])


def products(comm: Communicator, plan: Plan) -> Array:
    """How many matrix products this rank makes in a step, and the sum of the numbers drawn for them: [2]."""
    training, made = Training(CONFIG, comm, replace(plan, counted=True), drawn_text(), np), np.zeros(2, dtype=np.int64)

    def note(left: tuple[int, ...], right: tuple[int, ...]) -> None:
        # That of a stack of tiles is a product for each of its matrices.
        each = math.prod(np.broadcast_shapes(left[:-2], right[:-2]))
        made[0] += each
        made[1] += each * drawn_for((training.model.phase, left[-2:], right[-2:]))

    with mock.patch.object(training.model.work, "product", note):
        training.step()
    return made


def show_products(lesson: Lesson) -> None:
    """Who makes how many of the matrix products of a step, and that they are the same ones."""
    lesson.part("Why: one grid")
    lesson.say("A product is always of one tile, and of one block or of one block's keys and values. A schedule only\n"
               "says on which rank they meet; G and T belong to the model. Matrix products of a step, counted as they\n"
               "are made:")
    square = "x".join(map(str, mesh_sides(None, lesson.size)))
    alone = products(VirtualWorld(1).communicators[0], Plan("single")) if lesson.rank == 0 else np.zeros(2, np.int64)
    wanted = all_gather(lesson.comm, alone)[0]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("schedule", *(f"rank {rank}" for rank in range(lesson.size)), "together"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "schedule" else "right")
    table.add_row("single process", *["" for _ in range(lesson.size)], f"{wanted[0]:,}")
    found = []
    for plan in (Plan("tp"), Plan("sp"), Plan("tp+sp", square), Plan("tsp")):
        rows = all_gather(lesson.comm, products(lesson.comm, plan))
        found.append(np.sum(rows, axis=0).tolist())
        table.add_row(str(plan), *(f"{row[0]:,}" for row in rows), f"{found[-1][0]:,}")
    lesson.say(table)
    lesson.check("together they make the single process's products: in each phase, of each pair of shapes, as many",
                 all(each == wanted.tolist() for each in found))
    lesson.part("Why: one tree")
    lesson.say("Products are summed over blocks (a token's output) and over tiles (a weight's gradient). Under TP the\n"
               "sums over blocks cross ranks, and those over tiles are made locally; under SP it is the other way\n"
               "round; on a mesh both cross. Under TSP blocks arrive at each rank in another order, and the sums over\n"
               "tiles cross. But who is added to whom is said by the numbers of blocks and slots alone: a partial\n"
               "waits for the one beside it. Both together leave a schedule no bit to change.")


# What happens without the tree.


@dataclass(frozen=True)
class Trace:
    """A run on virtual ranks, as its rank 0 saw it: digest, losses, and after each step all matrices in one array."""

    digest: str
    losses: list[float]
    weights: list[Array]


def trace(comm: Communicator, plan: Plan) -> Trace:
    """A few steps, and rank 0's collection of all ranks' weights after each."""
    training, weights = Training(CONFIG, comm, plan, drawn_text(), np), []
    for _ in range(STEPS):
        training.step()
        blocks = [array.ravel() for _, _, _, array in stream_blocks(comm, training.model, training.weights)]
        weights += [np.concatenate(blocks)] if comm.rank == 0 else []
    return Trace(digest(training), training.losses, weights)


def traces(seeds: tuple[int, ...]) -> Traces:
    """Every schedule on four virtual ranks, in the orders of turns and deliveries that the seeds draw."""
    return {(plan, seed): VirtualWorld(4, seed).run(partial(trace, plan=plan))[0]
            for plan in VIRTUAL_PLANS for seed in seeds}


@dataclass(frozen=True)
class Distance:
    """How far a run is from the single process's: the largest relative gap of a loss; for each step the part of the
    weights that have other bits; the largest gap of a weight at the end, as a part of the largest weight."""

    loss: float
    other_bits: list[float]
    weight: float


def distance(found: Trace, truth: Trace) -> Distance:
    """Measure it."""
    losses = max(abs(one / other - 1) for one, other in zip(found.losses, truth.losses))
    bits = [float(np.mean(one != other)) for one, other in zip(found.weights, truth.weights)]
    gap = np.max(np.abs(found.weights[-1] - truth.weights[-1])) / np.max(np.abs(truth.weights[-1]))
    return Distance(losses, bits, float(gap))


def show_arrival(lesson: Lesson, with_tree: Traces, without: Traces, truth: Trace) -> None:
    """The same schedules, with sums in order of arrival. Only rank 0 has run them: the others have nothing to judge."""
    lesson.part("On purpose: sums in order of arrival")
    lesson.say("Now each schedule on 4 virtual ranks inside rank 0, each partial added as it comes; the seed draws in\n"
               "which order messages do. Against the single process: the largest relative gap of a loss, the part\n"
               "of the weights that have other bits after each step, and the largest gap of a weight at the end, as a\n"
               "part of the largest:")
    apart = {key: distance(found, truth) for key, found in without.items()}
    lesson.say(arrival_table(with_tree, without, apart))
    lesson.check("with the tree, on the same virtual ranks: the single process's digest, all four",
                 {found.digest for found in with_tree.values()} <= {truth.digest})
    firsts = [found.digest for (_, seed), found in without.items() if seed == SEEDS[0]]
    lesson.check("in order of arrival: four digests, and none is the single process's",
                 len({*firsts, truth.digest}) == len(firsts) + 1)
    same = {str(plan) for plan, _ in without if len({without[plan, seed].digest for seed in SEEDS}) == 1}
    lesson.check("in another order of arrival TP, SP and TSP have yet another; 2 x 2 has not, as a + b is b + a",
                 same == ({"tp+sp 2x2"} if without else set()))
    lesson.check("with each step more weights have other bits",
                 all(far.other_bits == sorted(set(far.other_bits)) for far in apart.values()))
    lesson.check(f"yet all losses agree within {TOLERANCE:g}: a tolerance would have passed every schedule",
                 all(far.loss < TOLERANCE for far in apart.values()))


def arrival_table(with_tree: Traces, without: Traces, apart: dict[tuple[Plan, int], Distance]) -> Table:
    """A row for each run."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("schedule", "seed", "with the tree", "as it comes", "loss",
                    *(f"step {step}" for step in range(1, STEPS + 1)), "weight"):
        table.add_column(heading, no_wrap=True)
    for (plan, seed), far in apart.items():
        tree = with_tree[plan, seed].digest[:12] if (plan, seed) in with_tree else ""
        table.add_row(str(plan), str(seed), tree, without[plan, seed].digest[:12], f"{far.loss:.0e}",
                      *(f"{part:.1%}" for part in far.other_bits), f"{far.weight:.0e}")
    return table


def main(lesson: Lesson) -> None:
    """The lesson, part by part. Rank 0 alone runs the single process and the virtual ranks."""
    lesson.require_comparable_bits()
    lesson.require_ranks(CONFIG.max_ranks)
    truth, single = Outcome("", [0.0] * STEPS, {}, 0, 0), Trace("", [], [])
    with_tree: Traces = {}
    without: Traces = {}
    if lesson.rank == 0:
        truth = train(VirtualWorld(1).communicators[0], Plan("single"))
    outcomes = {plan: train(lesson.comm, plan) for plan in plans(lesson.size)}
    others = {plan: train(lesson.comm, plan) for plan in variants(lesson.size)}
    show_digests(lesson, outcomes | others, truth)
    show_messages(lesson, outcomes)
    show_products(lesson)
    if lesson.rank == 0:
        single, with_tree = trace(VirtualWorld(1).communicators[0], Plan("single")), traces(SEEDS[:1])
        with sums_in_order_of_arrival(tp, sp, tp_sp, tsp, tilewise, all_reduce, gradients, keys_values):
            without = traces(SEEDS)
    show_arrival(lesson, with_tree, without, single)


if __name__ == "__main__":
    run(__doc__, main)
