"""Two axes: tensor parallelism along one, sequence parallelism along the other, on a mesh of ranks.

Objective: after this lesson you can place N = T x Σ ranks on a mesh, say for every sum and every exchange along which
axis it goes and what it costs, and show what a wrong axis does; and say what a rank holds on a mesh, and what under
TSP, which folds both axes on the same ranks.

    mpirun -n 4 python lessons/10_two_axes.py
    python lessons/10_two_axes.py --ranks 6 --shuffle 7      (a mesh of 2 x 3; 4, 6 and 8 ranks show most)

(T is the number of ranks on the weights' axis here; tiles are spelled out. The cut of weights is Megatron-LM's, arXiv
1909.08053; to combine the two is common practice, and what arXiv 2604.26294 folds. The formulas for bytes are derived
here, and counted.)

Look at: the table of who sends to whom, in which the two axes can be seen; the bytes of all meshes of these ranks; the
gradient that is summed along the wrong axis, where no size is wrong and nothing hangs; and the last table, where no
mesh divides by N what TSP divides by N.

Try it: with 4 ranks, in `mlp_forward`, hand `mesh.tokens` to `all_reduce`. Now the tree is in the way: the ranks whose
two places on the axes differ are sent pieces that they have, and stop with "was added to the tree twice". The others
notice nothing: they take another's terms, of other tokens, for those that they miss.

Try this, too: add `seq_len=128` to CONFIG. TSP then sends in the layer's forward what T = N sends, as the last part
says it will; with 256 it sends less.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from stage import (
    Lesson,
    all_reduce_sends,
    dealt,
    drawn_text,
    kept_bytes,
    members,
    names,
    random_tiles,
    random_weights,
    relative_gap,
    run,
    subtrees,
)

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tsp_ref.accounting.ledger import Entry
from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.mesh import Mesh, make_mesh
from tsp_ref.comm.request import Request
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.grid.grid import Grid, share
from tsp_ref.grid.tree import Tree, cover
from tsp_ref.model.config import make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, attention_shapes, mlp_shapes, mlp_views, zero_parameters
from tsp_ref.model.tilewise import normalise
from tsp_ref.ops.mlp import swiglu_backward, swiglu_forward
from tsp_ref.reference import single
from tsp_ref.schedules import tp_sp
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan, mesh_sides, meshes

SEED = 2604
CONFIG = make_config("tiny", num_layers=1, hidden_size=128, num_heads=16, num_kv_heads=8, steps=1, warmup_steps=1)
ITEM_BYTES = np.dtype(CONFIG.dtype).itemsize
TILE_BYTES = CONFIG.batch_size * CONFIG.tile_len * CONFIG.hidden_size * ITEM_BYTES
# Keys and values of one block's heads and one tile.
KEYS_BYTES = 2 * CONFIG.batch_size * CONFIG.tile_len * CONFIG.kv_heads_per_block * CONFIG.head_dim * ITEM_BYTES
ATTENTION_BYTES, MLP_BYTES = (sum(rows * columns for rows, columns in shapes) * ITEM_BYTES
                              for shapes in (attention_shapes(CONFIG), mlp_shapes(CONFIG)))  # of one packed block
TOLERANCE = 1e-5
LAYER_FORWARD = (("attention", "forward"), ("mlp", "forward"))

Kept: TypeAlias = dict[tuple[int, int], Array]
"""(block, slot) -> x gate and x up, a stack of one tile [1, B*s, 2f/G]"""

Messages: TypeAlias = dict[Entry, tuple[int, int]]
"""What a ledger counted, by verb, phase, tag and peer: messages and bytes."""


class Tag(IntEnum):
    """What the messages of this lesson are about."""

    PIECES = 1
    TOTALS = 2
    GRADIENTS = 3


@dataclass
class Judge:
    """One process that owns everything, on every rank: an MLP sub-layer, and a training step."""

    weights: Parameters
    output: Array  # [T, B, s, h], by slot
    gradient: Array  # [G, size of a packed block]
    step: Step


@dataclass
class Step:
    """A training step under a plan, as one rank saw it. Bytes are of the model's one layer.

    digest   of the bits of loss, gradients, weights and moments; "" but on rank 0
    sent     all messages of the step
    weights  bytes of weights that the rank holds
    inputs   bytes of the inputs of the two sub-layers that it keeps
    blocks   bytes that it keeps of what is computed by blocks of weights
    """

    digest: str
    sent: Messages
    weights: int
    inputs: int
    blocks: int


def training_step(comm: Communicator, plan: Plan) -> Step:
    """One step of training, its messages and what it holds."""
    before, training = dict(comm.ledger.entries), Training(CONFIG, comm, plan, drawn_text(), np)
    _, saved = training.forward()
    inputs, blocks = kept_bytes(saved.attention[0], saved.mlp[0])
    training.strategy.backward(saved, training.weights, training.gradients)
    training.update()
    counts = {entry: np.subtract(now, before.get(entry, (0, 0))) for entry, now in comm.ledger.entries.items()}
    sent: Messages = {entry: (int(count[0]), int(count[1])) for entry, count in counts.items() if count[0]}
    weights = training.weights.attention[0].nbytes + training.weights.mlp[0].nbytes
    return Step(digest(training), sent, weights, inputs, blocks)


def judge() -> Judge:
    """`reference.single`."""
    model = Model(CONFIG, np)
    weights, gradients = random_weights(model, np.random.default_rng(SEED)), zero_parameters(model, "gradients")
    dgain = model.empty("working", len(model.grid.slots), *weights.gains.shape)
    output, saved = single.mlp_forward(model, random_tiles(model, 1), weights, 0)
    single.mlp_backward(model, random_tiles(model, 2), saved, weights, 0, gradients, dgain)
    step = VirtualWorld(1).run(lambda alone: training_step(alone, Plan("single")))[0]
    return Judge(weights, output, gradients.mlp[0], step)


# The MLP sub-layer on a mesh.


def mlp_forward(mesh: Mesh, model: Model, x: Array, weights: Parameters) -> tuple[Array, Kept]:
    """x plus the MLP of the normalised x [p, B, s, h], of this rank's tiles: its blocks' terms, and those of the ranks
    that hold the same tokens. An operation takes a stack of tiles; here each is a stack by itself."""
    grid, normed = model.grid, normalise(model, x, weights.gains[1]).x
    sums = {slot: Tree[Array](range(CONFIG.blocks)) for slot in grid.slots}
    projected: Kept = {}
    for block, packed in zip(grid.blocks, weights.mlp[0]):
        gate_up, down = mlp_views(CONFIG, packed)  # -> [h, 2*f/G], [f/G, h]
        for number, slot in enumerate(grid.slots):
            projected[block, slot] = np.empty(
                (1, CONFIG.batch_size * CONFIG.tile_len, gate_up.shape[1]), dtype=CONFIG.dtype)
            y = swiglu_forward(np, normed[number : number + 1], gate_up, down, out=projected[block, slot])
            sums[slot].add(block, y[0])  # [1, B, s, h] -> [B, s, h]
    output = all_reduce(mesh.weights, grid, sums)
    return x + np.stack([output[slot] for slot in grid.slots]), projected


@dataclass
class Arrival:
    """A piece in flight to this rank: the tree that it belongs in, and the node that it is there."""

    request: Request
    tree: Tree[Array]
    node: tuple[int, int]


def all_reduce(axis: Communicator, grid: Grid, sums: dict[int, Tree[Array]]) -> dict[int, Array]:
    """Lesson 8's all-reduce, of this rank's slots, among the ranks of an axis: a place on it is all that it sees. The
    ranks take turns: of the slots, number i is summed at place i modulo the axis's size."""
    leaves, slots = tuple(range(CONFIG.blocks)), sorted(sums)
    by = {slot: number % axis.size for number, slot in enumerate(slots)}
    arriving = [
        Arrival(axis.Irecv(tile_sized(), peer, Tag.PIECES), sums[slot], node)
        for slot, place in by.items() if place == axis.rank
        for peer in axis.others
        for node in cover(leaves, tuple(grid.blocks_of(peer)))
    ]
    sends = [axis.Isend(piece, place, Tag.PIECES)
             for slot, place in by.items() if place != axis.rank for _, piece in sums[slot].pieces()]
    while arriving:
        arrival = arriving.pop(axis.Waitany([arrival.request for arrival in arriving]))
        level, index = arrival.node
        arrival.tree.add(index, arrival.request.array, level)
    axis.Waitall(sends)
    own = {slot: sums[slot].total for slot, place in by.items() if place == axis.rank}
    output = own | {slot: tile_sized() for slot, place in by.items() if place != axis.rank}
    requests = [axis.Irecv(output[slot], place, Tag.TOTALS) for slot, place in by.items() if place != axis.rank]
    requests += [axis.Isend(total, peer, Tag.TOTALS) for total in own.values() for peer in axis.others]
    axis.Waitall(requests)
    return output


def tile_sized() -> Array:
    """Room for a tile [B, s, h]."""
    return np.empty((CONFIG.batch_size, CONFIG.tile_len, CONFIG.hidden_size), dtype=CONFIG.dtype)


def own_gradient(model: Model, weights: Parameters, projected: Kept) -> Array:
    """The gradient of this rank's blocks, as far as its slots make it: [m, size of a packed block]."""
    normed, dy = normalise(model, random_tiles(model, 1), weights.gains[1]).x, random_tiles(model, 2)
    gradient = np.zeros_like(weights.mlp[0])
    for block, packed, out in zip(model.grid.blocks, weights.mlp[0], gradient):
        gate_up, down = mlp_views(CONFIG, packed)  # -> [h, 2*f/G], [f/G, h]
        for number, slot in enumerate(model.grid.slots):
            one, leaf = slice(number, number + 1), np.empty((1, packed.size), dtype=packed.dtype)
            swiglu_backward(np, dy[one], normed[one], gate_up, down, projected[block, slot],
                            out=mlp_views(CONFIG, leaf))
            out += leaf[0]
    return gradient


def plain_sum(axis: Communicator, mine: Array) -> Array:
    """The sum of what the ranks of an axis have, on each of them, in the order of their places and without a tree."""
    parts = {peer: np.empty_like(mine) for peer in axis.others}
    requests = [axis.Irecv(part, peer, Tag.GRADIENTS) for peer, part in parts.items()]
    requests += [axis.Isend(mine, peer, Tag.GRADIENTS) for peer in axis.others]
    axis.Waitall(requests)
    parts[axis.rank] = mine
    total: Array = np.sum([parts[place] for place in range(axis.size)], axis=0)
    return total


# Where a rank is, and what it should send, without the project's mesh.


@dataclass(frozen=True)
class Position:
    """A rank's place on each axis of a mesh of T x Σ ranks: rank = (place on the tokens' axis) * T + (that on the
    weights')."""

    rank: int
    weight_ranks: int  # T
    token_ranks: int  # Σ

    @property
    def places(self) -> tuple[int, int]:
        """On the weights' axis, and on the tokens'."""
        return self.rank % self.weight_ranks, self.rank // self.weight_ranks

    @property
    def blocks(self) -> range:
        """The blocks that the rank should hold."""
        return share(CONFIG.blocks, self.places[0], self.weight_ranks)

    @property
    def slots(self) -> range:
        """The slots that it should hold."""
        return share(CONFIG.tiles, self.places[1], self.token_ranks)

    def axis_to(self, peer: int) -> str:
        """The axis on which another rank is, if any: "weights", "tokens" or "neither"."""
        other = Position(peer, self.weight_ranks, self.token_ranks).places
        return "weights" if other[1] == self.places[1] else "tokens" if other[0] == self.places[0] else "neither"

    def members(self, axis: str) -> list[int]:
        """The ranks on one of its axes, itself among them."""
        peers = range(self.weight_ranks * self.token_ranks)
        return [peer for peer in peers if peer == self.rank or self.axis_to(peer) == axis]

    def along_weights(self) -> int:
        """Bytes that it should send along the weights' axis in an all-reduce of its tokens."""
        tiles = all_reduce_sends(
            len(self.slots), subtrees(self.blocks), self.places[0], self.weight_ranks, in_turns=True)
        return tiles * TILE_BYTES

    def gradients(self) -> int:
        """Bytes that it should send along the tokens' axis for the gradients of its weights."""
        sends = all_reduce_sends(len(self.blocks), subtrees(self.slots), self.places[1], self.token_ranks)
        return sends * (ATTENTION_BYTES + MLP_BYTES)

    def along_tokens(self) -> int:
        """Bytes of keys and values that it should send along the tokens' axis."""
        return (self.token_ranks - 1) * len(self.slots) * len(self.blocks) * KEYS_BYTES


def formulas(weight_ranks: int, token_ranks: int) -> list[float]:
    """Bytes that a rank sends along each axis in a layer forward, where all hold equal shares."""
    numbers, group = CONFIG.batch_size * CONFIG.seq_len * CONFIG.hidden_size, CONFIG.group_size
    sums = 4 * (weight_ranks - 1) / weight_ranks * numbers / token_ranks
    keys = 2 * (token_ranks - 1) / token_ranks * numbers / (group * weight_ranks)
    return [sums * ITEM_BYTES, keys * ITEM_BYTES]


def layer_bytes(sent: Messages, rank: Position) -> list[int]:
    """Bytes sent in the layer's forward along the weights' axis, along the tokens' axis, and elsewhere."""
    axes = dict.fromkeys(("weights", "tokens", "neither"), 0)
    for entry, (_, size) in sent.items():
        if entry.verb == "send" and entry.phase in LAYER_FORWARD:
            axes[rank.axis_to(entry.peer)] += size
    return list(axes.values())


def gradient_bytes(sent: Messages) -> int:
    """Bytes sent for the gradients of the layer's weights."""
    return sum(size for entry, (_, size) in sent.items()
               if entry.verb == "send" and entry.tag in ("ATTENTION_GRADIENTS", "MLP_GRADIENTS"))


# The lesson.


def show_mesh(lesson: Lesson, mesh: Mesh, grid: Grid, where: Position) -> None:
    """Who is where, and holds what."""
    lesson.part(f"A mesh of {where.weight_ranks} x {where.token_ranks}")
    lesson.say(f"N = {lesson.size} as T x Σ, as square as it can be with T <= Σ. Along the weights' axis "
               f"G={CONFIG.blocks} blocks are dealt, along\nthe tokens' axis {CONFIG.tiles} tiles. Each rank's place "
               "(w, t) on the axes, what it holds, and whom it met when all\nsent their numbers along an axis:")
    met = [[int(number[0]) for number in all_gather(axis, np.array([lesson.rank], dtype=np.int64))]
           for axis in (mesh.weights, mesh.tokens)]
    masks = [sum(1 << number for number in numbers) for numbers in (grid.blocks, grid.slots, *met)]
    rows = all_gather(lesson.comm, np.array([mesh.weights.rank, mesh.tokens.rank, *masks], dtype=np.int64))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("rank", "(w, t)", "blocks", "slots", "on the weights' axis", "on the tokens' axis"):
        table.add_column(heading, no_wrap=True)
    for rank, row in enumerate(rows):
        w, t, *held = row.tolist()
        table.add_row(str(rank), f"({w}, {t})", *(names(members(mask)) for mask in held))
    lesson.say(table)
    if min(where.weight_ranks, where.token_ranks) == 1 < lesson.size:
        lesson.say(f"{lesson.size} ranks make no mesh with two ranks or more on both axes; 4, 6 and 8 do.")
    lesson.check("rank = t*T + w; blocks are dealt by w and slots by t; an axis is the ranks of equal t, or of equal w",
                 ((mesh.weights.rank, mesh.tokens.rank), list(grid.blocks), list(grid.slots), *met)
                 == (where.places, list(where.blocks), list(where.slots), *map(where.members, ("weights", "tokens"))))
    pairs = np.zeros((CONFIG.blocks, CONFIG.tiles), dtype=np.int64)
    pairs[np.ix_(list(grid.blocks), list(grid.slots))] = 1
    lesson.check("each block meets each tile on exactly one rank",
                 bool(np.all(np.sum(all_gather(lesson.comm, pairs), axis=0) == 1)))


def show_mlp(lesson: Lesson, output: Array, where: Position, truth: Judge) -> None:
    """What the MLP sub-layer sent, and its output."""
    lesson.part("An MLP sub-layer")
    lesson.say("A rank applies its blocks to its tokens: some of the G terms of each sum. The other terms are on the\n"
               "ranks that hold the same tokens and other blocks, so the all-reduce goes along the weights' axis.\n"
               "Along the tokens' axis nothing is to be sent: in an MLP no token looks at another.")
    ledger = lesson.comm.ledger
    to = {peer: sum(ledger.sums("send", tag.name, peer)[1] for tag in (Tag.PIECES, Tag.TOTALS))
          for peer in lesson.comm.others}
    lesson.say_from_all(", ".join(f"{size:,} bytes to rank {peer}" for peer, size in sorted(to.items()) if size)
                        or "nothing")
    lesson.check("sent to ranks on the weights' axis, and to no other",
                 {peer for peer, size in to.items() if size} == set(where.members("weights")) - {lesson.rank})
    lesson.check("as many bytes as lesson 8's all-reduce, of this rank's tokens among T ranks",
                 sum(to.values()) == where.along_weights())
    lesson.check("every bit of this rank's tokens equals the single process's",
                 all(tile.tobytes() == truth.output[slot].tobytes() for slot, tile in zip(where.slots, output)))


def show_wrong_axis(lesson: Lesson, mesh: Mesh, mine: Array, where: Position, truth: Judge) -> None:
    """The gradient of this rank's blocks, summed along the one axis and along the other."""
    lesson.part("The wrong axis")
    nobody = "\n(With T = 1 there is nobody on it, and each rank keeps its own part.)"
    lesson.say("In the backward each rank has its tokens' part of the gradient of its blocks. The other parts are on\n"
               "the tokens' axis. On the weights' axis there are gradients of as many bytes, too: of other blocks."
               + nobody * (where.weight_ranks == 1))
    wanted = truth.gradient[where.blocks.start : where.blocks.stop]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("summed along", "off from the whole gradient, relative", "most copies of a block's that differ"):
        table.add_column(heading, no_wrap=True)
    gaps, copies = [], []
    for name, axis in (("the tokens' axis", mesh.tokens), ("the weights' axis", mesh.weights)):
        total = plain_sum(axis, mine)
        gaps.append(max(float(row[0]) for row in all_gather(lesson.comm, np.array([relative_gap(total, wanted)]))))
        rows = all_gather(lesson.comm, total)
        copies.append(max(len({rows[rank].tobytes() for rank in range(w, lesson.size, where.weight_ranks)})
                          for w in range(where.weight_ranks)))
        table.add_row(name, f"{gaps[-1]:.1e}", f"{copies[-1]} of {where.token_ranks}")
    lesson.say(table)
    lesson.check(f"along the tokens' axis: the single process's gradient within {TOLERANCE:g}, the same in all copies",
                 gaps[0] < TOLERANCE and copies[0] == 1)
    if lesson.size > 1:
        lesson.check("along the weights' axis: off by more than 0.1, another in each copy; and no message was refused",
                     gaps[1] > 0.1 and copies[1] == where.token_ranks)
    else:
        lesson.check("a single rank is alone on both axes: neither is wrong", max(gaps) < TOLERANCE)


def show_traffic(lesson: Lesson, step: Step, where: Position) -> None:
    """Who sends to whom in a layer's forward."""
    lesson.part(f"A layer's forward, on {where.weight_ranks} x {where.token_ranks}")
    lesson.say("Attention uses both: keys and values of a rank's heads go along the tokens' axis, then there is an\n"
               "all-reduce along the weights' axis; the MLP has the all-reduce only. Bytes from each rank to each,\n"
               "counted in a training step of `tsp_ref.schedules.tp_sp`; w and t say along which axis:")
    mine = np.zeros(lesson.size, dtype=np.int64)
    for entry, (_, size) in step.sent.items():
        if entry.verb == "send" and entry.phase in LAYER_FORWARD:
            mine[entry.peer] += size
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("from", *(f"to {rank}" for rank in range(lesson.size))):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = np.stack(all_gather(lesson.comm, mine))  # [N, N]
    for rank, row in enumerate(rows.tolist()):
        here = Position(rank, where.weight_ranks, where.token_ranks)
        cells = (f"{size:,} {here.axis_to(peer)[0]}" if size else "·" for peer, size in enumerate(row))
        table.add_row(str(rank), *cells)
    lesson.say(table)
    axes = set(where.members("weights")) | set(where.members("tokens"))
    lesson.check("each rank sends to all on its two axes, and to nobody else",
                 set(np.flatnonzero(mine).tolist()) == axes - {lesson.rank})


def show_meshes(lesson: Lesson, steps: dict[str, Step], truth: Judge) -> None:
    """Every mesh of these ranks: bytes along each axis, and bits."""
    lesson.part(f"All meshes of {lesson.size} rank{'s' * (lesson.size > 1)}")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("T x Σ", "along weights", "formula", "along tokens", "formula", "both", "gradients", "digest"):
        table.add_column(heading, justify="right", no_wrap=True)
    equal, counted, reduced = True, True, True
    for name, step in steps.items():
        sides = mesh_sides(name, lesson.size)
        where, expected = Position(lesson.rank, *sides), formulas(*sides)
        found, gradients = layer_bytes(step.sent, where), gradient_bytes(step.sent)
        counted &= found == [2 * where.along_weights(), where.along_tokens(), 0]
        reduced &= gradients == where.gradients()
        equal &= found[:2] == expected
        mine = np.array([*found[:2], sum(found), gradients], dtype=np.int64)
        weights, tokens, both, most = np.max(all_gather(lesson.comm, mine), axis=0).tolist()
        table.add_row(name, f"{weights:,}", f"{expected[0]:,.0f}", f"{tokens:,}", f"{expected[1]:,.0f}", f"{both:,}",
                      f"{most:,}", step.digest[:12])
    lesson.say("Bytes that the rank which sends most sends in the layer's forward, and what these would be for equal\n"
               "shares: along weights 4(T-1)/T * B*S*h/Σ numbers, along tokens 2(Σ-1)/Σ * B*S*h/(gT), with g = "
               f"{CONFIG.group_size}.\nOf the backward, the gradients of the layer's weights, which are all-reduced "
               "along the tokens' axis:")
    lesson.say(table)
    lesson.check("along weights: two all-reduces of a rank's tokens; along tokens: its keys and values to Σ-1 ranks",
                 counted)
    lesson.check("gradients: one all-reduce of those of a rank's blocks among Σ ranks", reduced)
    if CONFIG.tiles % lesson.size == 0:
        lesson.check("so every rank sends what the formulas say, on every mesh", equal)
    else:
        lesson.say(f"  {lesson.size} ranks hold unequal shares of {CONFIG.tiles} tiles or {CONFIG.blocks} blocks: the "
                   "formulas are for equal ones")
    lesson.check("on every mesh the step's digest is the single process's",
                 lesson.rank != 0 or {step.digest for step in steps.values()} == {truth.step.digest})


def show_edges(lesson: Lesson, steps: dict[str, Step], edges: dict[str, Step]) -> None:
    """The two meshes of one row and of one column are the strategies that they are made of."""
    lesson.part("The edges of the mesh")
    lesson.say("With Σ = 1 all ranks hold the same tokens, with T = 1 all hold the same weights. What rank 0 sent in\n"
               "the whole training step, forward, backward and the norm of the gradients:")
    pairs = (("tp", f"{lesson.size}x1"), ("sp", f"1x{lesson.size}"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("", "messages", "bytes", "digest"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, mesh in pairs:
        for title, step in ((f"schedule {name}", edges[name]), (f"tp+sp on {mesh}", steps[mesh])):
            counts = np.sum([count for entry, count in step.sent.items() if entry.verb == "send"] or [(0, 0)], axis=0)
            table.add_row(title, *(f"{count:,}" for count in counts.tolist()), step.digest[:12])
    lesson.say(table)
    for name, mesh in pairs:
        lesson.check(f"{name} and {mesh}: as many messages and bytes for each tag, peer and phase, and the same digest",
                     (edges[name].sent, edges[name].digest) == (steps[mesh].sent, steps[mesh].digest))


def show_holdings(lesson: Lesson, steps: dict[str, Step], tsp: Step, truth: Judge) -> None:
    """What a rank holds on every mesh, and under TSP."""
    lesson.part("What a rank holds; and TSP on the same ranks")
    alone, total = truth.step, {**steps, "TSP": tsp}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("", "weights", "sub-layers' inputs", "kept by blocks and tokens", "sent in a layer's forward"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, step in total.items():
        sent = sum(size for entry, (_, size) in step.sent.items()
                   if entry.verb == "send" and entry.phase in LAYER_FORWARD)
        mine = np.array([step.weights, step.inputs, step.blocks, sent], dtype=np.int64)
        *held, sent = np.max(all_gather(lesson.comm, mine), axis=0).tolist()
        parts = [f"1/{whole / part:.3g}" for whole, part in zip((alone.weights, alone.inputs, alone.blocks), held)]
        table.add_row(name if name == "TSP" else f"tp+sp {name}", *parts, f"{sent:,}")
    lesson.say("As parts of what one process holds, on the rank that holds most:")
    lesson.say(table)
    lesson.say("On a mesh weights are divided by T and inputs by Σ, and T times Σ is N: the one is had for the other.\n"
               "TSP deals both to the same N ranks; for that its weights travel, however few the tokens are.")
    show_crossing(lesson, alone)
    places = {name: Position(lesson.rank, *mesh_sides(name, lesson.size)) for name in steps}
    lesson.check("on every mesh: weights by the blocks held, inputs by the slots held, the rest by both",
                 all(parts_of(steps[name], alone) == (len(where.blocks), len(where.slots),
                                                      len(where.blocks) * len(where.slots))
                     for name, where in places.items()))
    blocks, slots = (share(count, lesson.rank, lesson.size) for count in (CONFIG.blocks, CONFIG.tiles))
    lesson.check("TSP: weights by the blocks held, all else by the slots held",
                 parts_of(tsp, alone) == (len(blocks), len(slots), len(slots) * CONFIG.blocks))
    lesson.check("TSP sends its blocks of attention to N-1 ranks, all of the MLP but its right neighbour's, and keys "
                 "and values", sum(layer_bytes(tsp.sent, Position(lesson.rank, 1, lesson.size))) == tsp_bytes(lesson))
    lesson.check("TSP's digest is the single process's, too", lesson.rank != 0 or tsp.digest == alone.digest)


def show_crossing(lesson: Lesson, alone: Step) -> None:
    """From how many tokens on TSP's weights are less than tensor parallelism's sums."""
    tokens = alone.weights / ITEM_BYTES / (CONFIG.hidden_size * (4 - 2 / CONFIG.group_size))
    lesson.say(f"(A step has B*S = {CONFIG.batch_size * CONFIG.seq_len} tokens here. By the formulas for equal shares, "
               f"TSP's forward sends fewer bytes than\ntensor parallelism's where B*S is above W / (h(4 - 2/g)) = "
               f"{tokens:g}, with W weights in a layer.)")


def tsp_bytes(lesson: Lesson) -> int:
    """What a rank should send in TSP's forward, by lessons 5 and 6."""
    own, right = (len(share(CONFIG.blocks, rank % lesson.size, lesson.size)) for rank in (lesson.rank, lesson.rank + 1))
    keys = len(share(CONFIG.tiles, lesson.rank, lesson.size)) * CONFIG.blocks * KEYS_BYTES
    return (lesson.size - 1) * (own * ATTENTION_BYTES + keys) + (CONFIG.blocks - right) * MLP_BYTES


def parts_of(step: Step, alone: Step) -> tuple[float, float, float]:
    """What a rank holds, counted in blocks of weights, in tiles of inputs, and in pairs of a block and a tile."""
    return (step.weights * CONFIG.blocks / alone.weights, step.inputs * CONFIG.tiles / alone.inputs,
            step.blocks * CONFIG.blocks * CONFIG.tiles / alone.blocks)


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_comparable_bits()
    lesson.require_ranks(CONFIG.max_ranks)
    comm, truth, sides = lesson.comm, judge(), mesh_sides(None, lesson.size)
    mesh, where = make_mesh(comm, *sides), Position(lesson.rank, *sides)
    model = Model(CONFIG, np, *tp_sp.place(mesh))
    weights = dealt(model, truth.weights)
    show_mesh(lesson, mesh, model.grid, where)
    output, projected = mlp_forward(mesh, model, random_tiles(model, 1), weights)
    show_mlp(lesson, output, where, truth)
    show_wrong_axis(lesson, mesh, own_gradient(model, weights, projected), where, truth)
    steps = {name: training_step(comm, Plan("tp+sp", mesh=name)) for name in meshes(lesson.size)}
    show_traffic(lesson, steps[f"{sides[0]}x{sides[1]}"], where)
    show_meshes(lesson, steps, truth)
    show_edges(lesson, steps, {name: training_step(comm, Plan(name)) for name in ("tp", "sp")})
    show_holdings(lesson, steps, training_step(comm, Plan("tsp")), truth)


if __name__ == "__main__":
    run(__doc__, main)
