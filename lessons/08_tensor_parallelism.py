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
ranks do not make fewer; the digests of the same part on other numbers of ranks, with and without a fixed order of its
sums; and the last table, where one column is the same on every rank, for any N.

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

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from stage import (
    Lesson,
    all_reduce_sends,
    dealt,
    kept_bytes,
    names,
    random_tiles,
    random_weights,
    relative_gap,
    run,
    subtrees,
)

from tsp_ref.arrays import Array, Tiles
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
from tsp_ref.model.tilewise import add_residual, normalise, totals
from tsp_ref.ops.mlp import sigmoid
from tsp_ref.process import threads
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
    """A whole layer, forward and backward, as one rank computed it: for its slots, of its blocks."""

    middle: Tiles
    output: Tiles
    dx: Tiles
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
    dgain = {slot: model.empty("working", *weights.gains.shape) for slot in model.grid.slots}
    middle, attention = call["attention_forward"](x, weights, 0)
    output, mlp = call["mlp_forward"](middle, weights, 0)
    dmiddle = call["mlp_backward"](dy, mlp, weights, 0, gradients, dgain)
    dx = call["attention_backward"](dmiddle, attention, weights, 0, gradients, dgain)
    return Layer(middle, output, dx, gradients, attention, mlp)


def judge() -> Judge:
    """`reference.single` and `reference.naive` on the whole layer."""
    model = Model(CONFIG, np)
    weights = random_weights(model, np.random.default_rng(SEED))
    whole = np.empty((CONFIG.batch_size, CONFIG.seq_len, CONFIG.hidden_size), dtype=np.float64)
    for slot, tile in random_tiles(model, 1).items():
        whole[:, model.grid.tokens(slot)] = tile
    layer = naive.assemble(CONFIG, weights)["layers"][0]
    matrices = {name: matrix.astype(np.float64) for name, matrix in layer.items()}
    plain, textbook = naive.layer_forward(CONFIG, matrices, weights.gains[:2].astype(np.float64), whole)
    return Judge(model, weights, whole_layer(single, (), model, weights), matrices, textbook, plain)


# The MLP part.


@dataclass
class Notes:
    """What the lesson writes down while the part runs, by (block, slot); the part itself never reads it."""

    projected: dict[tuple[int, int], Array] = field(default_factory=dict)  # x gate and x up, [B*s, 2f/G]
    hidden: dict[tuple[int, int], Array] = field(default_factory=dict)  # [B*s, f/G]


def terms(model: Model, x: Tiles, weights: Parameters, notes: Notes) -> Iterator[tuple[int, int, Array]]:
    """What this rank's blocks add to the output, without a message: (block, slot, [B, s, h])."""
    normed = normalise(model, x, weights.gains[1])
    for block, packed in zip(model.grid.blocks, weights.mlp[0]):
        gate_up, down = mlp_views(CONFIG, packed)  # -> [h, 2*f/G], [f/G, h]
        for slot in model.grid.slots:
            # Columns: all of a token's numbers meet all of a column's, so each entry is whole.
            projected = normed[slot].reshape(-1, CONFIG.hidden_size) @ gate_up  # [B*s, h] -> [B*s, 2*f/G]
            gate, up = np.split(projected, 2, axis=1)  # -> [B*s, f/G], [B*s, f/G]
            # Entry by entry, and gate's columns lie where up's lie: nothing is needed from another rank.
            hidden = gate * sigmoid(np, gate) * up  # [B*s, f/G]
            # Rows, those that meet these columns: each entry is a term of a sum over all blocks.
            y = hidden @ down  # [B*s, f/G] -> [B*s, h]
            notes.projected[block, slot], notes.hidden[block, slot] = projected, hidden
            yield block, slot, y.reshape(x[slot].shape)


def mlp_part(comm: Communicator, model: Model, x: Tiles, weights: Parameters, notes: Notes) -> Tiles:
    """x plus the MLP of the normalised x, for all tokens, on every rank."""
    sums = {slot: Tree[Array](range(CONFIG.blocks)) for slot in model.grid.slots}
    for block, slot, y in terms(model, x, weights, notes):
        sums[slot].add(block, y)
    return add_residual(model, x, all_reduce(comm, model.grid, sums))


# The all-reduce: every sum is made on one rank, and then it is everybody's.


def summed_by(size: int) -> dict[int, int]:
    """slot -> the rank that sums up this slot's tile for all."""
    return {slot: rank for rank in range(size) for slot in share(CONFIG.tiles, rank, size)}


def all_reduce(comm: Communicator, grid: Grid, sums: dict[int, Tree[Array]]) -> Tiles:
    """sums: slot -> a tree over all blocks, with the terms of this rank's. Returns slot -> the sum, on every rank."""
    return gather(comm, reduce(comm, grid, sums))


@dataclass
class Arrival:
    """A piece on its way here: the tree that it belongs in, and the node that it is there."""

    request: Request
    tree: Tree[Array]
    node: tuple[int, int]


def reduce(comm: Communicator, grid: Grid, sums: dict[int, Tree[Array]]) -> Tiles:
    """Send each slot's pieces to the rank that sums it. Returns slot -> the sum, of the slots that this rank sums."""
    leaves, by = tuple(range(CONFIG.blocks)), summed_by(comm.size)
    mine = [slot for slot, rank in by.items() if rank == comm.rank]
    # Which pieces will come from a rank follows from the blocks that it holds: the subtrees that they fill.
    coming = [
        Arrival(comm.Irecv(tile_sized(), peer, Tag.PIECES), sums[slot], node)
        for slot in mine
        for peer in comm.others
        for node in cover(leaves, tuple(grid.blocks_of(peer)))
    ]
    leaving = [comm.Isend(piece, rank, Tag.PIECES)
               for slot, rank in by.items() if rank != comm.rank for _, piece in sums[slot].pieces()]
    while coming:
        # In whichever order they come: the tree decides in which order they are added.
        arrival = coming.pop(comm.Waitany([arrival.request for arrival in coming]))
        level, index = arrival.node
        arrival.tree.add(index, arrival.request.array, level)
    comm.Waitall(leaving)
    return totals({slot: sums[slot] for slot in mine})


def gather(comm: Communicator, own: Tiles) -> Tiles:
    """own: the sums that this rank has made. Every rank sends its own to all: slot -> the sum, of all slots."""
    output = {slot: own[slot] if rank == comm.rank else tile_sized() for slot, rank in summed_by(comm.size).items()}
    requests = [comm.Irecv(output[slot], rank, Tag.TOTALS)
                for slot, rank in summed_by(comm.size).items() if rank != comm.rank]
    requests += [comm.Isend(total, peer, Tag.TOTALS) for total in own.values() for peer in comm.others]
    comm.Waitall(requests)
    return output


def tile_sized() -> Array:
    """Room for a tile [B, s, h]."""
    return np.empty((CONFIG.batch_size, CONFIG.tile_len, CONFIG.hidden_size), dtype=CONFIG.dtype)


# The same without a tree.


def mlp_part_as_it_comes(comm: Communicator, model: Model, x: Tiles, weights: Parameters, notes: Notes) -> Tiles:
    """The MLP part, with an all-reduce that adds up what it gets as it gets it."""
    sums: Tiles = {}
    for _, slot, y in terms(model, x, weights, notes):
        sums[slot] = sums[slot] + y if slot in sums else y
    return add_residual(model, x, gather(comm, reduce_as_it_comes(comm, sums)))


def reduce_as_it_comes(comm: Communicator, sums: Tiles) -> Tiles:
    """`reduce`, but each rank's blocks are one sum, to which the others' are added in order of arrival."""
    by = summed_by(comm.size)
    coming = [(slot, comm.Irecv(tile_sized(), peer, Tag.PIECES))
              for slot, rank in by.items() if rank == comm.rank for peer in comm.others]
    leaving = [comm.Isend(sums[slot], rank, Tag.PIECES) for slot, rank in by.items() if rank != comm.rank]
    own = {slot: sums[slot] for slot, rank in by.items() if rank == comm.rank}
    while coming:
        slot, request = coming.pop(comm.Waitany([request for _, request in coming]))
        own[slot] = own[slot] + request.array
    comm.Waitall(leaving)
    return own


Part: TypeAlias = Callable[[Communicator, Model, Tiles, Parameters, Notes], Tiles]


def on_virtual_ranks(part: Part, truth: Judge, size: int, seed: int) -> set[str]:
    """The digests of a part's output that the ranks of a run inside this process hold: one, if all agree."""
    def main(comm: Communicator) -> str:
        model = Model(CONFIG, np, *tp.place(comm))
        return digest(part(comm, model, truth.layer.middle, dealt(model, truth.weights), Notes()))

    return set(VirtualWorld(size, seed).run(main))


def digest(tiles: Tiles) -> str:
    """The first letters of a hash of all bits, in the order of the slots."""
    return hashlib.sha256(b"".join(tiles[slot].tobytes() for slot in sorted(tiles))).hexdigest()[:12]


# The lesson.


def show_owners(lesson: Lesson, grid: Grid) -> None:
    """The blocks of each rank."""
    lesson.part("Who holds what")
    width = CONFIG.ffn_size // CONFIG.blocks
    lesson.say(f"An MLP part, h={CONFIG.hidden_size} and f={CONFIG.ffn_size}, in G={CONFIG.blocks} blocks: each has "
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
    mine = [(block, slot) for block in grid.blocks for slot in grid.slots]
    lesson.check("x gate and x up of this rank's columns have the single process's bits; no message was needed",
                 all(notes.projected[key].tobytes() == truth.layer.mlp.projected[key].tobytes() for key in mine))
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
                 to_sum + to_all == all_reduce_sends(CONFIG.tiles, pieces, lesson.rank, lesson.size) * TILE_BYTES)
    formula = 2 * (lesson.size - 1) * NUMBERS * ITEM_BYTES / lesson.size
    if CONFIG.blocks % lesson.size == 0:
        lesson.check(f"that is 2(N-1)/N times B*S*h numbers, {formula:,.0f} bytes, what a ring all-reduce sends, too",
                     to_sum + to_all == formula)
    else:
        most = max(int(row[0]) for row in all_gather(lesson.comm, np.array([to_sum + to_all], dtype=np.int64)))
        lesson.say(f"If N divided G it would be 2(N-1)/N times B*S*h numbers, {formula:,.0f} bytes. Here a rank sends\n"
                   f"up to {most / formula:.2f} times that: its blocks may fill several subtrees, and it may sum more "
                   "tiles than another.")


def show_output(lesson: Lesson, grid: Grid, output: Tiles, notes: Notes, truth: Judge) -> None:
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
                 all(tile.tobytes() == truth.layer.output[slot].tobytes() for slot, tile in output.items()))
    gap = max(relative_gap(tile, truth.plain[:, grid.tokens(slot)]) for slot, tile in output.items())
    lesson.check(f"and the textbook's layer in float64 agrees within {TOLERANCE:g}", gap < TOLERANCE)


def own_terms_only(grid: Grid, notes: Notes, truth: Judge) -> Tiles:
    """x plus what this rank's own blocks add to it."""
    sums = {slot: tile.copy() for slot, tile in truth.layer.middle.items()}
    for block in grid.blocks:
        _, down = mlp_views(CONFIG, truth.weights.mlp[0][block])  # -> [h, 2*f/G], [f/G, h]
        for slot, total in sums.items():
            total += (notes.hidden[block, slot] @ down).reshape(total.shape)
    return sums


def show_order(lesson: Lesson, as_it_came: Tiles, truth: Judge) -> None:
    """The same all-reduce, whose sums are made in order of arrival."""
    lesson.part("In order of arrival")
    gap = max(relative_gap(tile, truth.layer.output[slot]) for slot, tile in as_it_came.items())
    mine, wanted = digest(as_it_came), digest(truth.layer.output)
    lesson.say("Now the same part without a tree: each rank adds up its blocks one by one, and the rank that sums a\n"
               "tile adds the others' to it as they come. This job, and the same on virtual ranks inside rank 0:")
    alone = lesson.rank == 0
    trees = {key: on_virtual_ranks(mlp_part, truth, *key) for key in VIRTUAL_RUNS} if alone else {}
    others = {key: on_virtual_ranks(mlp_part_as_it_comes, truth, *key) for key in VIRTUAL_RUNS} if alone else {}
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
               "the backward the gradient of a part's input is again a sum over blocks, so there is an all-reduce\n"
               "for each part; gradients of weights are whole where the weights are. Bytes sent, by part and way:")
    ledger = lesson.comm.ledger
    mine = [ledger.sums("send", part=part, direction=way)[1] for part, way in PHASES]
    lesson.say(bytes_table(all_gather(lesson.comm, np.array(mine, dtype=np.int64))))
    once = all_reduce_sends(CONFIG.tiles, subtrees(grid.blocks), lesson.rank, lesson.size) * TILE_BYTES
    lesson.check("each of the four is one all-reduce, of as many bytes as the one above: 2 forward, 2 backward",
                 mine == [once] * len(PHASES))
    if CONFIG.blocks % lesson.size == 0:
        lesson.check("so a layer sends 8(N-1)/N times B*S*h numbers, whatever f is",
                     sum(mine) * lesson.size == 8 * (lesson.size - 1) * NUMBERS * ITEM_BYTES)
    tags = {entry.tag for entry in ledger.entries if entry.phase in PHASES}
    lesson.check("and sends nothing else", tags <= {"ATTENTION_SUMS", "MLP_SUMS"})
    blocks = slice(grid.blocks.start, grid.blocks.stop)
    lesson.check("output and dx have the single process's bits, for all tokens",
                 all(found[slot].tobytes() == wanted[slot].tobytes() for found, wanted in (
                     (layer.output, truth.layer.output), (layer.dx, truth.layer.dx)) for slot in range(CONFIG.tiles)))
    lesson.check("so have the gradients of this rank's weights, for which nothing was sent",
                 all(own.tobytes() == whole[blocks].tobytes() for (_, own), (_, whole) in zip(
                     layer.gradients.tensors(), truth.layer.gradients.tensors())))


def bytes_table(rows: list[Array]) -> Table:
    """A row per rank: what it sent in each part and way, and their sum."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("rank")
    for heading in (*(f"{part} {way}" for part, way in PHASES), "layer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, row in enumerate(rows):
        table.add_row(str(rank), *(f"{sent:,}" for sent in [*row.tolist(), int(row.sum())]))
    return table


def holdings(weights: Parameters, layer: Layer) -> list[int]:
    """Bytes of a layer's weights, of their gradients, of the parts' inputs, and of what is kept by blocks."""
    both = [held.attention[0].nbytes + held.mlp[0].nbytes for held in (weights, layer.gradients)]
    return [*both, *kept_bytes(layer.attention, layer.mlp)]


def show_holdings(lesson: Lesson, weights: Parameters, layer: Layer, books: int, truth: Judge) -> None:
    """What tensor parallelism divides by N, and what not."""
    lesson.part("What a rank keeps")
    mine, alone = holdings(weights, layer), holdings(truth.weights, truth.layer)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("rank", "weights", "their gradients", "kept by blocks", "inputs of the parts"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [row.tolist() for row in all_gather(lesson.comm, np.array(mine, dtype=np.int64))]
    for name, (held, gradients, inputs, kept) in [*enumerate(rows), ("alone", alone)]:
        table.add_row(str(name), *(f"{count:,}" for count in (held, gradients, kept, inputs)))
    lesson.say(table)
    lesson.say("Bytes of one layer. Kept by blocks, for the backward: queries, keys, values, heads, x gate and x up.\n"
               "The parts' inputs are of all tokens on every rank, and so are the norms and their gradients, which\n"
               "each rank computes for itself: that is what is replicated here, and more ranks do not make it less.")
    blocks = len(layer.gradients.mlp[0])
    lesson.check("weights, gradients and what is kept by blocks: the single process's, times blocks held / G",
                 all(mine[i] * CONFIG.blocks == alone[i] * blocks for i in (0, 1, 3)))
    lesson.check("inputs of the parts: the single process's, whole", mine[2] == alone[2] == 2 * NUMBERS * ITEM_BYTES)
    lesson.check("the program's own books hold no more: what is kept by blocks, the MLP's input, the output",
                 books == mine[3] + 2 * NUMBERS * ITEM_BYTES)


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    threads.require_one("this lesson")
    lesson.require_ranks(CONFIG.blocks)
    truth, notes = judge(), Notes()
    model = Model(CONFIG, np, *tp.place(lesson.comm))
    weights, x = dealt(model, truth.weights), truth.layer.middle
    show_owners(lesson, model.grid)
    output = mlp_part(lesson.comm, model, x, weights, notes)
    show_columns_first(lesson, model.grid, notes, truth)
    show_all_reduce(lesson, model.grid)
    show_output(lesson, model.grid, output, notes, truth)
    show_order(lesson, mlp_part_as_it_comes(lesson.comm, model, x, weights, Notes()), truth)
    fresh = Model(CONFIG, np, *tp.place(lesson.comm))
    layer = whole_layer(tp, (lesson.comm,), fresh, weights)
    show_layer(lesson, layer, fresh.grid, truth)
    show_holdings(lesson, weights, layer, fresh.memory.held["activations"], truth)


if __name__ == "__main__":
    run(__doc__, main)
