"""The forward on tiles: a transformer cut in blocks of weights and tiles of tokens, and dealt to N ranks.

Objective: after this lesson you can cut a sequence in tiles and the weights in blocks, compute a layer piece by piece
so that the pieces add up to the textbook's whole arrays, say why the tiles are dealt out in zigzag, and show that N
ranks have the bits of one.

    mpirun -n 4 python lessons/03_forward_on_tiles.py
    python lessons/03_forward_on_tiles.py --ranks 4 --shuffle 7

Every rank holds all weights here and projects all tiles to queries, keys and values, but attends, and has outputs and
losses, only for its own slots. How weights are shared out, too, is another lesson.

Look at: the causal work of each rank, contiguous against zigzag; the distance of each tile result from the whole-array
maths; the bit patterns of a sum over blocks in random orders.

Try it: in `project`, put each tile's keys and values where its slot is instead of where its text is: replace
`model.grid.tokens(slot)` by `slice(slot * k.shape[2], (slot + 1) * k.shape[2])`. The checks "keys ..." and "values ..."
still hold, tile by tile; "heads ..." and all that follows from them fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

from stage import Lesson, one_by_one, patterns, random_weights, run

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.grid.grid import Grid, folded, share
from tsp_ref.grid.tree import Tree
from tsp_ref.model.config import Config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, attention_views, mlp_views
from tsp_ref.ops.attention import attend_forward, out_forward
from tsp_ref.ops.embedding import embed_forward
from tsp_ref.ops.loss import logits_forward, merge_triples, token_losses
from tsp_ref.ops.mlp import swiglu_forward
from tsp_ref.ops.norm import rmsnorm_forward
from tsp_ref.ops.projection import qkv_forward
from tsp_ref.reference import naive, single

SEED = 2604
# In float64, so that a gap above the tolerance is a mistake and no rounding.
CONFIG = Config(vocab_size=64, hidden_size=64, num_layers=2, num_heads=16, num_kv_heads=8, ffn_size=128, seq_len=64,
                blocks=8, tiles=16, batch_size=2, dtype="float64")
TOLERANCE = 1e-12
ORDERS = 50


class Tag(IntEnum):
    """What slot p holds travels under the tag TILE + p."""

    TILE = 10


@dataclass
class Setting:
    """What every section of the lesson needs.

    model    all slots and blocks, as one process has them
    grid     what this rank owns
    weights  all of them, on every rank
    """

    lesson: Lesson
    model: Model
    grid: Grid
    weights: Parameters


def set_up(lesson: Lesson) -> Setting:
    """The same random weights on every rank."""
    model = Model(CONFIG, np)
    grid = Grid(CONFIG.blocks, CONFIG.tiles, CONFIG.tile_len, *folded(lesson.rank, lesson.size))
    return Setting(lesson, model, grid, random_weights(model, np.random.default_rng(SEED)))


def cut(grid: Grid, whole: Array, slots: Iterable[int]) -> dict[int, Array]:
    """The tiles of some slots of a whole array [B, S, ...]."""
    return {slot: whole[:, grid.tokens(slot)].copy() for slot in slots}


# Who owns which tiles, and what that costs.


def show_slots(setting: Setting) -> None:
    """Which tiles each rank's slots hold."""
    lesson, grid = setting.lesson, setting.grid
    lesson.part("Tiles, slots, blocks")
    lesson.say(f"S = {CONFIG.seq_len} tokens in T = {CONFIG.tiles} tiles of s = {CONFIG.tile_len}; each weight matrix "
               f"in G = {CONFIG.blocks} blocks. T and G belong to the model; ranks only share out tiles and blocks.")
    tiles = [grid.tile(slot) for slot in grid.slots]
    lesson.say_from_all(f"slots {grid.slots[0]:2} to {grid.slots[-1]:2} hold the tiles "
                        + " ".join(f"{tile:2}" for tile in tiles))
    covered = np.zeros(CONFIG.seq_len, dtype=np.int64)
    for slot in grid.slots:
        covered[grid.tokens(slot)] += 1
    times = np.sum(all_gather(lesson.comm, covered), axis=0)
    lesson.check("over all ranks, each token is in exactly one slot", bool(np.all(times == 1)))


def pairs(tiles: list[int]) -> int:
    """How many query-key pairs causal attention has for the queries of some tiles: position + 1 for each query."""
    length = CONFIG.tile_len
    return sum(position + 1 for tile in tiles for position in range(tile * length, (tile + 1) * length))


def show_work(setting: Setting) -> None:
    """The query-key pairs of each rank, with tiles dealt out contiguously and in zigzag."""
    lesson, grid = setting.lesson, setting.grid
    lesson.part("Causal work: why zigzag")
    ranks = lesson.size if lesson.size > 1 else 4
    dealt = [share(CONFIG.tiles, rank, ranks) for rank in range(ranks)]
    contiguous = [list(slots) for slots in dealt]
    zigzag = [[grid.tile(slot) for slot in slots] for slots in dealt]
    lesson.say(f"Query-key pairs of one sequence for one head, on {ranks} ranks" + (":" if lesson.size > 1 else
               " (one rank alone has them all; this is how four would share them):"))
    lesson.say(work_table(contiguous, zigzag))
    lesson.say("All wait for the rank with the most. In zigzag, slots 0 and 1, 2 and 3, and so on hold a cheap and an "
               "expensive tile each, and every such pair is the same work.")
    by_formula = [[pairs(tiles) for tiles in way] for way in (contiguous, zigzag)]
    visible = np.tri(CONFIG.seq_len, dtype=np.int64).reshape(CONFIG.tiles, -1).sum(axis=1)  # [T]
    by_mask = [[int(visible[tiles].sum()) for tiles in way] for way in (contiguous, zigzag)]
    lesson.check("the counts are those of the ones in a causal mask, and add up to S(S+1)/2", by_formula == by_mask
                 and {sum(way) for way in by_formula} == {CONFIG.seq_len * (CONFIG.seq_len + 1) // 2})
    lesson.check("the busiest rank has less to do in zigzag", max(by_formula[1]) < max(by_formula[0]))
    of_pair = {pairs([grid.tile(slot), grid.tile(slot + 1)]) for slot in range(0, CONFIG.tiles, 2)}
    lesson.check("every pair of slots is the same work", len(of_pair) == 1)
    if CONFIG.tiles % (2 * ranks) == 0:
        lesson.check("every rank has whole pairs here, so all have exactly the same", len(set(by_formula[1])) == 1)


def work_table(contiguous: list[list[int]], zigzag: list[list[int]]) -> Table:
    """A row per rank."""
    mean = pairs(list(range(CONFIG.tiles))) / len(zigzag)
    table = Table(box=SIMPLE_HEAD)
    for heading in ("rank", "contiguous", "of the mean", "zigzag", "of the mean"):
        table.add_column(heading, justify="right")
    for rank, ways in enumerate(zip(contiguous, zigzag)):
        counts = [pairs(tiles) for tiles in ways]
        table.add_row(str(rank), *(text for count in counts for text in (f"{count:,}", f"{count / mean:.2f}")))
    return table


# A tile of its own: the project's operations take stacks of tiles [p, ...], and here a stack is one tile.


def normalised(x: Array, gain: Array) -> Array:
    """RMSNorm: [B, s, h] -> [B, s, h]."""
    return rmsnorm_forward(np, x[None], gain, CONFIG.norm_eps)[0]


def queries_keys_values(x: Array, wqkv: Array, rotary: Array) -> tuple[Array, Array, Array]:
    """A block's queries [B, K/G, g*s, e], keys and values [B, K/G, s, e] of a tile [B, s, h]."""
    batch, heads, length, head_dim = CONFIG.batch_size, CONFIG.kv_heads_per_block, CONFIG.tile_len, CONFIG.head_dim
    q = np.empty((1, batch, heads, CONFIG.group_size * length, head_dim), dtype=np.float64)
    keys_values = np.empty((1, 2, batch, heads, length, head_dim), dtype=np.float64)
    qkv_forward(np, x[None], wqkv, rotary[None], out=(q, keys_values))
    return q[0], keys_values[0, 0], keys_values[0, 1]


def attend(q: Array, keys_values: Array, visible: int, mask: Array) -> Array:
    """The attention of a tile's queries [B, K/G, g*s, e] to the first keys and values of [2, B, K/G, S, e]."""
    heads, logsumexp = np.empty_like(q[None]), np.empty_like(q[None, ..., :1])
    attend_forward(np, q[None], keys_values, [visible], mask, out=(heads, logsumexp))
    return heads[0]


def fed_forward(x: Array, gate_up: Array, down: Array) -> Array:
    """A block's term of the MLP: [B, s, h] -> [B, s, h]."""
    projected = np.empty((1, CONFIG.batch_size * CONFIG.tile_len, gate_up.shape[1]), dtype=np.float64)
    return swiglu_forward(np, x[None], gate_up, down, out=projected)[0]


# One layer on tiles.


@dataclass
class Kept:
    """The results of one layer on tiles: by (block, slot), or by slot where the blocks are summed up."""

    norm: dict[int, Array] = field(default_factory=dict)
    queries: dict[tuple[int, int], Array] = field(default_factory=dict)
    keys: dict[tuple[int, int], Array] = field(default_factory=dict)
    values: dict[tuple[int, int], Array] = field(default_factory=dict)
    heads: dict[tuple[int, int], Array] = field(default_factory=dict)
    of_block: dict[tuple[int, int], Array] = field(default_factory=dict)
    attention: dict[int, Array] = field(default_factory=dict)
    mlp_norm: dict[int, Array] = field(default_factory=dict)
    mlp: dict[int, Array] = field(default_factory=dict)


def blocks_in_turn(grid: Grid) -> Iterator[int]:
    """All blocks, this rank's own first and then its left neighbours', as a ring would bring them."""
    here = grid.weight_axis
    for step in range(here.size):
        yield from grid.blocks_of((here.rank - step) % here.size)


def project(model: Model, normed: dict[int, Array], wqkv: Array, block: int, kept: Kept) -> Array:
    """Queries of every tile; keys and values [2, B, K/G, S, e] of the whole sequence, in the order of the text."""
    whole = np.empty((2, CONFIG.batch_size, CONFIG.kv_heads_per_block, CONFIG.seq_len, CONFIG.head_dim), np.float64)
    for slot, tile in normed.items():
        q, k, v = queries_keys_values(tile, wqkv, model.rotary[slot])
        kept.queries[block, slot], kept.keys[block, slot], kept.values[block, slot] = q, k, v
        place = model.grid.tokens(slot)
        whole[0, :, :, place], whole[1, :, :, place] = k, v
    return whole


def attention_on_tiles(setting: Setting, x: dict[int, Array], layer: int, kept: Kept) -> dict[int, Array]:
    """x: every slot -> [B, s, h]. Returns x plus attention for this rank's slots."""
    model, grid, gain = setting.model, setting.grid, setting.weights.gains[2 * layer]
    kept.norm = {slot: normalised(tile, gain) for slot, tile in x.items()}
    sums = {slot: Tree[Array](range(CONFIG.blocks)) for slot in grid.slots}
    for block in blocks_in_turn(grid):
        wqkv, wo = attention_views(CONFIG, setting.weights.attention[layer][block])
        keys_values = project(model, kept.norm, wqkv, block, kept)  # [2, B, K/G, S, e]
        for slot in grid.slots:
            # Keys after the tile are not masked: they are never looked at.
            heads = attend(kept.queries[block, slot], keys_values, grid.visible(slot), model.mask)
            y = out_forward(np, heads[None], wo, CONFIG.tile_len)[0]  # [B, K/G, g*s, e] -> [B, s, h]
            kept.heads[block, slot], kept.of_block[block, slot] = heads, y
            sums[slot].add(block, y.copy())  # the tree adds in place
    kept.attention = {slot: tree.total for slot, tree in sums.items()}
    return {slot: x[slot] + kept.attention[slot] for slot in grid.slots}


def mlp_on_tiles(setting: Setting, x: dict[int, Array], layer: int, kept: Kept) -> dict[int, Array]:
    """x: this rank's slots -> [B, s, h]. Returns x plus the MLP of the normed x; no tile looks at another."""
    grid, gain = setting.grid, setting.weights.gains[2 * layer + 1]
    kept.mlp_norm = {slot: normalised(x[slot], gain) for slot in grid.slots}
    sums = {slot: Tree[Array](range(CONFIG.blocks)) for slot in grid.slots}
    for block in blocks_in_turn(grid):
        gate_up, down = mlp_views(CONFIG, setting.weights.mlp[layer][block])
        for slot in grid.slots:
            sums[slot].add(block, fed_forward(kept.mlp_norm[slot], gate_up, down))
    kept.mlp = {slot: tree.total for slot, tree in sums.items()}
    return {slot: x[slot] + kept.mlp[slot] for slot in grid.slots}


def whole_layer(x: Array, w: naive.Weights, gains: Array) -> dict[str, Array]:
    """The textbook: one layer on whole arrays, x [B, S, h], with all S x S scores; what tiles are compared with."""
    y, computed = naive.layer_forward(CONFIG, w, gains, x)
    g = CONFIG.group_size  # the textbook repeats a key/value head for each of its g query heads
    return {
        "norm": computed["a"],  # [B, S, h]
        "queries": computed["q"],  # [B, H, S, e]
        "keys": computed["k"][:, ::g],  # [B, K, S, e]
        "values": computed["v"][:, ::g],  # [B, K, S, e]
        "heads": naive.split(computed["heads"], CONFIG.head_dim),  # [B, S, H*e] -> [B, H, S, e]
        "attention": computed["middle"] - x,  # [B, S, h]
        "mlp_norm": computed["b"],  # [B, S, h]
        "mlp": y - computed["middle"],  # [B, S, h]
    }


def gap(found: dict[int, Array] | dict[tuple[int, int], Array], whole: Array, grid: Grid) -> float:
    """The largest difference of any piece from its place in a whole array, relative to the array's largest entry."""
    differences = []
    for key, piece in found.items():
        if isinstance(key, tuple):  # of a whole array of heads: this block's heads, this slot's tokens
            count = whole.shape[1] // CONFIG.blocks
            place = whole[:, key[0] * count : (key[0] + 1) * count, grid.tokens(key[1])]
        else:
            place = whole[:, grid.tokens(key)]
        differences.append(np.max(np.abs(piece.reshape(place.shape) - place)))
    return float(np.max(differences) / np.max(np.abs(whole)))


def show_layer(setting: Setting) -> Kept:
    """Every tile result of one layer against its place in the whole arrays."""
    lesson, grid = setting.lesson, setting.grid
    lesson.part("One layer on tiles, against whole arrays")
    shape = (CONFIG.batch_size, CONFIG.seq_len, CONFIG.hidden_size)
    x = np.random.default_rng([SEED, 1]).standard_normal(shape, dtype=np.float64)  # [B, S, h]
    kept = Kept()
    middle = attention_on_tiles(setting, cut(grid, x, range(CONFIG.tiles)), 0, kept)
    mlp_on_tiles(setting, middle, 0, kept)
    wanted = whole_layer(x, naive.assemble(CONFIG, setting.weights)["layers"][0], setting.weights.gains[:2])
    lesson.say("Each rank compares all it has computed. A gap is the largest difference from the whole arrays, in "
               f"float64, relative to their largest entry, on the worst rank; at most {TOLERANCE:.0e} is allowed.")
    for name, whole in wanted.items():
        found = getattr(kept, name)
        worst = np.max(all_gather(lesson.comm, np.array([gap(found, whole, grid)])))
        pieces = sum(int(row[0]) for row in all_gather(lesson.comm, np.array([len(found)], dtype=np.int64)))
        lesson.check(f"{name}: {pieces:,} tile results, largest gap {worst:.1e}", bool(worst <= TOLERANCE))
    return kept


# Several orders of blocks.


def in_the_tree(partials: list[Array], order: Array) -> Array:
    """The sum by the tree, fed in the order given."""
    tree = Tree[Array](range(CONFIG.blocks))
    for block in order:
        tree.add(int(block), partials[block].copy())
    return tree.total


def show_orders(setting: Setting, kept: Kept) -> None:
    """The sum over blocks in random orders, one by one and by the tree."""
    lesson, grid = setting.lesson, setting.grid
    lesson.part(f"{ORDERS} orders of blocks")
    lesson.say(f"A tile's attention is a sum over G = {CONFIG.blocks} blocks of heads. Above, each rank took its own "
               f"blocks first; now it adds up each of its tiles in {ORDERS} random orders. Each rank's first slot:")
    generator = np.random.default_rng([SEED, 2])
    orders = [generator.permutation(CONFIG.blocks) for _ in range(ORDERS)]
    naive_patterns, tree_patterns = {}, {}
    for slot in grid.slots:
        partials = [kept.of_block[block, slot] for block in range(CONFIG.blocks)]
        naive_patterns[slot] = patterns([one_by_one(partials, order) for order in orders])
        tree_patterns[slot] = patterns([in_the_tree(partials, order) for order in orders])
    first = grid.slots[0]
    several, one = len(naive_patterns[first]), len(tree_patterns[first])
    lesson.say_from_all(f"blocks taken in the order {' '.join(map(str, blocks_in_turn(grid)))}; slot {first:2}: "
                        f"{several} bit patterns one by one, {one} by the tree")
    lesson.check("one by one, each tile has several patterns", all(len(found) > 1 for found in naive_patterns.values()))
    lesson.check("by the tree each tile has one, the one of the layer above",
                 all(tree_patterns[slot] == {kept.attention[slot].tobytes()} for slot in grid.slots))


# The whole model.


@dataclass
class Course:
    """A whole forward on one rank.

    inputs  what goes into each layer's attention, into its MLP, and last into the head: slot -> [B, s, h] each
    losses  slot -> [B*s]
    """

    inputs: list[dict[int, Array]]
    losses: dict[int, Array]
    loss: float


def exchange_tiles(comm: Communicator, grid: Grid, own: dict[int, Array]) -> dict[int, Array]:
    """Every rank's tiles on every rank: here so that each can compute all keys and values by itself."""
    tiles, requests = dict(own), []
    for peer in comm.others:
        for slot in grid.slots_of(peer):
            tiles[slot] = np.empty_like(own[grid.slots[0]])
            requests.append(comm.Irecv(tiles[slot], peer, Tag.TILE + slot))
        requests += [comm.Isend(tile, peer, Tag.TILE + slot) for slot, tile in own.items()]
    comm.Waitall(requests)
    return tiles


def embedding_on_tiles(setting: Setting, tokens: dict[int, Array]) -> dict[int, Array]:
    """tokens: slot -> [B, s]. A block has the rows of its own part of the vocabulary, and adds zeros for the rest."""
    x: dict[int, Array] = {}
    for slot, tile in tokens.items():
        tree = Tree[Array](range(CONFIG.blocks))
        for block in blocks_in_turn(setting.grid):
            table = setting.weights.embedding[block]
            rows = embed_forward(np, tile[None], table, block * len(table))[0]  # [B, s] -> [B, s, h]
            tree.add(block, rows)
        x[slot] = tree.total
    return x


def head_on_tiles(setting: Setting, x: dict[int, Array], targets: dict[int, Array]) -> dict[int, Array]:
    """Each token's loss, slot -> [B*s]; the tree merges (largest, sum, target's logit) of the blocks' logits."""
    losses: dict[int, Array] = {}
    for slot, tile in x.items():
        last = normalised(tile, setting.weights.gains[-1])
        tree = Tree[Array](range(CONFIG.blocks), partial(merge_triples, np))
        for block in blocks_in_turn(setting.grid):
            table = setting.weights.head_table[block]
            triple = logits_forward(np, last[None], table, targets[slot][None], block * len(table))  # [1, 3, B*s]
            tree.add(block, triple)
        losses[slot] = token_losses(np, tree.total)[0][0]
    return losses


def mean_loss(comm: Communicator, grid: Grid, losses: dict[int, Array]) -> float:
    """The mean over all tokens of all ranks: each slot's sum is a leaf of one tree, on every rank."""
    sums = exchange_tiles(comm, grid, {slot: np.sum(tile, keepdims=True) for slot, tile in losses.items()})
    tree = Tree[Array](range(CONFIG.tiles))
    for slot, leaf in sums.items():
        tree.add(slot, leaf.copy())
    return float(tree.total[0]) / (CONFIG.batch_size * CONFIG.seq_len)


def forward(setting: Setting, tokens: Array, targets: Array) -> Course:
    """tokens, targets [B, S]."""
    comm, grid = setting.lesson.comm, setting.grid
    inputs = [embedding_on_tiles(setting, cut(grid, tokens, grid.slots))]
    for layer in range(CONFIG.num_layers):
        everyone = exchange_tiles(comm, grid, inputs[-1])
        inputs.append(attention_on_tiles(setting, everyone, layer, Kept()))
        inputs.append(mlp_on_tiles(setting, inputs[-1], layer, Kept()))
    losses = head_on_tiles(setting, inputs[-1], cut(grid, targets, grid.slots))
    return Course(inputs, losses, mean_loss(comm, grid, losses))


def one_process(setting: Setting, tokens: Array, targets: Array) -> Course:
    """The same by `reference.single`, which knows no rank, on every rank for itself."""
    model, slots = setting.model, range(CONFIG.tiles)
    tokens_of, targets_of = (  # [T, B, s]: here the slots are the first axis
        np.stack(list(cut(model.grid, whole, slots).values())) for whole in (tokens, targets))
    loss, saved = single.model_forward(model, setting.weights, tokens_of, targets_of)
    inputs = [kept.x for layer in zip(saved.attention, saved.mlp) for kept in layer] + [saved.head.x]  # [T, B, s, h]
    return Course([dict(enumerate(x)) for x in inputs], {}, loss)


def show_model(setting: Setting) -> None:
    """The loss and every tile between the sub-layers, against whole arrays and against one process."""
    lesson, grid = setting.lesson, setting.grid
    lesson.part(f"The whole model: embedding, {CONFIG.num_layers} layers, head")
    generator = np.random.default_rng([SEED, 3])
    tokens, targets = generator.integers(0, CONFIG.vocab_size, (2, CONFIG.batch_size, CONFIG.seq_len), dtype=np.int64)
    course, alone = forward(setting, tokens, targets), one_process(setting, tokens, targets)
    textbook = naive.loss_and_gradients(CONFIG, naive.assemble(CONFIG, setting.weights), tokens, targets)
    logits = textbook["logits"]  # [B, S, V]
    target = np.take_along_axis(logits, targets[..., None], -1)[..., 0]  # [B, S, V] -> [B, S]
    wanted = np.log(np.exp(logits).sum(-1)) - target  # [B, S, V] -> [B, S]
    embedded = naive.assemble(CONFIG, setting.weights)["embedding"][tokens]  # [B, S] -> [B, S, h]
    lesson.say(f"Mean loss in nats: {course.loss!r} on tiles, {alone.loss!r} in one process, {textbook['loss']!r} on "
               "whole arrays.")
    rows = cut(grid, embedded, grid.slots)
    lesson.check("the embedding is the table's rows, bit for bit: one block has the row, the others add zeros",
                 all(tile.tobytes() == rows[slot].tobytes() for slot, tile in course.inputs[0].items()))
    lesson.check(f"each token's loss is that of whole arrays, within {TOLERANCE:.0e} of the largest",
                 gap(course.losses, wanted, grid) <= TOLERANCE)
    lesson.check(f"so is the mean, within {TOLERANCE:.0e}", abs(course.loss / textbook["loss"] - 1) <= TOLERANCE)
    lesson.check(f"every tile between sub-layers has the bits of one process, and so has the loss (N = {lesson.size})",
                 np.float64(course.loss).tobytes() == np.float64(alone.loss).tobytes()
                 and all(one[slot].tobytes() == other[slot].tobytes()
                         for one, other in zip(course.inputs, alone.inputs, strict=True) for slot in grid.slots))


def main(lesson: Lesson) -> None:
    """The lesson on one rank."""
    lesson.require_comparable_bits()
    lesson.require_ranks(CONFIG.max_ranks)
    setting = set_up(lesson)
    show_slots(setting)
    show_work(setting)
    kept = show_layer(setting)
    show_orders(setting, kept)
    show_model(setting)


if __name__ == "__main__":
    run(__doc__, main)
