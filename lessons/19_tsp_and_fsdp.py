"""TSP beside FSDP over the same ranks: the same shards, the same bytes, another grain.

Objective: after this lesson you can say what TSP shares with FSDP (ZeRO-3) over the ranks that cut the sequence, what
it changes, and for which models that matters. Takes ten minutes, and needs nothing but ranks: 1 to 8, real or virtual.

    mpirun -n 4 python lessons/19_tsp_and_fsdp.py
    python lessons/19_tsp_and_fsdp.py --ranks 4 --shuffle 7

Both hold 1/N of the weights and 1/N of the tokens on each rank, so in both the weights travel to the tokens. FSDP+SP
gathers all of a sub-layer's weights before it uses them, and exchanges the keys and values of all heads at once. TSP
brings a block of weights at a time, and a block of heads' keys and values: it uses one while the next is in flight.
(FSDP is arXiv 2304.11277, TSP is arXiv 2604.26294; that they share a grid, a tree and all bits is this project's.)

Look at: the bytes, which are equal, beside the messages, which are not; and the buffers at the peak, which for FSDP+SP
grow with a whole sub-layer, for TSP with a block of it.

Try it: give `CONFIG` the field `num_layers=8`. What both hold for good grows threefold; the buffers stay,
because a sub-layer is all that either gathers. So the deeper the model, the less the choice matters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stage import Lesson, Sent, drawn_text, run, sent_since, table_with

import numpy as np

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.commands.holdings import short
from tsp_ref.formulas.memory import itemsize
from tsp_ref.formulas.messages import Sizes
from tsp_ref.grid.grid import Grid
from tsp_ref.model.config import Config, make_config
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import FOLDED, Plan

CONFIG = make_config("tiny", tiles=16, steps=1, warmup_steps=0)
WIDER = [replace(CONFIG, ffn_size=times * CONFIG.ffn_size) for times in (1, 2, 4)]
LONGER = [replace(CONFIG, seq_len=times * CONFIG.seq_len) for times in (1, 4, 16)]


@dataclass(frozen=True)
class Step:
    """A training step, as one rank saw it.

    digest   of all bits; "" but on rank 0
    sent     (sub-layer, direction, purpose) -> messages, bytes
    buffers  the most bytes that what is received took at a time
    peak     the most bytes of all kinds together
    """

    digest: str
    sent: Sent
    buffers: int
    peak: int
    grid: Grid


def training_step(comm: Communicator, config: Config, schedule: str) -> Step:
    """One step under a schedule, and what it cost."""
    training = Training(config, comm, Plan(schedule, counted=True), drawn_text(), np)
    before = sent_since(comm, {})
    training.step()
    memory = training.model.memory
    return Step(digest(training), sent_since(comm, before), memory.peak["buffers"], memory.total_peak,
                training.model.grid)


# The same bytes.


def forward_of(sent: Sent) -> tuple[int, int]:
    """Messages and bytes that bring weights in the forward."""
    found = [sent[key] for key in sent if key[1] == "forward" and key[2].endswith("WEIGHTS")]
    return sum(count for count, _ in found), sum(size for _, size in found)


def weights_formula(config: Config) -> int:
    """Bytes of weights that all ranks together send in a forward, over N - 1: every block is sent N - 1 times, once to
    each rank that does not own it, whether all at once or one after another, straight or round a ring."""
    sizes = Sizes(config)
    layers = config.num_layers * (sizes.attention + sizes.mlp)
    return config.blocks * (layers + 2 * sizes.table) * itemsize(config)


def show_bytes(lesson: Lesson, steps: dict[str, Step]) -> None:
    """That what travels is the same, in other pieces."""
    lesson.part("The same bits, the same bytes")
    table = table_with("schedule", "digest", "messages with weights, forward", "bytes", "all bytes of the step")
    totals: dict[str, list[int]] = {}
    for schedule, step in steps.items():
        row = [*forward_of(step.sent), sum(size for _, size in step.sent.values())]
        totals[schedule] = everyones(lesson, row)
        table.add_row(schedule, step.digest[:16], *(f"{number:,}" for number in totals[schedule]))
    lesson.say(table)
    lesson.say("Of all ranks together. A block of weights must come to N - 1 ranks, and each rank needs it once in the "
               "forward: (N - 1)·W bytes, by whatever way. The step's other bytes are keys, values and gradients.")
    digests = {step.digest for step in steps.values()}
    lesson.check("one digest: both train the same bits", lesson.rank > 0 or len(digests) == 1)
    lesson.check("weights cost (N - 1)·W bytes in the forward under both",
                 all(total[1] == (lesson.size - 1) * weights_formula(CONFIG) for total in totals.values()))
    lesson.check("and the whole step costs as many bytes under both", totals["tsp"][2] == totals["fsdp+sp"][2])


def everyones(lesson: Lesson, numbers: list[int]) -> list[int]:
    """The sums over all ranks."""
    rows: Array = np.stack(all_gather(lesson.comm, np.array(numbers, dtype=np.int64)))
    return [int(total) for total in rows.sum(axis=0)]


# Another grain.


def gathered_bytes(config: Config, grid: Grid) -> int:
    """What FSDP+SP receives of its largest sub-layer: all blocks but the rank's own."""
    sizes = Sizes(config)
    return (config.blocks - len(grid.blocks)) * max(sizes.attention, sizes.mlp, sizes.table) * itemsize(config)


def show_grain(lesson: Lesson, title: str, configs: list[Config], what: str) -> list[dict[str, Step]]:
    """Buffers at the peak of this rank, as the model grows in one direction."""
    lesson.part(title)
    table = table_with(what, "a sub-layer's weights", "buffers, FSDP+SP", "buffers, TSP", "peak, FSDP+SP", "peak, TSP",
                       "over")
    found = []
    for config in configs:
        steps = {schedule: training_step(lesson.comm, config, schedule) for schedule in FOLDED}
        fsdp, tsp = (steps[schedule] for schedule in FOLDED)
        table.add_row(str(getattr(config, what)), short(gathered_bytes(config, fsdp.grid)), short(fsdp.buffers),
                      short(tsp.buffers), short(fsdp.peak), short(tsp.peak), f"{fsdp.peak / tsp.peak:.2f}")
        found.append(steps)
    lesson.say(table)
    return found


def show_widths(lesson: Lesson) -> None:
    """The wider the MLP, the more FSDP+SP gathers at once."""
    found = show_grain(lesson, "Another grain: weights", WIDER, "ffn_size")
    lesson.say("Bytes of rank 0. FSDP+SP receives a sub-layer's weights whole, and the next one's under them; TSP "
               "holds the block in use, the next, and the one that is sent on.")
    lesson.check("FSDP+SP holds a whole sub-layer's weights of the other ranks at its peak", all(
        steps["fsdp+sp"].buffers >= gathered_bytes(config, steps["fsdp+sp"].grid)
        for config, steps in zip(WIDER, found)))
    lesson.check("and more buffers than TSP, unless nothing travels", all(
        steps["fsdp+sp"].buffers > steps["tsp"].buffers or lesson.size == 1 for steps in found))
    growth = [found[-1][schedule].buffers - found[0][schedule].buffers for schedule in FOLDED]
    lesson.check("a wider MLP adds more to FSDP+SP's buffers than to TSP's", growth[0] > growth[1] or lesson.size == 1)


def show_lengths(lesson: Lesson) -> None:
    """The longer the sequence, the more keys and values are in flight at once."""
    found = show_grain(lesson, "Another grain: keys and values", LONGER, "seq_len")
    lesson.say("Here keys and values grow, of which FSDP+SP receives all heads', TSP a block's and the next two. But "
               "what both keep for the backward grows too, and soon outweighs any buffer.")
    growth = [found[-1][schedule].buffers - found[0][schedule].buffers for schedule in FOLDED]
    lesson.check("a longer sequence adds more to FSDP+SP's buffers than to TSP's",
                 growth[0] > growth[1] or lesson.size == 1)


def main(lesson: Lesson) -> None:
    """All parts, on one rank."""
    lesson.require_ranks(CONFIG.blocks)
    lesson.require_comparable_bits()
    show_bytes(lesson, {schedule: training_step(lesson.comm, CONFIG, schedule) for schedule in FOLDED})
    show_widths(lesson)
    show_lengths(lesson)
    lesson.part("When it matters")
    lesson.say("The difference is at most the other ranks' weights of two sub-layers, a layer's keys and values, and "
               "the gradients in flight, less the few blocks that TSP holds of each; whatever the depth. It is small "
               "beside a deep model's state, and beside what a forward keeps where nothing is recomputed. It is large "
               "where one layer is a large part of the whole. For time the grain counts where the first use of a "
               "gathered sub-layer waits for all of it: in the MLP and the head TSP begins with its own block.")


if __name__ == "__main__":
    run(__doc__ or "", main)
