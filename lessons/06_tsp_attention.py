"""TSP attention: heads come to the tokens, and only keys and values cross between tokens.

Objective: after this lesson you can say what a rank sends in a TSP attention, write both exchanges yourself, and
explain why nothing has to be summed over ranks at the end. (The broadcast of heads and the exchange of keys and values
are those of arXiv 2604.26294; the fixed order of the sum over heads is this project's.)

    mpirun -n 4 python lessons/06_tsp_attention.py
    python lessons/06_tsp_attention.py --ranks 4 --shuffle 7

Look at: who owns which heads and which tokens; the steps, one per owner of heads; the bytes of weights, which grow
with h * h, and of keys and values, which grow with the number of tokens and shrink with grouped-query attention; and
the last section, which asks whose sum each output is.

Try it: in `exchange`, put keys and values where they come in the order of slots, not where they belong in the text:
replace `grid.tokens(slot)` by `slice(slot * length, (slot + 1) * length)`. Every byte still arrives, and the checks of
bytes hold. Three checks fail for each model, with one rank as with four: that keys and values lie in the order of the
text, that the output's bits are the single process's, and that plain causal attention agrees. (With one rank the last
check of all fails, too.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from stage import Lesson, in_order_of_text, members, names, random_tiles, recognise, relative_gap, run, same_bits

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather
from tsp_ref.comm.request import Request
from tsp_ref.grid.grid import Grid, folded
from tsp_ref.grid.tree import Tree
from tsp_ref.model.activations import AttentionSaved
from tsp_ref.model.config import Config, make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, attention_views, initial_parameters
from tsp_ref.model.tilewise import keys_values_of
from tsp_ref.ops.attention import attend_forward, out_forward
from tsp_ref.ops.norm import rmsnorm_forward
from tsp_ref.ops.projection import qkv_forward
from tsp_ref.reference import naive, single

FULL = make_config("tiny", num_layers=1, hidden_size=128, num_heads=16, num_kv_heads=16)
GROUPED = make_config("tiny", num_layers=1, hidden_size=128, num_heads=16, num_kv_heads=8)
TOLERANCE = 1e-5


class Tag(IntEnum):
    """What the messages of this lesson are about."""

    WEIGHTS = 1
    KEYS_VALUES = 2


@dataclass
class Step:
    """What one rank had at hand in a step, and what had arrived for it.

    sender       the rank that its weights came from, or -1 where they are its own
    held         a copy of those weights
    weights      bytes of them that arrived
    keys_values  bytes of keys and values that arrived
    """

    sender: int
    held: Array
    weights: int
    keys_values: int


@dataclass
class Notes:
    """What the lesson writes down while attention runs; attention itself never reads it.

    steps        one per owner of heads
    leaves       slot -> how many terms of its sum over blocks of heads were computed here
    keys_values  block -> [2, B, K/G, S, e], as they lay when its heads were at hand
    """

    steps: list[Step] = field(default_factory=list)
    leaves: dict[int, int] = field(default_factory=dict)
    keys_values: dict[int, Array] = field(default_factory=dict)


def layer_weights(model: Model) -> Parameters:
    """The initial weights, the attention's four times as large: some queries then clearly prefer some keys."""
    weights = initial_parameters(model)
    weights.attention[0] *= 4
    return weights


# TSP attention.


def attention(comm: Communicator, model: Model, x: Array, weights: Parameters, notes: Notes) -> Array:
    """x plus the attention of the normed x, for this rank's tiles [p, B, s, h], p of them in the order of their slots.

    The operations take a stack of tiles, here all that the rank has; to each they do what they would do to it alone.
    """
    grid, shard = model.grid, weights.attention[0]
    normed = rmsnorm_forward(np, x, weights.gains[0], model.config.norm_eps)
    output = Tree[Array](range(model.config.blocks))
    prefetched, requests = broadcast(comm, model, shard, 0)
    for owner in range(comm.size):
        comm.Waitall(requests)
        held, arrived = prefetched, [request for request in requests if request.verb == "receive"]
        if owner + 1 < comm.size:
            # Posted before these are put to work, so that the next owner's heads can travel meanwhile; whether they do
            # is up to the MPI library.
            prefetched, requests = broadcast(comm, model, shard, owner + 1)
        q, own = project(model, normed, held)
        before = comm.ledger.sums("receive", "KEYS_VALUES")[1]
        whole = exchange(comm, model, own)
        notes.steps.append(Step(
            sender=arrived[0].peer if arrived else -1, held=held.copy(),
            weights=sum(request.array.nbytes for request in arrived),
            keys_values=comm.ledger.sums("receive", "KEYS_VALUES")[1] - before))  # all complete: `exchange` has waited
        for position, block in enumerate(grid.blocks_of(owner)):
            notes.keys_values[block] = whole[position].copy()
            _, wo = attention_views(model.config, held[position])  # -> [H/G*e, h]
            # What a block of heads writes is one leaf of each tile's sum over blocks.
            output.add(block, attend(model, q[position], whole[position], wo, notes))
    return x + output.total


def broadcast(comm: Communicator, model: Model, shard: Array, owner: int) -> tuple[Array, list[Request]]:
    """Post the broadcast of an owner's packed {wq, wk, wv, wo} blocks: where they will lie, and the messages."""
    grid = model.grid
    if owner == comm.rank:
        return shard, [comm.Isend(shard, peer, Tag.WEIGHTS) for peer in comm.others]
    received = model.empty("buffers", len(grid.blocks_of(owner)), shard.shape[1])
    return received, [comm.Irecv(received, owner, Tag.WEIGHTS)]


def project(model: Model, normed: Array, held: Array) -> tuple[Array, Array]:
    """The n blocks of heads at hand, for this rank's tokens: queries [n, p, B, K/G, g*s, e], and keys and values
    [n, p, 2, B, K/G, s, e]."""
    config, (count, batch, length, _) = model.config, normed.shape
    heads, head_dim = config.kv_heads_per_block, config.head_dim
    q = model.empty("working", len(held), count, batch, heads, config.group_size * length, head_dim)
    own = model.empty("buffers", len(held), count, 2, batch, heads, length, head_dim)
    for position, packed in enumerate(held):
        wqkv, _ = attention_views(config, packed)  # -> [h, (H+2*K)/G*e]
        qkv_forward(np, normed, wqkv, model.rotary, out=(q[position], own[position]))
    return q, own


def exchange(comm: Communicator, model: Model, own: Array) -> Array:
    """Keys and values of the heads at hand, over the whole sequence and in the order of the text.

    own [n, p, 2, B, K/G, s, e] -> [n, 2, B, K/G, S, e].
    """
    grid = model.grid
    blocks, _, two, batch, heads, length, head_dim = own.shape
    whole = model.empty("buffers", blocks, two, batch, heads, grid.num_tiles * length, head_dim)
    parts = {peer: model.empty("buffers", blocks, len(grid.slots_of(peer)), *own.shape[2:]) for peer in comm.others}
    requests = [comm.Irecv(parts[peer], peer, Tag.KEYS_VALUES) for peer in comm.others]
    requests += [comm.Isend(own, peer, Tag.KEYS_VALUES) for peer in comm.others]
    comm.Waitall(requests)
    parts[comm.rank] = own
    for peer, part in parts.items():
        for number, slot in enumerate(grid.slots_of(peer)):
            # Slots are dealt out zigzag, so neighbours in a message are not neighbours in the text.
            whole[:, :, :, :, grid.tokens(slot)] = part[:, number]
    return whole


def attend(model: Model, q: Array, whole: Array, wo: Array, notes: Notes) -> Array:
    """One block of heads for this rank's tiles: its term of their outputs [p, B, s, h]."""
    visible = [model.grid.visible(slot) for slot in model.grid.slots]  # how many keys each tile sees
    heads, logsumexp = np.empty_like(q), np.empty_like(q[..., :1])  # [p, B, K/G, g*s, e], [p, B, K/G, g*s, 1]
    # A tile of queries has all its keys at hand, so one softmax over them is enough: nothing to merge later.
    attend_forward(np, q, whole, visible, model.mask, out=(heads, logsumexp))
    terms = out_forward(np, heads, wo, model.config.tile_len)  # [p, B, K/G, g*s, e] -> [p, B, s, h]
    for slot, _ in zip(model.grid.slots, terms, strict=True):
        notes.leaves[slot] = notes.leaves.get(slot, 0) + 1
    return terms


# What the checks compare with.


@dataclass
class Judge:
    """One process that owns everything, on every rank; and the textbook formula on whole arrays."""

    model: Model
    weights: Parameters
    output: Array  # [T, B, s, h]
    saved: AttentionSaved
    plain: Array  # [B, S, h] in float64


def judge(config: Config) -> Judge:
    """`reference.single` and plain causal attention, on the whole layer."""
    model = Model(config, np)
    weights, x = layer_weights(model), random_tiles(model, 6)
    output, saved = single.attention_forward(model, x, weights, 0)
    return Judge(model, weights, output, saved, plain_attention(config, in_order_of_text(model.grid, x), weights))


def plain_attention(config: Config, x: Array, weights: Parameters) -> Array:
    """The textbook's layer on whole arrays, in float64, as far as its attention: x plus attention, [B, S, h]."""
    layer = naive.assemble(config, weights)["layers"][0]
    w = {name: matrix.astype(np.float64) for name, matrix in layer.items()}
    _, computed = naive.layer_forward(config, w, weights.gains[:2].astype(np.float64), x)
    return computed["middle"]


def counts(comm: Communicator) -> Array:
    """(messages, bytes) so far, sent and received, of weights, of keys and values, and of all tags: [2, 3, 2]."""
    kinds = ("WEIGHTS", "KEYS_VALUES", None)
    return np.array([[comm.ledger.sums(verb, kind) for kind in kinds] for verb in ("send", "receive")], dtype=np.int64)


# The lesson.


def show_owners(lesson: Lesson, config: Config, grid: Grid) -> None:
    """The blocks of heads and the slots of each rank."""
    lesson.part("Who owns what")
    lesson.say(f"{config.num_heads} query heads of size {config.head_dim} in G={config.blocks} packed blocks "
               f"{{wq, wk, wv, wo}}; {config.seq_len} tokens in T={config.tiles} tiles of {config.tile_len}.\n"
               "Slots hold the tiles zigzag: a cheap tile of queries, which sees few keys, beside an expensive one.")
    dealt = [grid.tile(slot) for slot in grid.slots]
    lesson.say_from_all(f"blocks {names(grid.blocks)}; slots {names(grid.slots)} are tiles {names(dealt)}, "
                        f"which see {sum(tile + 1 for tile in dealt)} tiles of keys")
    pairs = {grid.visible(slot) + grid.visible(slot + 1) for slot in range(0, config.tiles, 2)}
    lesson.check("every pair of slots 2k, 2k+1 sees S + s keys, so equal numbers of pairs are equal work",
                 pairs == {config.seq_len + config.tile_len})


def show_steps(lesson: Lesson, grid: Grid, notes: Notes, truth: Judge) -> None:
    """What each rank noted in each step: whose heads it had, and what had arrived for it."""
    lesson.say("What the ranks noted, step by step: the blocks of heads at hand, recognised by their bytes; whom they\n"
               "came from; and the bytes that arrived, on which ranks, of these weights and then of keys and values.")
    mine = [[step.sender, recognise(step.held, truth.weights.attention[0]), step.weights, step.keys_values]
            for step in notes.steps]
    rows = np.stack(all_gather(lesson.comm, np.array(mine, dtype=np.int64)), axis=1)  # [step, rank, 4]
    lesson.say(steps_table(rows))
    lesson.say("In each step every rank attends with these heads, from its own queries to all keys that they see.")
    lesson.check("step o: every rank holds the blocks of rank o, byte for byte",
                 [mask for _, mask, _, _ in mine]
                 == [sum(1 << block for block in grid.blocks_of(owner)) for owner in range(lesson.size)])
    lesson.check("step o: they came from rank o, and to rank o itself from nobody",
                 [sender for sender, *_ in mine] == [-1 if o == lesson.rank else o for o in range(lesson.size)])


def steps_table(rows: Array) -> Table:
    """rows [step, rank, 4]: a row per step, and in a cell what the ranks noted, once where all noted the same."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("step", "blocks", "from", "weights: bytes on ranks", "keys and values: bytes on ranks"):
        table.add_column(heading)
    for number, (senders, masks, *arrived) in enumerate(rows.transpose(0, 2, 1).tolist()):
        came = sorted({f"rank {sender}" for sender in senders if sender >= 0})
        blocks = sorted({names(members(mask)) for mask in masks})
        table.add_row(str(number), " or ".join(blocks), " or ".join(came) or "nobody", *map(by_rank, arrived))
    return table


def by_rank(numbers: list[int]) -> str:
    """A number, and the ranks that noted it; several such where they differ."""
    ranks = {number: names(rank for rank, other in enumerate(numbers) if other == number) for number in numbers}
    return "; ".join(f"{number:,} on {listed}" for number, listed in sorted(ranks.items(), reverse=True))


def show_bytes(lesson: Lesson, config: Config, grid: Grid, used: Array) -> None:
    """What was sent and received, against formulas in sizes and in what rank r owns: n blocks and t slots."""
    itemsize = np.dtype(config.dtype).itemsize
    keys = config.num_kv_heads * config.head_dim
    block = config.hidden_size * (2 * config.hidden_size + 2 * keys) // config.blocks * itemsize
    slot = 2 * config.batch_size * config.tile_len * keys * itemsize
    owned, slots, others = len(grid.blocks), len(grid.slots), lesson.size - 1
    (weights, kv, _), (weights_in, kv_in, _) = used.tolist()
    lesson.say(f"A block of weights is h(2h + 2Ke)/G numbers, {block:,} bytes; keys and values of a slot, all heads "
               f"together,\nare 2BsKe numbers, {slot:,} bytes. Rank r owns n blocks and t slots: these go to N-1 "
               "others, and the rest comes.")
    lesson.say_from_all(f"weights sent {weights[1]:,}, received {weights_in[1]:,}; "
                        f"keys and values sent {kv[1]:,}, received {kv_in[1]:,}")
    lesson.check("weights: bytes sent = (N-1) n blocks, received = (G-n) blocks",
                 (weights[1], weights_in[1]) == (others * owned * block, (config.blocks - owned) * block))
    lesson.check("keys and values: bytes sent = (N-1) t slots, received = (T-t) slots",
                 (kv[1], kv_in[1]) == (others * slots * slot, (config.tiles - slots) * slot))
    lesson.check("messages sent = N-1 of weights, N(N-1) of keys and values",
                 (weights[0], kv[0]) == (others, lesson.size * others))


def show_output(lesson: Lesson, grid: Grid, output: Array, notes: Notes, truth: Judge) -> None:
    """Bits and closeness."""
    gap = max(relative_gap(tile, truth.plain[:, grid.tokens(slot)]) for slot, tile in zip(grid.slots, output))
    lesson.say("Largest distance from plain causal attention in float64, relative to the largest value:")
    lesson.say_from_all(f"{gap:.1e}")
    wanted = {block: keys_values_of(truth.model, truth.saved, range(block, block + 1)) for block in notes.keys_values}
    lesson.check("keys and values lay in the order of the text, every bit the single process's",
                 all(same_bits(notes.keys_values[block], whole) for block, whole in wanted.items()))
    lesson.check("every bit of this rank's tokens equals the single process's",
                 same_bits(output, truth.output[list(grid.slots)]))
    lesson.check(f"and plain causal attention agrees within {TOLERANCE:g}", gap < TOLERANCE)


def own_heads_only(model: Model, truth: Judge) -> Array:
    """What this rank's own heads alone add to its tokens: all that it could know if heads did not travel."""
    grid, own = model.grid, list(model.grid.slots)
    total = Tree[Array](grid.blocks)
    for block in grid.blocks:
        _, wo = attention_views(model.config, truth.weights.attention[0][block])  # -> [H/G*e, h]
        total.add(block, out_forward(np, truth.saved.heads[block][own], wo, model.config.tile_len))
    return truth.saved.x[own] + total.total


def show_no_reduce(lesson: Lesson, model: Model, output: Array, notes: Notes, used: Array, truth: Judge) -> None:
    """The last section: whose sum an output is."""
    lesson.part("Why nothing is summed over ranks")
    config, grid = model.config, model.grid
    lesson.say(f"An output token is a sum over all {config.blocks} blocks of heads. Tensor parallelism leaves heads "
               "where\nthey are, so every rank has terms of every token's sum, and an all-reduce must add them up.\n"
               "Here all heads come to the token's owner, who then has every term. Terms that each rank computed,\n"
               "and how far its own heads alone would be from the output, relative to the largest value:")
    partial = own_heads_only(model, truth)
    missing = max(relative_gap(mine, tile) for mine, tile in zip(partial, output))
    lesson.say_from_all(f"{min(notes.leaves.values())} of {config.blocks} terms for each of {len(grid.slots)} tiles; "
                        f"own heads alone: {missing:.2f}")
    mine = np.array([slot in grid.slots for slot in range(config.tiles)], dtype=np.int64)
    lesson.check("every tile of tokens has exactly one owner", bool(np.all(sum(all_gather(lesson.comm, mine)) == 1)))
    lesson.check("that owner computed all G terms of its sum",
                 notes.leaves == dict.fromkeys(grid.slots, config.blocks))
    lesson.check("no message carried anything but weights, keys and values",
                 used[:, 2].tolist() == (used[:, 0] + used[:, 1]).tolist())
    if lesson.size > 1:
        lesson.check("own heads alone are not the output: off by more than 0.01", missing > 0.01)
    else:
        lesson.check("a single rank's own heads are all heads: its sum is the output, every bit",
                     same_bits(partial, output))


def measured_attention(lesson: Lesson, model: Model, notes: Notes) -> tuple[Array, Array]:
    """The output, and what its messages were."""
    x, weights = random_tiles(model, 6), layer_weights(model)
    before = counts(lesson.comm)
    output = attention(lesson.comm, model, x, weights, notes)
    return output, counts(lesson.comm) - before


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_ranks(FULL.max_ranks)
    grid = Model(FULL, np, *folded(lesson.rank, lesson.size)).grid
    show_owners(lesson, FULL, grid)
    volumes = []
    for config in (FULL, GROUPED):
        lesson.part(f"{config.num_heads} query heads, {config.num_kv_heads} key/value heads: g = {config.group_size}")
        model, truth, notes = Model(config, np, *folded(lesson.rank, lesson.size)), judge(config), Notes()
        output, used = measured_attention(lesson, model, notes)
        if config is FULL:
            show_steps(lesson, grid, notes, truth)
        show_bytes(lesson, config, grid, used)
        show_output(lesson, grid, output, notes, truth)
        volumes.append([used[0, 1, 1], sum(kv.nbytes for kv in notes.keys_values.values())])
    fewer = GROUPED.group_size
    lesson.check(f"g = {fewer}: keys and values, those sent and those at hand, are 1/{fewer} of those at g = 1",
                 volumes[0] == [fewer * volume for volume in volumes[1]])
    show_no_reduce(lesson, model, output, notes, used, truth)


if __name__ == "__main__":
    run(__doc__, main)
