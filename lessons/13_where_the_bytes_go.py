"""Where the bytes go: what TP, SP, TP+SP and TSP send in a step, and from which B·S on TSP sends less than TP.

Objective: after this lesson you can derive what each schedule sends in a layer, forward and backward, check it against
a ledger to the byte, and find by counting where TSP overtakes TP, and what grouped-query attention does to that.

    mpirun -n 4 python lessons/13_where_the_bytes_go.py
    python lessons/13_where_the_bytes_go.py --ranks 4 --shuffle 7

(That TSP's forward sends less than TP's from B·S > 8h on, with one query head to a key/value head and f = 4h, is
reported by readers of arXiv 2604.26294 to be said there. All formulas here, the backward and everything about numbers
of ranks that are no power of two are this project's: derived, and then counted.)

Look at: the first table, in which every number was counted and equals a formula; the sweep, where one column grows
with the tokens and the others start high and grow less; the gradients of keys and values, of which a causal mask saves
a quarter; and the last table: 3, 5, 6 or 7 ranks send more than the formulas for even numbers say.

Try it: with 4 ranks, make the MLP of `SWEEP` narrower, `ffn_size=64`, so that F = 2. Where do the columns
cross now? Predict it first: set 2BSh/g + W equal to 4BSh, with W = (2 + 2/g + 3F)h^2. (At 5h and at 3h; nothing fails.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

from stage import Lesson, Sent, drawn_text, random_tiles, run, sent_since, subtrees, table_with

import numpy as np

from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.formulas.memory import itemsize
from tsp_ref.formulas.messages import closed_layer, step_messages
from tsp_ref.grid.grid import ALONE, Grid, Place, folded
from tsp_ref.model.config import Config, make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import initial_parameters
from tsp_ref.process.terminal import console_for
from tsp_ref.schedules import tp, tsp
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan, meshes

CONFIG = make_config("tiny", num_heads=16, num_kv_heads=8, steps=1, warmup_steps=1)
# One layer, f = 4h; with as many key/value heads as query heads, and with half as many.
SWEEP = make_config("tiny", num_layers=1, hidden_size=32, num_heads=16, num_kv_heads=16, ffn_size=128, batch_size=1)
GROUPS = {1: SWEEP, 2: replace(SWEEP, num_kv_heads=8)}
TOKENS = [times * SWEEP.hidden_size for times in range(2, 11)]
LAYER = ("attention", "mlp")
DIRECTIONS = ("forward", "backward")
PHASES = (*((part, "forward") for part in ("embedding", *LAYER, "head", "loss")),
          *((part, "backward") for part in ("head", "mlp", "attention", "embedding", "gains", "optimizer")))


@dataclass(frozen=True)
class Step:
    """A training step under a plan, as one rank saw it: what it sent, and the grid that says what it holds."""

    sent: Sent
    grid: Grid


Steps: TypeAlias = dict[Plan, Step]


def training_step(comm: Communicator, plan: Plan) -> Step:
    """One step, and its messages."""
    before, training = sent_since(comm, {}), Training(CONFIG, comm, plan, drawn_text(), np)
    training.step()
    return Step(sent_since(comm, before), training.model.grid)


def plans(size: int) -> list[Plan]:
    """Every schedule on so many ranks; no mesh with an axis of one rank, which is TP or SP."""
    both = [mesh for mesh in meshes(size) if "1" not in mesh.split("x")]
    return [Plan("tp"), Plan("sp"), *(Plan("tp+sp", mesh) for mesh in both), Plan("tsp")]


def bytes_of(sent: Sent, part: str | None = None, direction: str | None = None, purpose: str | None = None) -> int:
    """Bytes sent in a sub-layer, a direction, for a purpose, if named."""
    wanted = (part, direction, purpose)
    return sum(size for key, (_, size) in sent.items() if all(want in (None, is_) for want, is_ in zip(wanted, key)))


def over_ranks(lesson: Lesson, numbers: list[int]) -> list[list[int]]:
    """Every rank's numbers, on every rank."""
    return [row.tolist() for row in all_gather(lesson.comm, np.array(numbers, dtype=np.int64))]


# The formulas, in elements, for one layer. T and Σ are the ranks on the axis of weights and on that of tokens.


@dataclass(frozen=True)
class Formulas:
    """What a rank sends in a layer where everything divides evenly.

    sums         what an all-reduce of all tokens is of: B·S·h
    keys_values  keys and values of all tokens: 2·B·S·h/g
    weights      the weights of a layer: (2 + 2/g + 3F)·h²
    """

    sums: Fraction
    keys_values: Fraction
    weights: Fraction

    @classmethod
    def of(cls, config: Config) -> Formulas:
        """With a model's sizes."""
        h, tokens = config.hidden_size, config.batch_size * config.seq_len
        g, wide = Fraction(config.group_size), Fraction(config.ffn_size, h)
        return cls(Fraction(tokens * h), 2 * tokens * h / g, (2 + 2 / g + 3 * wide) * h * h)

    def both(self, schedule: str, grid: Grid) -> list[Fraction]:
        """Forward and backward of the rank of a grid."""
        places = grid.weight_axis, grid.token_axis
        return [self.forward(schedule, *places), self.backward(schedule, *places)]

    def forward(self, schedule: str, weights: Place, tokens: Place) -> Fraction:
        """TP: an all-reduce for each of two sub-layers, of which each is an exchange and a gather. SP: keys and values.
        A mesh: TP for 1/Σ of the tokens, SP for 1/T of the heads. TSP: keys and values, and the weights."""
        if schedule == "tsp":
            return (self.keys_values + self.weights) * others(tokens)
        return 4 * self.sums / tokens.size * others(weights) + self.keys_values / weights.size * others(tokens)

    def backward(self, schedule: str, weights: Place, tokens: Place) -> Fraction:
        """All that the forward sends, again: under TP gradients of inputs, else keys and values, and TSP's weights.
        And to their owners: gradients of keys and values; of weights, under SP and on a mesh also on to all."""
        again = self.forward(schedule, weights, tokens)
        if schedule == "tsp":
            return again + self.reduced(tokens) + self.weights * others(tokens)
        return again + self.reduced(tokens) / weights.size + 2 * self.weights / weights.size * others(tokens)

    def reduced(self, tokens: Place) -> Fraction:
        """Gradients of keys and values that a rank sends to their owners: for all others' tiles in the first half of
        the text, which its own last tile sees, and for those in the second half that lie before its own."""
        return self.keys_values / 2 * Fraction(2 * (tokens.size - 1) - tokens.rank, tokens.size)


def others(axis: Place) -> Fraction:
    """(N-1)/N."""
    return Fraction(axis.size - 1, axis.size)


def crossing(group: int, wide: Fraction) -> Fraction:
    """B·S / h from which TSP's forward sends less than TP's: 2·B·S·h/g + W = 4·B·S·h."""
    return (2 + Fraction(2, group) + 3 * wide) / (4 - Fraction(2, group))


def even(size: int) -> bool:
    """Whether everything divides evenly on so many ranks."""
    return CONFIG.tiles // 2 % size == 0 and CONFIG.blocks % size == 0 and size & (size - 1) == 0


# The lesson.


def show_ledger(lesson: Lesson, steps: Steps) -> None:
    """Every schedule's messages, counted and by the exact formulas."""
    lesson.part("Counted, and by formula")
    lesson.say(f"L={CONFIG.num_layers} layers, h={CONFIG.hidden_size}, f={CONFIG.ffn_size}, g={CONFIG.group_size} "
               f"query heads to a key/value head, B={CONFIG.batch_size}, S={CONFIG.seq_len}. Bytes that all ranks\n"
               "together sent in a training step, from their ledgers:")
    table = table_with("", *(str(plan) for plan in steps))
    rows = {plan: np.sum(over_ranks(lesson, [bytes_of(step.sent, *phase) for phase in PHASES]), axis=0)
            for plan, step in steps.items()}
    for number, phase in enumerate(PHASES):
        if number and phase[1] != PHASES[number - 1][1]:
            table.add_section()
        table.add_row(" ".join(phase), *(f"{row[number]:,}" if row[number] else "" for row in rows.values()))
    table.add_section()
    table.add_row("all", *(f"{int(row.sum()):,}" for row in rows.values()))
    lesson.say(table)
    lesson.check("on every rank, messages and bytes of each sub-layer, direction and purpose are `step_messages`'s",
                 all(step.sent == exact(plan.schedule, CONFIG, step.grid) for plan, step in steps.items()))
    everything = [sum(map(sum, over_ranks(lesson, [bytes_of(step.sent)]))) for step in steps.values()]
    lesson.check("and the table has them all", everything == [int(row.sum()) for row in rows.values()])


def exact(schedule: str, config: Config, grid: Grid) -> Sent:
    """What the exact formulas say that the rank of a grid sends, in bytes, by the tags' names."""
    return {(part, direction, purpose.name): (traffic.messages, traffic.elements * itemsize(config))
            for (part, direction, purpose), traffic in step_messages(schedule, config, grid).items()}


def layer_bytes(sent: Sent, direction: str) -> int:
    """Bytes sent in the attention and the MLP of all layers."""
    return sum(bytes_of(sent, part, direction) for part in LAYER)


def show_layer(lesson: Lesson, steps: Steps) -> None:
    """A layer, against the closed forms."""
    lesson.part("A layer")
    lesson.say("In the forward of a layer a rank sends, with g = H/K and F = f/h, (N-1)/N times these numbers:\n"
               "  TP   4 B S h                             two all-reduces, each an exchange and a gather\n"
               "  SP   2 B S h / g                         keys and values\n"
               "  TSP  2 B S h / g + (2 + 2/g + 3F) h^2    keys and values, and the weights\n"
               "and on a mesh of T x Σ what TP sends of 1/Σ of the tokens, and SP of 1/T of the heads. The backward\n"
               "sends it all again, and gradients of keys, values and weights to their owners. Mean of ranks, bytes:")
    table = table_with("schedule", "forward", "formula", "ratio", "backward", "formula", "ratio")
    formulas, alike, equal = Formulas.of(CONFIG), True, True
    for plan, step in steps.items():
        closed = formulas.both(plan.schedule, step.grid)
        alike = alike and closed == [
            closed_layer(plan.schedule, way, CONFIG, step.grid.weight_axis, step.grid.token_axis) for way in DIRECTIONS]
        counted = [layer_bytes(step.sent, way) for way in DIRECTIONS]
        equal = equal and counted == [CONFIG.num_layers * itemsize(CONFIG) * number for number in closed]
        means = np.mean(over_ranks(lesson, counted), axis=0) / CONFIG.num_layers
        rows = [formulas.both(plan.schedule, grid) for grid in grids(plan.schedule, lesson.size, step.grid)]
        wanted = [itemsize(CONFIG) * float(sum(column)) / lesson.size for column in zip(*rows)]
        table.add_row(str(plan), *(cell for found, number in zip(means, wanted)
                                   for cell in (f"{found:,.0f}", f"{number:,.0f}", f"{found / number:.3f}")))
    lesson.say(table)
    lesson.check("these formulas are `closed_layer`'s, forward and backward", alike)
    if even(lesson.size):
        lesson.check("on every rank, every schedule: what was counted is the formula, to the byte", equal)
    else:
        lesson.say(f"  (On {lesson.size} ranks not all divides evenly: a rank's leaves are no whole subtree, and more "
                   "pieces of sums travel.)")


def show_crossing(lesson: Lesson) -> None:
    """TSP's forward against TP's, for longer and longer sequences."""
    lesson.part("Where TSP overtakes TP")
    lesson.say(f"A layer with h={SWEEP.hidden_size} and F={SWEEP.ffn_size // SWEEP.hidden_size}: its forward, run for "
               "one sequence of S tokens, longer and longer. Bytes that all\nranks together sent, from their ledgers, "
               "and who sent fewer:")
    sweeps = {group: [Point.at(lesson, replace(config, seq_len=tokens)) for tokens in TOKENS]
              for group, config in GROUPS.items()}
    table = table_with("S", "S/h", "TP", *(cell for group in GROUPS for cell in (f"TSP, g={group}", "fewer")))
    for number, tokens in enumerate(TOKENS):
        points = [sweep[number] for sweep in sweeps.values()]
        table.add_row(str(tokens), str(tokens // SWEEP.hidden_size), f"{points[0].tp:,}",
                      *(cell for point in points for cell in (f"{point.tsp:,}", point.fewer)))
    lesson.say(table)
    lesson.say("TP's all-reduces grow with the tokens; of TSP only keys and values do, and with g = 2 they are half\n"
               "as many. Its weights are the same for any length. The crossing at 8h for g = 1 and F = 4 is reported\n"
               "to be in the paper; that it is at (2 + 2/g + 3F)/(4 - 2/g) h is derived here.")
    lesson.check("every run's bytes are `step_messages`'s, on every rank",
                 all(point.exact for sweep in sweeps.values() for point in sweep))
    for group, sweep in sweeps.items():
        check_crossing(lesson, group, sweep)
    twice = Point.at(lesson, replace(SWEEP, batch_size=2, seq_len=TOKENS[-1] // 2))
    last = sweeps[1][-1]
    lesson.check(f"only B·S counts: two sequences of {TOKENS[-1] // 2} tokens send what one of {TOKENS[-1]} does",
                 (twice.tp, twice.tsp) == (last.tp, last.tsp))


@dataclass(frozen=True)
class Point:
    """A layer's forward under TP and under TSP: bytes of all ranks together, whether each rank sent as many under both,
    and whether both are what the exact formulas say."""

    tokens: int
    tp: int
    tsp: int
    equal: bool
    exact: bool

    @classmethod
    def at(cls, lesson: Lesson, config: Config) -> Point:
        """Run both."""
        (tp, tp_exact), (tsp, tsp_exact) = (layer_forward(lesson.comm, name, config) for name in ("tp", "tsp"))
        rows = over_ranks(lesson, [tp, tsp, tp_exact and tsp_exact])
        sums = [sum(column) for column in zip(*rows)]
        return cls(config.batch_size * config.seq_len, sums[0], sums[1], all(row[0] == row[1] for row in rows),
                   sums[2] == lesson.size)

    @property
    def fewer(self) -> str:
        """Who sent fewer bytes."""
        return "equal" if self.tp == self.tsp else "TP" if self.tp < self.tsp else "TSP"


def layer_forward(comm: Communicator, schedule: str, config: Config) -> tuple[int, bool]:
    """The forward of one layer with random weights on random tokens: bytes sent, and whether a formula has them all."""
    module, before = {"tp": tp, "tsp": tsp}[schedule], sent_since(comm, {})
    model = Model(config, np, *module.place(comm))
    weights = initial_parameters(model)
    x, _ = module.attention_forward(comm, model, random_tiles(model, 1), weights, 0)
    module.mlp_forward(comm, model, x, weights, 0)
    sent, wanted = sent_since(comm, before), exact(schedule, config, model.grid)
    return layer_bytes(sent, "forward"), sent == {
        key: count for key, count in wanted.items() if key[0] in LAYER and key[1] == "forward"}


def check_crossing(lesson: Lesson, group: int, sweep: list[Point]) -> None:
    """Where the sweep says that TSP begins to send fewer, against the formula."""
    config = GROUPS[group]
    wanted = crossing(group, Fraction(config.ffn_size, config.hidden_size)) * config.hidden_size
    by_tp, by_tsp = ([point.tokens for point in sweep if point.fewer == name] for name in ("TP", "TSP"))
    found = f"g={group}: TP sends fewer up to S={max(by_tp, default=0)}, TSP from S={min(by_tsp, default=0)}"
    if even(lesson.size):
        lesson.check(f"{found}, and at {wanted} both the same, on every rank, to the byte",
                     by_tp == [tokens for tokens in TOKENS if tokens < wanted]
                     and by_tsp == [tokens for tokens in TOKENS if tokens > wanted]
                     and [point.tokens for point in sweep if point.equal] == [wanted])
    else:
        order = [("TP", "equal", "TSP").index(point.fewer) for point in sweep]
        lesson.check(f"{found}; TP nowhere from {wanted} on, which is the formula's crossing",
                     order == sorted(order) and max(by_tp, default=0) < wanted
                     and set(by_tsp) >= {tokens for tokens in TOKENS if tokens > wanted})


def show_backward(lesson: Lesson, steps: Steps) -> None:
    """What is reduced to its owner."""
    lesson.part("Backward: what is reduced to its owner")
    step, layers = steps[Plan("tsp")].sent, CONFIG.num_layers
    lesson.say("A tile's keys are seen by later tiles only, so a rank has a gradient for some of the others' keys and\n"
               "values: for all in the first half of the text, for some in the second. TSP, bytes of a layer:")
    weights = sum(bytes_of(step, part, "backward", f"{part.upper()}_WEIGHTS") for part in LAYER)
    gradients = sum(bytes_of(step, part, "backward", f"{part.upper()}_GRADIENTS") for part in LAYER)
    keys, scattered = (
        bytes_of(step, "attention", "backward", name) for name in ("KEYS_VALUES", "KEYS_VALUES_GRADIENTS"))
    table = table_with("rank", "keys, values", "their gradients", "ratio", "weights", "their gradients", "ratio")
    rows = over_ranks(lesson, [keys, scattered, weights, gradients])
    for name, row in [*((str(rank), row) for rank, row in enumerate(rows)), ("all", np.sum(rows, axis=0).tolist())]:
        table.add_row(name, f"{row[0] // layers:,}", f"{row[1] // layers:,}", f"{row[1] / row[0]:.3f}",
                      f"{row[2] // layers:,}", f"{row[3] // layers:,}", f"{row[3] / row[2]:.3f}")
    lesson.say(table)
    sums = np.sum(rows, axis=0).tolist()
    if even(lesson.size):
        numbers = Formulas.of(CONFIG).reduced(Place(lesson.rank, lesson.size))
        lesson.check("gradients of keys and values: rank r sends B S h / g (2(N-1) - r)/N numbers a layer",
                     scattered == numbers * itemsize(CONFIG) * layers)
        lesson.check("all ranks together: 3/4 of the keys and values", 4 * sums[1] == 3 * sums[0])
        lesson.check("gradients of weights: as many bytes as the weights", sums[2] == sums[3])
    show_sums(lesson, steps, sums[3])


def show_sums(lesson: Lesson, steps: Steps, by_tsp: int) -> None:
    """Who needs a weight's gradient, under TSP and under SP."""
    sp, tsp = steps[Plan("sp")].sent, steps[Plan("tsp")].sent
    reduced = sum(bytes_of(sp, purpose=f"{part.upper()}_GRADIENTS") for part in LAYER)
    rows = over_ranks(lesson, [reduced, layer_bytes(sp, "backward"), layer_bytes(tsp, "backward")])
    by_sp, backward_sp, backward_tsp = (sum(column) for column in zip(*rows))
    whole = int(Formulas.of(CONFIG).weights) * itemsize(CONFIG) * CONFIG.num_layers
    lesson.say("A weight's gradient is needed where the weight is: under TSP by one rank, under SP by all. All\n"
               f"layers, all ranks: TSP {by_tsp:,} bytes, SP {by_sp:,}; under TP none, as a rank has all tokens.")
    lesson.check("SP sends just the totals more, each to N-1 others: (N-1) W",
                 by_sp - by_tsp == (lesson.size - 1) * whole)
    lesson.check("TSP's weights, which travel again, cost as much: in the backward both send the same, all together",
                 backward_sp == backward_tsp)


def grids(schedule: str, size: int, like: Grid) -> list[Grid]:
    """The grid of every rank, on a mesh with as many ranks on each axis as `like`."""
    if schedule == "tsp":
        places = [folded(rank, size) for rank in range(size)]
    else:
        across, along = like.weight_axis.size, like.token_axis.size
        places = [(Place(rank % across, across), Place(rank // across, along)) for rank in range(size)]
    return [replace(like, weight_axis=weights, token_axis=tokens) for weights, tokens in places]


def show_uneven(lesson: Lesson, steps: Steps) -> None:
    """Every number of ranks, by the exact formulas that have been checked here for this one."""
    lesson.part("Numbers of ranks that do not divide evenly")
    lesson.say(f"G={CONFIG.blocks} blocks and T={CONFIG.tiles} tiles on N ranks: what all ranks send in a layer by "
               "`step_messages`, over what the\nformulas above say. A sum travels in as many pieces as whole subtrees "
               "are filled by what a rank holds;\n`pieces` is the most of a rank, of blocks and of tiles:")
    kinds = [(schedule, way) for schedule in ("tp", "sp", "tsp") for way in DIRECTIONS]
    table = table_with("N", "pieces", *(" ".join(kind) for kind in kinds))
    ratios = {size: {kind: ratio(*kind, size) for kind in kinds} for size in range(2, CONFIG.max_ranks + 1)}
    for size, row in ratios.items():
        table.add_row(f"{size}" + " <" * (size == lesson.size), most_pieces(size), *(
            f"{float(row[kind]):.3f}" for kind in kinds))
    lesson.say(table)
    summing = (("sp", "backward"), ("tsp", "backward"))
    mine = {kind: sum(rows[0] for rows in over_ranks(lesson, [layer_bytes(steps[Plan(kind[0])].sent, kind[1])]))
            for kind in kinds}
    lesson.check(f"the row of N={lesson.size} is what was counted here, to the byte", all(
        number == ratios[lesson.size][kind] * smooth(*kind, lesson.size) * itemsize(CONFIG)
        for kind, number in mine.items()))
    lesson.check("no N sends less; 2, 4 and 8 send just that, and each other N more in the backward of SP and TSP", all(
        min(row.values()) >= 1 and all((row[kind] == 1) == even(size) for kind in summing)
        and (max(row.values()) == 1) == even(size) for size, row in ratios.items()))


def line_of(schedule: str, size: int) -> list[Grid]:
    """The grids of all ranks of TP, SP or TSP."""
    like = Grid(CONFIG.blocks, CONFIG.tiles, CONFIG.tile_len, *(
        (Place(0, size), ALONE) if schedule == "tp" else (ALONE, Place(0, size))))
    return grids(schedule, size, like)


def smooth(schedule: str, way: str, size: int) -> Fraction:
    """Elements that all ranks together would send in all layers if everything divided evenly."""
    both = [Formulas.of(CONFIG).both(schedule, grid) for grid in line_of(schedule, size)]
    return CONFIG.num_layers * sum((row[DIRECTIONS.index(way)] for row in both), Fraction(0))


def ratio(schedule: str, way: str, size: int) -> Fraction:
    """What all ranks together send in all layers, over that."""
    sent = sum(layer_bytes(exact(schedule, CONFIG, grid), way) for grid in line_of(schedule, size))
    return Fraction(sent, itemsize(CONFIG)) / smooth(schedule, way, size)


def most_pieces(size: int) -> str:
    """The most pieces that a rank's blocks, and its tiles, fill."""
    held = [[grid.blocks, grid.slots] for grid in line_of("tsp", size)]
    return ", ".join(str(max(map(subtrees, column))) for column in zip(*held))


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_comparable_bits()
    lesson.require_ranks(CONFIG.max_ranks)
    if lesson.size == 1:
        return alone(lesson)
    steps = {plan: training_step(lesson.comm, plan) for plan in plans(lesson.size)}
    show_ledger(lesson, steps)
    show_layer(lesson, steps)
    show_crossing(lesson)
    show_backward(lesson, steps)
    show_uneven(lesson, steps)


def alone(lesson: Lesson) -> None:
    """One rank has nothing to send, so four virtual ones take its place."""
    lesson.check("one rank sends nothing, under any schedule",
                 not any(training_step(lesson.comm, plan).sent for plan in plans(1)))
    lesson.say("So the lesson goes on with 4 virtual ranks inside this one.")

    def teach(comm: Communicator) -> list[str]:
        inner = Lesson(comm, console_for(comm.rank))
        main(inner)
        return inner.failures

    lesson.failures += VirtualWorld(4).run(teach)[0]


if __name__ == "__main__":
    run(__doc__, main)
