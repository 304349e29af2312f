"""Where the memory goes: what ranks hold under TP, SP, TP+SP and TSP, and what it is made of when it is most.

Objective: after this lesson you can say of everything that a rank holds whether a schedule divides it by N or not,
predict model state and kept activations to the byte, say when a rank holds most and what that is made of, and what
recomputation saves and costs.

    mpirun -n 4 python lessons/12_where_the_memory_goes.py
    python lessons/12_where_the_memory_goes.py --ranks 4 --shuffle 7

(That TP divides model state by N and activations not, SP activations and not model state, a mesh of T x Σ ranks the one
by T and the other by Σ, and TSP both by N, is what readers of arXiv 2604.26294 report of it. The formulas, what is kept
in blocks, and all figures are this project's.)

Look at: the second table, where every fraction is that of the blocks or that of the tiles that a rank holds, or both;
what a token costs under TP and under TSP, and that at the peak it is not only what was kept; and the last part, where
Python's own account of a training step is set against the program's accounting.

Try it: with 4 ranks, give `CONFIG` eight layers (`num_layers=8`). With each token TSP's peak then grows by a smaller
part of what TP's does: a further layer adds only what is kept of it, which TSP divides by N. (Nothing fails.)
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TypeAlias

from stage import Lesson, drawn_text, run, sent_since, table_with

import numpy as np

from tsp_ref.accounting.memory import KINDS, MODEL_STATE
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather, gather_texts
from tsp_ref.comm.virtual import VirtualCommunicator, VirtualWorld
from tsp_ref.commands.holdings import short
from tsp_ref.formulas.memory import activation_bytes, gain_bytes, itemsize, model_state_bytes
from tsp_ref.formulas.messages import step_messages
from tsp_ref.formulas.work import step_flops
from tsp_ref.model.activations import AttentionSaved, MlpSaved
from tsp_ref.model.config import Config, make_config
from tsp_ref.model.model import RECOMPUTE
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan, meshes

TILE = 16
CONFIG = make_config("tiny", seq_len=8 * TILE, tiles=8, batch_size=1, steps=1, warmup_steps=1)
LONGER = replace(CONFIG, seq_len=16 * TILE, tiles=16)  # tiles of the same length, twice as many
# Large enough that Python's objects for arrays, ranks and messages do not matter.
LARGE = replace(CONFIG, num_layers=1, hidden_size=256, ffn_size=256, seq_len=2048)
TOLERANCE = 0.05


@dataclass(frozen=True)
class Accounts:
    """What the accounts of one rank say after a training step in which everything was counted, in bytes.

    state      the largest that weights, gradients and moments were together
    kept       activations held between forward and backward
    inputs     of these, the inputs of the sub-layers and of the head, with what the head keeps beside it
    in_blocks  of these, what was computed by blocks of weights
    peak       what was held when most was held, by kind; `phase` says when
    flops      floating-point operations of matrix products, by phase
    sent       bytes sent, by phase
    formula    state, kept, flops and sent as `tsp_ref.formulas` has them for this rank
    blocks     how many of the G blocks it holds
    tiles      how many of the T tiles it holds
    """

    state: int
    kept: int
    inputs: int
    in_blocks: int
    peak: dict[str, int]
    phase: str
    flops: dict[str, int]
    sent: dict[str, int]
    formula: dict[str, int]
    blocks: int
    tiles: int

    @property
    def total(self) -> int:
        """The peak of all kinds together."""
        return sum(self.peak.values())


Measured: TypeAlias = dict[Plan, list[Accounts]]
"""plan -> the accounts of each of its ranks."""


def count(comm: Communicator, config: Config, plan: Plan) -> Accounts:
    """One step of training, counted."""
    before, training = sent_since(comm, {}), Training(config, comm, replace(plan, counted=True), drawn_text(), np)
    model = training.model
    _, saved = training.forward()
    kept = model.memory.held["activations"]
    in_blocks = sum(kept_in_blocks(attention, mlp) for attention, mlp in zip(saved.attention, saved.mlp))
    training.strategy.backward(saved, training.weights, training.gradients)
    training.update()
    phase, peak = max(model.memory.peaks.items(), key=lambda item: sum(item[1].values()))
    sent: dict[str, int] = {}
    for (*where, _), (_, size) in sent_since(comm, before).items():
        sent[" ".join(where)] = sent.get(" ".join(where), 0) + size
    flops = {" ".join(where): number for where, number in model.work.flops.items()}
    return Accounts(model.memory.model_state_peak, kept, kept - in_blocks, in_blocks, peak, " ".join(phase), flops,
                    sent, formulas(config, plan, training), len(model.grid.blocks), len(model.grid.slots))


def kept_in_blocks(attention: AttentionSaved, mlp: MlpSaved) -> int:
    """Bytes of a layer's activations that were computed by blocks of weights; none, where all is to be recomputed."""
    by_blocks = (attention.q, attention.keys_values, attention.heads, attention.logsumexp, mlp.projected)
    return sum(array.nbytes for kept in by_blocks for array in kept.values())


def formulas(config: Config, plan: Plan, training: Training) -> dict[str, int]:
    """The closed formulas for this rank."""
    grid, folded = training.model.grid, plan.schedule == "tsp"
    step = {} if plan.schedule == "single" else step_messages(plan.schedule, config, grid, plan.recompute)
    return {"state": model_state_bytes(config, grid),
            "kept": activation_bytes(config, grid, plan.recompute, folded),
            "flops": sum(step_flops(config, grid, plan.recompute, folded).values()),
            "sent": sum(traffic.elements for traffic in step.values()) * itemsize(config)}


def measure(lesson: Lesson, plan: Plan, config: Config = CONFIG) -> list[Accounts]:
    """The accounts of every rank; of a single process, which is rank 0 alone, its."""
    if plan.schedule == "single":
        alone = VirtualWorld(1).communicators[0]
        text = json.dumps(asdict(count(alone, config, plan))) if lesson.rank == 0 else ""
        return [Accounts(**json.loads(gather_texts(lesson.comm, text)[0]))]
    mine = json.dumps(asdict(count(lesson.comm, config, plan)))
    return [Accounts(**json.loads(text)) for text in gather_texts(lesson.comm, mine)]


def plans(size: int, recompute: str) -> list[Plan]:
    """A single process and every schedule on so many ranks; no mesh with an axis of one rank, which is TP or SP."""
    both = [mesh for mesh in meshes(size) if "1" not in mesh.split("x")]
    chosen = [("single", None), ("tp", None), ("sp", None), *(("tp+sp", mesh) for mesh in both), ("tsp", None)]
    return [Plan(schedule, mesh, recompute=recompute) for schedule, mesh in chosen]


def largest(rows: list[Accounts], figure: Callable[[Accounts], int]) -> int:
    """The largest of a figure over the ranks."""
    return max(map(figure, rows))


def part_of(found: int, whole: int) -> str:
    """A ratio, as a fraction if that is a simple one."""
    ratio = Fraction(found, whole)
    return str(ratio) if ratio.denominator <= 64 else f"{float(ratio):.3f}"


# The lesson.


def show_peaks(lesson: Lesson, measured: Measured) -> None:
    """When each schedule holds most, and what."""
    lesson.part("At the peak")
    lesson.say(f"L={CONFIG.num_layers} layers, h={CONFIG.hidden_size}, f={CONFIG.ffn_size}, a sequence of "
               f"S={CONFIG.seq_len} tokens. What the rank that holds most holds when it holds most,\nin bytes; every "
               "array of a training step is counted from birth to death:")
    table = table_with("schedule", "in the", *KINDS, "all", "of one")
    shown = {plan: rows for plan, rows in measured.items() if plan.recompute == "none"}
    one = shown[Plan("single")][0]
    for plan, rows in shown.items():
        most = max(rows, key=lambda accounts: accounts.total)
        table.add_row(str(plan), most.phase, *(short(most.peak[kind]) for kind in KINDS), short(most.total),
                      f"{most.total / one.total:.2f}")
    lesson.say(table)
    lesson.say("Activations are what the forward keeps for the backward; buffers, what messages lie in; working is\n"
               "all else: what a sub-layer computes and forgets. So most is held in the backward, when nearly all\n"
               "that was kept is still there, and a layer is at work.")
    everything = [accounts for rows in measured.values() for accounts in rows]
    lesson.check("all peaks are in the backward of a sub-layer",
                 {accounts.phase for accounts in everything} <= {"attention backward", "mlp backward"})
    lesson.check("at each, weights, gradients and moments are 1 : 1 : 2, and to the byte what the formula says",
                 all([accounts.peak[kind] * 4 for kind in MODEL_STATE]
                     == [accounts.formula["state"] * times for times in (1, 1, 2)] for accounts in everything))


def show_parts(lesson: Lesson, measured: Measured) -> None:
    """What is divided by N, and what is not."""
    lesson.part("Parts of what one process holds")
    lesson.say("Model state, without the norms' gains, which every rank holds; and activations kept between forward\n"
               "and backward, with recomputation of all that can be recomputed, and with none:")
    none: dict[str, Callable[[Accounts], int]] = {
        "kept, none": lambda accounts: accounts.kept, "inputs": lambda accounts: accounts.inputs,
        "in blocks": lambda accounts: accounts.in_blocks}
    table = table_with("schedule", "blocks", "tiles", "model state", "kept, full", *none)
    gains = gain_bytes(CONFIG)
    one, one_full = measured[Plan("single")][0], measured[Plan("single", recompute="full")][0]
    for plan, rows in measured.items():
        if plan.recompute == "none":
            full = measured[replace(plan, recompute="full")]
            table.add_row(
                str(plan), part_of(largest(rows, lambda accounts: accounts.blocks), CONFIG.blocks),
                part_of(largest(rows, lambda accounts: accounts.tiles), CONFIG.tiles),
                part_of(largest(rows, lambda accounts: accounts.state) - gains, one.state - gains),
                part_of(largest(full, lambda accounts: accounts.kept), one_full.kept),
                *(part_of(largest(rows, figure), figure(one)) for figure in none.values()))
    lesson.say(table)
    lesson.say("Kept with full recomputation: the layers' inputs, of a rank's tokens. With none: also what is\n"
               "computed by blocks, queries, keys, values, heads, gate and up, of its tokens and of the blocks that\n"
               "they meet here. So TP keeps less than 1 of it all: all inputs, but 1/N of what lies in blocks.")
    check_parts(lesson, measured, gains)


def beside_one(measured: Measured, recompute: str) -> Iterator[tuple[Plan, Accounts, Accounts]]:
    """(plan, a rank's accounts, those of one process) for every rank of every plan."""
    one = measured[Plan("single", recompute=recompute)][0]
    for plan, rows in measured.items():
        if plan.recompute == recompute:
            yield from ((plan, accounts, one) for accounts in rows)


def check_parts(lesson: Lesson, measured: Measured, gains: int) -> None:
    """Exact fractions, on every rank."""
    blocks, tiles = CONFIG.blocks, CONFIG.tiles
    lesson.check("model state: one process's, times blocks held / G, on every rank", all(
        (accounts.state - gains) * blocks == (one.state - gains) * accounts.blocks
        for _, accounts, one in beside_one(measured, "none")))
    lesson.check("kept with full recomputation: one process's, times tiles held / T", all(
        accounts.kept * tiles == one.kept * accounts.tiles and accounts.in_blocks == 0
        for _, accounts, one in beside_one(measured, "full")))
    lesson.check("kept with none: inputs times tiles held / T; in blocks times that times blocks met / G", all(
        accounts.inputs * tiles == one.inputs * accounts.tiles
        and accounts.in_blocks * tiles * blocks == one.in_blocks * accounts.tiles * met(plan, accounts)
        for plan, accounts, one in beside_one(measured, "none")))
    lesson.check("state and both of the kept are to the byte what `tsp_ref.formulas.memory` says", all(
        (accounts.state, accounts.kept) == (accounts.formula["state"], accounts.formula["kept"])
        for rows in measured.values() for accounts in rows))


def met(plan: Plan, accounts: Accounts) -> int:
    """How many blocks a rank computes with: under TSP all, as they come to it."""
    return CONFIG.blocks if plan.schedule == "tsp" else accounts.blocks


@dataclass(frozen=True)
class Growth:
    """Bytes for each further token, the mean of the ranks: kept, and by kind at the peak; `start`, what the peak would
    be without tokens on a straight line; `kept_whole`, bytes kept for each token of the longer sequence."""

    kept: Fraction
    peak: dict[str, Fraction]
    start: Fraction
    kept_whole: Fraction


def growth(short_rows: list[Accounts], long_rows: list[Accounts]) -> Growth:
    """From two lengths of a sequence, the same schedule."""
    ranks = len(short_rows)

    def slope(figure: Callable[[Accounts], int]) -> Fraction:
        return Fraction(sum(map(figure, long_rows)) - sum(map(figure, short_rows)),
                        ranks * (LONGER.seq_len - CONFIG.seq_len))

    peak = {kind: slope(lambda accounts, kind=kind: accounts.peak[kind]) for kind in KINDS}  # type: ignore[misc]
    start = Fraction(sum(accounts.total for accounts in short_rows), ranks) - sum(peak.values()) * CONFIG.seq_len
    return Growth(slope(lambda accounts: accounts.kept), peak, start,
                  Fraction(sum(accounts.kept for accounts in long_rows), ranks * LONGER.seq_len))


def show_growth(lesson: Lesson, measured: Measured) -> None:
    """What a further token costs under TP and under TSP."""
    lesson.part("Longer sequences")
    lesson.say(f"Now S={LONGER.seq_len}, in twice as many tiles, with full recomputation. Bytes for each further "
               "token, the mean of\nthe ranks: what is kept for the backward, and what is held at the peak, by kind. "
               "Last, what is left at\nthe peak if a straight line through both lengths is followed down to no token:")
    kinds = [kind for kind in KINDS if kind not in MODEL_STATE]
    table = table_with("schedule", "kept", "at the peak", *kinds, "of no token")
    found = {}
    for schedule in ("tp", "tsp"):
        plan = Plan(schedule, recompute="full")
        found[schedule] = grown = growth(measured[plan], measure(lesson, plan, LONGER))
        numbers = [grown.kept, sum(grown.peak.values()), *(grown.peak[kind] for kind in kinds)]
        table.add_row(schedule, *(f"{float(number):,.0f}" for number in numbers), short(float(grown.start)))
    lesson.say(table)
    ratio = float(sum(found["tsp"].peak.values()) / sum(found["tp"].peak.values()))
    lesson.say(f"At the peak TSP's is {ratio:.2f} of TP's. Beside what was kept of all layers, one layer is at work "
               "there: what\nit computes by blocks is divided by N under both, and the scores of a tile of queries are "
               "under neither.\nThe more layers, the more what was kept outweighs that. (Buffers at the peak, and so "
               "the peak, depend a\nlittle on when messages come: a piece of a gradient more or less waits for "
               "another.)")
    check_growth(lesson, found)


def check_growth(lesson: Lesson, found: dict[str, Growth]) -> None:
    """The slopes against the formula."""
    numbers = (CONFIG.num_layers + 1) * CONFIG.hidden_size + 1
    tp, tsp = found["tp"], found["tsp"]
    lesson.check(f"TP keeps (L+1)h + 1 = {numbers} numbers a token: the inputs of layers and head, a log-sum-exp",
                 tp.kept == tp.kept_whole == numbers * itemsize(CONFIG))
    lesson.check("TSP keeps 1/N of that, exactly", tsp.kept == tsp.kept_whole == tp.kept / lesson.size)
    lesson.check("model state is the same for both lengths",
                 not any(grown.peak[kind] for grown in found.values() for kind in MODEL_STATE))
    if lesson.size > 1:
        lesson.check("TSP's peak grows less with a token than TP's", sum(tsp.peak.values()) < sum(tp.peak.values()))


def show_recompute(lesson: Lesson, measured: Measured) -> None:
    """What recomputation saves and costs under TSP."""
    lesson.part("Computing it twice")
    lesson.say("TSP, the largest over the ranks, and in brackets over what it is without recomputation. Bytes held,\n"
               "or sent in a step; operations are those of a step's matrix products:")
    modes = {mode: measured[Plan("tsp", recompute=mode)] for mode in RECOMPUTE}
    figures: dict[str, Callable[[Accounts], int]] = {
        "kept": lambda accounts: accounts.kept, "at the peak": lambda accounts: accounts.total,
        "operations": lambda accounts: sum(accounts.flops.values()),
        "sent": lambda accounts: sum(accounts.sent.values())}
    table = table_with("recompute", *figures)
    for mode, rows in modes.items():
        sizes = [(largest(rows, figure), largest(modes["none"], figure)) for figure in figures.values()]
        table.add_row(mode, *(f"{short(size)} ({size / whole:.2f})" if whole else "0" for size, whole in sizes))
    lesson.say(table)
    for mode, parts in (("attention", ["attention forward"]), ("full", ["attention forward", "mlp forward"])):
        lesson.check(f"{mode}: operations and bytes sent are one more {' and '.join(parts)}", all(
            sum(getattr(again, of).values()) == sum(getattr(plain, of).values()) + sum(
                getattr(plain, of).get(part, 0) for part in parts)
            for plain, again in zip(modes["none"], modes[mode]) for of in ("flops", "sent")))
    lesson.check("all schedules: operations and bytes sent are to the last one what `tsp_ref.formulas` says", all(
        sum(accounts.flops.values()) == accounts.formula["flops"]
        and sum(accounts.sent.values()) == accounts.formula["sent"]
        for rows in measured.values() for accounts in rows))


def traced(comm: Communicator, plan: Plan) -> int:
    """What a training step, uncounted, allocates at its peak, by the account of Python's allocators."""
    text = drawn_text()
    tracemalloc.start()
    try:
        Training(LARGE, comm, plan, text, np).step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def show_tracemalloc(lesson: Lesson) -> None:
    """The accounts of a counted step beside Python's account of an uncounted one."""
    lesson.part("Are the accounts right?")
    lesson.say(f"A larger model, h={LARGE.hidden_size} and S={LARGE.seq_len}, so that Python's own objects weigh "
               "little. At the peak of a\nstep, by its accounts, and by tracemalloc in one where nothing is counted:")
    shared = isinstance(lesson.comm, VirtualCommunicator) and lesson.size > 1
    comm: Communicator = lesson.comm
    plan, who = Plan("tsp"), list(range(lesson.size))
    if shared:
        # All ranks are threads of one process, and share its account; so one alone, while the others wait.
        comm, plan, who = VirtualWorld(1).communicators[0], Plan("single"), [0]
    mine = [count(comm, LARGE, plan).total, traced(comm, plan)] if lesson.rank in who else [0, 0]
    gathered = all_gather(lesson.comm, np.array(mine, dtype=np.int64))
    rows = [gathered[rank].tolist() for rank in who]
    for rank, (accounts, python) in zip(who, rows):
        lesson.say(f"  {plan} on rank {rank}: accounts {accounts:,}, tracemalloc {python:,} bytes: "
                   f"{python / accounts - 1:+.1%}")
    if shared:
        lesson.say("  (Virtual ranks share one process, so this is a single process. Under mpirun it is every rank.)")
    lesson.say("NumPy gives a temporary array's memory to the next result when it can; counted, it does not. And each\n"
               "array is an object, of a hundred bytes or so. Neither account sees what MPI allocates for itself.")
    accounts, python = (sum(column) for column in zip(*rows))
    lesson.check(f"they agree within {TOLERANCE:.0%}, all together", abs(python / accounts - 1) < TOLERANCE)


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_comparable_bits()
    lesson.require_ranks(CONFIG.max_ranks)
    measured = {plan: measure(lesson, plan) for mode in ("none", "full") for plan in plans(lesson.size, mode)}
    show_peaks(lesson, measured)
    show_parts(lesson, measured)
    show_growth(lesson, measured)
    attention = Plan("tsp", recompute="attention")
    show_recompute(lesson, measured | {attention: measure(lesson, attention)})
    show_tracemalloc(lesson)


if __name__ == "__main__":
    run(__doc__, main)
