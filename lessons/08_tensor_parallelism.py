"""Tensor parallelism: each rank has some columns and rows of the weights, and all tokens.

Objective: after this lesson you can cut an MLP by columns first and by rows after, and say why in this order; write the
all-reduce that ends it; and say from sizes and the number of ranks alone what a layer sends, forward and backward, and
what tensor parallelism divides by N and what it does not.

    mpirun -n 4 python lessons/08_tensor_parallelism.py
    python lessons/08_tensor_parallelism.py --ranks 4 --shuffle 7

(The cut, attention's by heads, and two all-reduces a layer forward and two backward are those of Megatron-LM, arXiv
1909.08053; its MLP has one matrix before a GeLU, this one has two and an elementwise product. The all-reduce as an
exchange and a gather, the fixed order of its sums and the count of its bytes are this project's.)

Look at: what the elementwise product would need if the first cut were by rows; the bytes that a rank sends, which more
ranks do not make fewer; the digests of the same sub-layer on other numbers of ranks, with and without a fixed order of
its sums; and the last table, where one column is the same on every rank, for any N.

Try it: with 4 ranks, let rank 0 sum up everything: in `summed_by`, write `{slot: 0 for slot in range(CONFIG.tiles)}`.
All bits stay what they are, and all ranks together send as many bytes as before. But rank 0 sends three times as many
as another, and all wait for it: both checks of the bytes of the lesson's own all-reduce fail, and no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from types import ModuleType
from typing import TypeAlias

from stage import (
    Lesson,
    all_reduce_sends,
    dealt,
    in_order_of_text,
    kept_bytes,
    names,
    random_tiles,
    random_weights,
    relative_gap,
    run,
    same_bits,
    subtrees,
)

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.request import Request
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.grid.grid import Grid, share
from tsp_ref.grid.tree import Tree, cover
from tsp_ref.model.activations import AttentionSaved, MlpSaved
from tsp_ref.model.config import make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, mlp_views, zero_parameters
from tsp_ref.ops.mlp import sigmoid
from tsp_ref.ops.norm import rmsnorm_forward
from tsp_ref.reference import naive, single
from tsp_ref.schedules import tp

SEED = 1909
CONFIG = make_config("tiny", num_layers=1)
NUMBERS = CONFIG.batch_size * CONFIG.seq_len * CONFIG.hidden_size  # B*S*h, what an all-reduce sums up
ITEM_BYTES = np.dtype(CONFIG.dtype).itemsize
TILE_BYTES = NUMBERS // CONFIG.tiles * ITEM_BYTES
TOLERANCE = 1e-5
EXACT = 1e-12  # in float64, where a larger gap is a mistake and no rounding
VIRTUAL_RUNS = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (8, 1))
PHASES = (("attention", "forward"), ("mlp", "forward"), ("mlp", "backward"), ("attention", "backward"))


class Tag(IntEnum):
    """What the messages of this lesson are about."""

    PIECES = 1
    TOTALS = 2


@dataclass
class Layer:
    """A whole layer, forward and backward, as one rank computed it: for all tiles, of its blocks."""

    middle: Array  # [T, B, s, h], as are the next two
    output: Array
    dx: Array
    gradients: Parameters
    attention: AttentionSaved
    mlp: MlpSaved


@dataclass
class Judge:
    """One process that owns everything, on every rank; and the textbook on whole arrays in float64."""

    model: Model
    weights: Parameters
    layer: Layer
    matrices: naive.Weights
    textbook: naive.Weights
    plain: Array  # [B, S, h], the layer's output


def whole_layer(module: ModuleType, ranks: tuple[Communicator, ...], model: Model, weights: Parameters) -> Layer:
    """One layer by the functions of a schedule, or of the reference, which is given no ranks: on random tiles and
    random gradients of its output."""
    call = {f"{part}_{way}": partial(getattr(module, f"{part}_{way}"), *ranks, model) for part, way in PHASES}
    x, dy, gradients = random_tiles(model, 1), random_tiles(model, 2), zero_parameters(model, "gradients")
    dgain = model.empty("working", CONFIG.tiles, *weights.gains.shape)
    middle, attention = call["attention_forward"](x, weights, 0)
    output, mlp = call["mlp_forward"](middle, weights, 0)
    dmiddle = call["mlp_backward"](dy, mlp, weights, 0, gradients, dgain)
    dx = call["attention_backward"](dmiddle, attention, weights, 0, gradients, dgain)
    return Layer(middle, output, dx, gradients, attention, mlp)


def judge() -> Judge:
    """`reference.single` and `reference.naive` on the whole layer."""
    model = Model(CONFIG, np)
    weights = random_weights(model, np.random.default_rng(SEED))
    whole = in_order_of_text(model.grid, random_tiles(model, 1))
    layer = naive.assemble(CONFIG, weights)["layers"][0]
    matrices = {name: matrix.astype(np.float64) for name, matrix in layer.items()}
    plain, textbook = naive.layer_forward(CONFIG, matrices, weights.gains[:2].astype(np.float64), whole)
    return Judge(model, weights, whole_layer(single, (), model, weights), matrices, textbook, plain)


# The MLP sub-layer.


@dataclass
class Notes:
    """What the lesson writes down while the sub-layer runs, by block; the sub-layer itself never reads it."""

    projected: dict[int, Array] = field(default_factory=dict)  # x gate and x up, [T, B*s, 2f/G]
    hidden: dict[int, Array] = field(default_factory=dict)  # [T, B*s, f/G]


def terms(model: Model, x: Array, weights: Parameters, notes: Notes) -> Iterator[tuple[int, Array]]:
    """What this rank's blocks add to the output, without a message: (block, [T, B, s, h])."""
    normed = rmsnorm_forward(np, x, weights.gains[1], CONFIG.norm_eps)
    rows = normed.reshape(CONFIG.tiles, -1, CONFIG.hidden_size)  # [T, B, s, h] -> [T, B*s, h]
    for block, packed in zip(model.grid.blocks, weights.mlp[0]):
        gate_up, down = mlp_views(CONFIG, packed)  # -> [h, 2*f/G], [f/G, h]
        # Columns: all of a token's numbers meet all of a column's, so each entry is whole.
        projected = rows @ gate_up  # [T, B*s, h] -> [T, B*s, 2*f/G]
        gate, up = np.split(projected, 2, axis=-1)  # -> [T, B*s, f/G], [T, B*s, f/G]
        # Entry by entry, and gate's columns lie where up's lie: nothing is needed from another rank.
        hidden = gate * sigmoid(np, gate) * up  # [T, B*s, f/G]
        # Rows, those that meet these columns: each entry is a term of a sum over all blocks.
        y = hidden @ down  # [T, B*s, f/G] -> [T, B*s, h]
        notes.projected[block], notes.hidden[block] = projected, hidden
        yield block, y.reshape(x.shape)


def mlp(comm: Communicator, model: Model, x: Array, weights: Parameters, notes: Notes) -> Array:
    """x plus the MLP of the normed x [T, B, s, h], for all tokens, on every rank."""
    sums = [Tree[Array](range(CONFIG.blocks)) for _ in model.grid.slots]
    for block, y in terms(model, x, weights, notes):
        for tree, tile in zip(sums, y):
            tree.add(block, tile)
    return x + all_reduce(comm, model.grid, sums)


# The all-reduce: every sum is made on one rank, and then it is everybody's.


def summed_by(size: int) -> dict[int, int]:
    """slot -> the rank that sums up this slot's tile for all."""
    return {slot: slot % size for slot in range(CONFIG.tiles)}


def all_reduce(comm: Communicator, grid: Grid, sums: list[Tree[Array]]) -> Array:
    """sums: for each slot a tree over all blocks, with the terms of this rank's. Returns the sums [T, B, s, h]."""
    return gather(comm, reduce(comm, grid, sums))


@dataclass
class Arrival:
    """A piece in flight to this rank: the tree that it belongs in, and the node that it is there."""

    request: Request
    tree: Tree[Array]
    node: tuple[int, int]


def reduce(comm: Communicator, grid: Grid, sums: list[Tree[Array]]) -> dict[int, Array]:
    """Send each slot's pieces to the rank that sums it. Returns slot -> the sum, of the slots that this rank sums."""
    leaves, by = tuple(range(CONFIG.blocks)), summed_by(comm.size)
    mine = [slot for slot, rank in by.items() if rank == comm.rank]
    # Which pieces will come from a rank follows from the blocks that it holds: the subtrees that they fill.
    arrivals = [
        Arrival(comm.Irecv(tile_sized(), peer, Tag.PIECES), sums[slot], node)
        for slot in mine
        for peer in comm.others
        for node in cover(leaves, tuple(grid.blocks_of(peer)))
    ]
    sends = [comm.Isend(piece, rank, Tag.PIECES)
             for slot, rank in by.items() if rank != comm.rank for _, piece in sums[slot].pieces()]
    while arrivals:
        # In whichever order they come: the tree decides in which order they are added.
        arrival = arrivals.pop(comm.Waitany([arrival.request for arrival in arrivals]))
        level, index = arrival.node
        arrival.tree.add(index, arrival.request.array, level)
    comm.Waitall(sends)
    return {slot: sums[slot].total for slot in mine}


def gather(comm: Communicator, own: dict[int, Array]) -> Array:
    """own: the sums that this rank has made, by slot. Every rank sends its own to all: the sums of all [T, B, s, h]."""
    output = np.empty((CONFIG.tiles, *tile_sized().shape), dtype=CONFIG.dtype)
    for slot, total in own.items():
        output[slot] = total
    requests = [comm.Irecv(output[slot], rank, Tag.TOTALS)
                for slot, rank in summed_by(comm.size).items() if rank != comm.rank]
    requests += [comm.Isend(total, peer, Tag.TOTALS) for total in own.values() for peer in comm.others]
    comm.Waitall(requests)
    return output


def tile_sized() -> Array:
    """Room for a tile [B, s, h]."""
    return np.empty((CONFIG.batch_size, CONFIG.tile_len, CONFIG.hidden_size), dtype=CONFIG.dtype)


# The same without a tree.


def mlp_as_it_comes(comm: Communicator, model: Model, x: Array, weights: Parameters, notes: Notes) -> Array:
    """The MLP, with an all-reduce that adds up what it gets as it gets it."""
    sums: Array = sum(y for _, y in terms(model, x, weights, notes))  # type: ignore[assignment]
    return x + gather(comm, reduce_as_it_comes(comm, sums))


def reduce_as_it_comes(comm: Communicator, sums: Array) -> dict[int, Array]:
    """`reduce`, but each rank's blocks are one sum, to which the others' are added in order of arrival."""
    by = summed_by(comm.size)
    arrivals = [(slot, comm.Irecv(tile_sized(), peer, Tag.PIECES))
                for slot, rank in by.items() if rank == comm.rank for peer in comm.others]
    sends = [comm.Isend(sums[slot], rank, Tag.PIECES) for slot, rank in by.items() if rank != comm.rank]
    own = {slot: sums[slot] for slot, rank in by.items() if rank == comm.rank}
    while arrivals:
        slot, request = arrivals.pop(comm.Waitany([request for _, request in arrivals]))
        own[slot] = own[slot] + request.array
    comm.Waitall(sends)
    return own


SubLayer: TypeAlias = Callable[[Communicator, Model, Array, Parameters, Notes], Array]


def on_virtual_ranks(sub_layer: SubLayer, truth: Judge, size: int, seed: int) -> set[str]:
    """The digests of a sub-layer's output that the ranks of a run inside this process hold: one, if all agree."""
    def main(comm: Communicator) -> str:
        model = Model(CONFIG, np, *tp.place(comm))
        return digest(sub_layer(comm, model, truth.layer.middle, dealt(model, truth.weights), Notes()))

    return set(VirtualWorld(size, seed).run(main))


def digest(tiles: Array) -> str:
    """The first letters of a hash of all bits, in the order of the slots."""
    return hashlib.sha256(tiles.tobytes()).hexdigest()[:12]


# The lesson.


def show_owners(lesson: Lesson, grid: Grid) -> None:
    """The blocks of each rank."""
    lesson.part("Who holds what")
    width = CONFIG.ffn_size // CONFIG.blocks
    lesson.say(f"An MLP, h={CONFIG.hidden_size} and f={CONFIG.ffn_size}, in G={CONFIG.blocks} blocks: each has "
               f"{width} columns of gate, the same {width} of up, and the {width} rows of\ndown that they meet. "
               f"{CONFIG.batch_size} sequences of {CONFIG.seq_len} tokens, in T={CONFIG.tiles} tiles.")
    columns = range(grid.blocks.start * width, grid.blocks.stop * width)
    lesson.say_from_all(f"blocks {names(grid.blocks)}: columns {columns[0]} to {columns[-1]} of gate and up, the same "
                        f"rows of down; all {len(grid.slots)} tiles")
    held = all_gather(lesson.comm, np.array([block in grid.blocks for block in range(CONFIG.blocks)], dtype=np.int64))
    lesson.check("each block is on one rank, each tile on every rank",
                 bool(np.all(np.sum(held, axis=0) == 1)) and len(grid.slots) == CONFIG.tiles)


def show_columns_first(lesson: Lesson, grid: Grid, notes: Notes, truth: Judge) -> None:
    """Why by columns and then by rows."""
    lesson.part("Columns, then rows")
    lesson.say("A rank with some columns of gate and up has whole entries of x gate and x up, and can multiply them:")
    lesson.check("x gate and x up of this rank's columns have the single process's bits; no message was needed",
                 all(same_bits(notes.projected[block], truth.layer.mlp.projected[block]) for block in grid.blocks))
    late, early, columns = summed_otherwise(lesson, truth)
    lesson.say("With some rows of gate and up, and as many columns of x, it would have a term of each entry.\n"
               f"In float64: multiplied first and summed after, terms are off from silu(x gate) * (x up) by {late:.2f} "
               f"of\nits largest entry; summed first, by {early:.0e}. So an all-reduce is due before the product, of\n"
               f"2f = {2 * CONFIG.ffn_size} numbers a token. By columns first there is one at the end, of h = "
               f"{CONFIG.hidden_size}.")
    lesson.check(f"rows first: right within {EXACT:g} if terms are summed before the elementwise product",
                 early < EXACT)
    if lesson.size > 1:
        lesson.check("rows first: off by more than 0.1 if they are summed after it, as it is not linear", late > 0.1)
    else:
        lesson.check("rows first on a single rank: it has all rows, so its term is the sum", late < EXACT)
    lesson.check(f"columns first, rows after: terms summed at the end give the textbook's layer within {EXACT:g}",
                 columns < EXACT)


def summed_otherwise(lesson: Lesson, truth: Judge) -> tuple[float, float, float]:
    """How far off, in float64: rows first, summed after the product; rows first, summed before it; columns first."""
    rows = share(CONFIG.hidden_size, lesson.rank, lesson.size)
    mine = slice(rows.start, rows.stop)
    x, gate, up = (truth.textbook[name] for name in ("b", "gate", "up"))  # [B, S, h], [B, S, f], [B, S, f]
    part = np.stack([x[..., mine] @ truth.matrices[name][mine] for name in ("gate", "up")])  # -> [2, B, S, f]
    wanted = naive.silu(gate) * up
    late = np.sum(all_gather(lesson.comm, naive.silu(part[0]) * part[1]), axis=0)
    summed = np.sum(all_gather(lesson.comm, part), axis=0)
    columns = share(CONFIG.ffn_size, lesson.rank, lesson.size)
    mine = slice(columns.start, columns.stop)
    gate, up = (x @ truth.matrices[name][:, mine] for name in ("gate", "up"))  # -> [B, S, f/N], [B, S, f/N]
    y = np.sum(all_gather(lesson.comm, (naive.silu(gate) * up) @ truth.matrices["down"][mine]), axis=0)
    return (relative_gap(late, wanted), relative_gap(naive.silu(summed[0]) * summed[1], wanted),
            relative_gap(truth.textbook["middle"] + y, truth.plain))


def show_all_reduce(lesson: Lesson, grid: Grid) -> None:
    """Who sums what, and what that sends."""
    lesson.part("The all-reduce")
    lesson.say("Each rank has a term of every token's output, and needs the sum. T tiles are dealt to the ranks: each\n"
               "sums up its own, to which the others send it their pieces, and sends the totals to all. A piece is\n"
               "the sum of blocks that fill a whole subtree of the tree over all G.")
    pieces, own = subtrees(grid.blocks), [slot for slot, by in summed_by(lesson.size).items() if by == lesson.rank]
    to_sum, to_all = (lesson.comm.ledger.sums("send", tag.name)[1] for tag in (Tag.PIECES, Tag.TOTALS))
    lesson.say_from_all(f"blocks {names(grid.blocks)} fill {pieces} subtree{'s' * (pieces > 1)}; sums slots "
                        f"{names(own) or 'none'}; sent {to_sum:,} bytes of pieces, {to_all:,} of totals")
    lesson.check("sent, where a rank sums t tiles: T-t tiles, once for each of its subtrees, and t tiles to N-1 ranks",
                 to_sum + to_all == all_reduce_sends(CONFIG.tiles, pieces, lesson.rank, lesson.size, True) * TILE_BYTES)
    formula = 2 * (lesson.size - 1) * NUMBERS * ITEM_BYTES / lesson.size
    if CONFIG.blocks % lesson.size == 0:
        lesson.check(f"that is 2(N-1)/N times B*S*h numbers, {formula:,.0f} bytes, what a ring all-reduce sends, too",
                     to_sum + to_all == formula)
    else:
        most = max(int(row[0]) for row in all_gather(lesson.comm, np.array([to_sum + to_all], dtype=np.int64)))
        lesson.say(f"If N divided G it would be 2(N-1)/N times B*S*h numbers, {formula:,.0f} bytes. Here a rank sends\n"
                   f"up to {most / formula:.2f} times that: its blocks may fill several subtrees, and it may sum more "
                   "tiles than another.")


def show_output(lesson: Lesson, grid: Grid, output: Array, notes: Notes, truth: Judge) -> None:
    """Bits and closeness, and how much of it is this rank's own."""
    lesson.part("The output")
    own = own_terms_only(grid, notes, truth)
    missing = max(relative_gap(own[slot], truth.layer.output[slot]) for slot in grid.slots)
    lesson.say("Every rank has the output of all tokens now. How far off each was before the all-reduce, with its own\n"
               "terms alone, relative to the largest value of a tile:")
    lesson.say_from_all(f"{missing:.2f}")
    if lesson.size > 1:
        lesson.check("own terms alone are not the output: off by more than 0.1", missing > 0.1)
    else:
        lesson.check(f"a single rank's own terms are all terms: the output, within {TOLERANCE:g}", missing < TOLERANCE)
    lesson.check("every bit of every token equals the single process's",
                 same_bits(output, truth.layer.output))
    gap = max(relative_gap(tile, truth.plain[:, grid.tokens(slot)]) for slot, tile in enumerate(output))
    lesson.check(f"and the textbook's layer in float64 agrees within {TOLERANCE:g}", gap < TOLERANCE)


def own_terms_only(grid: Grid, notes: Notes, truth: Judge) -> Array:
    """x plus what this rank's own blocks add to it [T, B, s, h]."""
    total = truth.layer.middle.copy()
    for block in grid.blocks:
        _, down = mlp_views(CONFIG, truth.weights.mlp[0][block])  # -> [h, 2*f/G], [f/G, h]
        total += (notes.hidden[block] @ down).reshape(total.shape)
    return total


def show_order(lesson: Lesson, as_it_came: Array, truth: Judge) -> None:
    """The same all-reduce, whose sums are made in order of arrival."""
    lesson.part("In order of arrival")
    gap = max(relative_gap(tile, wanted) for tile, wanted in zip(as_it_came, truth.layer.output))
    mine, wanted = digest(as_it_came), digest(truth.layer.output)
    lesson.say("Now the same without a tree: each rank adds up its blocks one by one, and the rank that sums a\n"
               "tile adds the others' to it as they come. This job, and the same on virtual ranks inside rank 0:")
    alone = lesson.rank == 0
    trees = {key: on_virtual_ranks(mlp, truth, *key) for key in VIRTUAL_RUNS} if alone else {}
    others = {key: on_virtual_ranks(mlp_as_it_comes, truth, *key) for key in VIRTUAL_RUNS} if alone else {}
    lesson.say(digests_table(lesson.size, mine, wanted, trees, others))
    lesson.say("All ranks of a run agree, as a total is one rank's work. Another run may have another total.")
    same = all_gather(lesson.comm, np.frombuffer(mine.encode(), dtype=np.uint8))
    lesson.check("this job, in order of arrival: all ranks hold the same bits",
                 len({row.tobytes() for row in same}) == 1)
    lesson.check(f"they are not the single process's, though within {TOLERANCE:g}", mine != wanted and gap < TOLERANCE)
    lesson.check("with the tree, all virtual runs have the single process's digest on all ranks",
                 not alone or list(trees.values()) == [{wanted}] * len(VIRTUAL_RUNS))
    lesson.check("in order of arrival, none has it, and all N differ",
                 not alone or len({frozenset(others[key]) for key in VIRTUAL_RUNS if key[1] == 1} | {
                     frozenset({wanted})}) == 1 + len({size for size, _ in VIRTUAL_RUNS}))
    lesson.check("4 ranks have another with another seed; 2 ranks do not: a + b is b + a",
                 not alone or (others[4, 1] != others[4, 2] and others[2, 1] == others[2, 2]))


def digests_table(
    size: int, mine: str, wanted: str, trees: dict[tuple[int, int], set[str]], others: dict[tuple[int, int], set[str]]
) -> Table:
    """A row per run: the digests of its output, with the tree and without."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("run", "with the tree", "in order of arrival"):
        table.add_column(heading, no_wrap=True)
    table.add_row("single process", wanted, "")
    table.add_row(f"this job, N = {size}", "as checked above", mine)
    for (ranks, seed), digests in trees.items():
        table.add_row(f"{ranks} virtual, seed {seed}", " ".join(digests), " ".join(others[ranks, seed]))
    return table


def show_layer(lesson: Lesson, layer: Layer, grid: Grid, truth: Judge) -> None:
    """What a whole layer sends, counted on the project's own schedule."""
    lesson.part("A layer, forward and backward")
    lesson.say("`tsp_ref.schedules.tp` does so for attention too, cut by heads: wq, wk, wv by columns, wo by rows. In\n"
               "the backward the gradient of a sub-layer's input is again a sum over blocks, so there is an\n"
               "all-reduce for each; gradients of weights are whole where the weights are. Bytes sent:")
    ledger = lesson.comm.ledger
    mine = [ledger.sums("send", sublayer=part, direction=way)[1] for part, way in PHASES]
    lesson.say(bytes_table(all_gather(lesson.comm, np.array(mine, dtype=np.int64))))
    once = all_reduce_sends(CONFIG.tiles, subtrees(grid.blocks), lesson.rank, lesson.size, True) * TILE_BYTES
    lesson.check("each of the four is one all-reduce, of as many bytes as the one above: 2 forward, 2 backward",
                 mine == [once] * len(PHASES))
    if CONFIG.blocks % lesson.size == 0:
        lesson.check("so a layer sends 8(N-1)/N times B*S*h numbers, whatever f is",
                     sum(mine) * lesson.size == 8 * (lesson.size - 1) * NUMBERS * ITEM_BYTES)
    tags = {entry.tag for entry in ledger.entries if entry.phase in PHASES}
    lesson.check("and sends nothing else", tags <= {"ATTENTION_SUMS", "MLP_SUMS"})
    blocks = slice(grid.blocks.start, grid.blocks.stop)
    lesson.check("output and dx have the single process's bits, for all tokens",
                 same_bits(layer.output, truth.layer.output) and same_bits(layer.dx, truth.layer.dx))
    lesson.check("so have the gradients of this rank's weights, for which nothing was sent",
                 all(same_bits(own, whole[blocks]) for (_, own), (_, whole) in zip(
                     layer.gradients.tensors(), truth.layer.gradients.tensors())))


def bytes_table(rows: list[Array]) -> Table:
    """A row per rank: what it sent in each sub-layer and way, and their sum."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("rank")
    for heading in (*(f"{part} {way}" for part, way in PHASES), "layer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, row in enumerate(rows):
        table.add_row(str(rank), *(f"{sent:,}" for sent in [*row.tolist(), int(row.sum())]))
    return table


def holdings(weights: Parameters, layer: Layer) -> list[int]:
    """Bytes of a layer's weights, of their gradients, of the sub-layers' inputs, and of what is kept by blocks."""
    both = [held.attention[0].nbytes + held.mlp[0].nbytes for held in (weights, layer.gradients)]
    return [*both, *kept_bytes(layer.attention, layer.mlp)]


def show_holdings(lesson: Lesson, weights: Parameters, layer: Layer, accounts: int, truth: Judge) -> None:
    """What tensor parallelism divides by N, and what not."""
    lesson.part("What a rank keeps")
    mine, alone = holdings(weights, layer), holdings(truth.weights, truth.layer)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("rank", "weights", "their gradients", "kept by blocks", "inputs of sub-layers"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [row.tolist() for row in all_gather(lesson.comm, np.array(mine, dtype=np.int64))]
    for name, (held, gradients, inputs, kept) in [*enumerate(rows), ("alone", alone)]:
        table.add_row(str(name), *(f"{count:,}" for count in (held, gradients, kept, inputs)))
    lesson.say(table)
    lesson.say("Bytes of one layer. Kept by blocks, for the backward: queries, keys, values, heads, x gate and x up.\n"
               "The sub-layers' inputs are of all tokens on every rank, and so are the norms and their gradients,\n"
               "which each rank computes for itself: that is what is replicated, and more ranks do not make it less.")
    blocks = len(layer.gradients.mlp[0])
    lesson.check("weights, gradients and what is kept by blocks: the single process's, times blocks held / G",
                 all(mine[i] * CONFIG.blocks == alone[i] * blocks for i in (0, 1, 3)))
    lesson.check("inputs of the sub-layers: the single process's, whole",
                 mine[2] == alone[2] == 2 * NUMBERS * ITEM_BYTES)
    lesson.check("the program's own accounts hold no more: what is kept by blocks, the MLP's input, the output",
                 accounts == mine[3] + 2 * NUMBERS * ITEM_BYTES)


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_comparable_bits()
    lesson.require_ranks(CONFIG.blocks)
    truth, notes = judge(), Notes()
    model = Model(CONFIG, np, *tp.place(lesson.comm))
    weights, x = dealt(model, truth.weights), truth.layer.middle
    show_owners(lesson, model.grid)
    output = mlp(lesson.comm, model, x, weights, notes)
    show_columns_first(lesson, model.grid, notes, truth)
    show_all_reduce(lesson, model.grid)
    show_output(lesson, model.grid, output, notes, truth)
    show_order(lesson, mlp_as_it_comes(lesson.comm, model, x, weights, Notes()), truth)
    fresh = Model(CONFIG, np, *tp.place(lesson.comm))
    layer = whole_layer(tp, (lesson.comm,), fresh, weights)
    show_layer(lesson, layer, fresh.grid, truth)
    show_holdings(lesson, weights, layer, fresh.memory.held["activations"], truth)


if __name__ == "__main__":
    run(__doc__, main)
