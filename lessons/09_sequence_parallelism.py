"""Sequence parallelism, and why zigzag: each rank has some tokens, and all weights.

Objective: after this lesson you can say what causal attention costs the ranks of a sequence that is cut in order, and
deal out its tiles so that all have the same to do; write the exchange of keys and values; and say what it sends, what
the sum of the weights' gradients sends, and what happens without that sum.

    mpirun -n 4 python lessons/09_sequence_parallelism.py
    python lessons/09_sequence_parallelism.py --ranks 4 --shuffle 7

(Also called context parallelism; what Megatron-LM calls sequence parallelism, arXiv 2205.05198, cuts only the tokens of
the norms and residuals, beside tensor parallelism. Here keys and values are exchanged at once; they can also go round a
ring, arXiv 2310.01889. Zigzag is the usual remedy. This order of slots, the fixed order of every sum and the formulas
are this project's.)

Look at: the efficiency of both layouts for each N; the messages of an attention, which carry keys and values and
nothing else; how the weights of the ranks part when no gradient is summed; and the digests at the end.

Try it: with 4 ranks, in `descend`, let each rank take its tokens for all tokens: in place of `all_reduce(...)`, write
`[comm.size * own_term(tree) for tree in trees]`. The second row of the table then shows the ranks part as well, and the
check that every rank's copy has the single process's bits fails; so do both checks of what that sum sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction

from stage import (
    Lesson,
    all_reduce_sends,
    dealt,
    drawn_text,
    in_order_of_text,
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
from tsp_ref.grid.grid import ALONE, Grid, Place, share
from tsp_ref.grid.tree import Tree, cover
from tsp_ref.model.config import make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, attention_views, mlp_views, zero_parameters
from tsp_ref.ops.attention import attend_forward, out_forward
from tsp_ref.ops.mlp import swiglu_backward
from tsp_ref.ops.norm import rmsnorm_forward
from tsp_ref.ops.projection import qkv_forward
from tsp_ref.reference import naive, single
from tsp_ref.schedules import sp
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

SEED = 2310
STEPS = 3
CONFIG = make_config("tiny", num_layers=1, hidden_size=128, num_heads=16, num_kv_heads=8, steps=STEPS, warmup_steps=1)
ITEM_BYTES = np.dtype(CONFIG.dtype).itemsize
SLOT_BYTES = 2 * CONFIG.batch_size * CONFIG.tile_len * CONFIG.num_kv_heads * CONFIG.head_dim * ITEM_BYTES
RATE = 1e-4
TOLERANCE = 1e-5
MOST_RANKS = 8
CUTS = ("contiguous", "zigzag")


class Tag(IntEnum):
    """What the messages of this lesson are about."""

    EXCHANGE = 1
    PIECES = 2
    TOTALS = 3


# Causal work.


def pairs(layout: str, size: int) -> list[Fraction]:
    """How many pairs of a query and a key each of `size` ranks has, for one head of one sequence."""
    grids = [Grid(CONFIG.blocks, CONFIG.tiles, CONFIG.tile_len, ALONE, Place(rank, size), layout)
             for rank in range(size)]
    return [sum((Fraction(grid.pairs(slot)) for slot in grid.slots), Fraction(0)) for grid in grids]


def efficiency(work: Sequence[Fraction]) -> Fraction:
    """The mean over the largest: the part of the time for which ranks work, when all wait for the busiest."""
    return sum(work, Fraction(0)) / len(work) / max(work)


# Attention on this rank's tokens.


@dataclass
class Judge:
    """One process that owns everything, on every rank; and the textbook on whole arrays in float64."""

    weights: Parameters
    output: Array  # [T, B, s, h]
    plain: Array  # [B, S, h], x plus attention
    descent: list[Array]  # an MLP's weights after each step, [G, size of a packed block]


def judge() -> Judge:
    """`reference.single` and `reference.naive`: an attention, and some steps of an MLP."""
    model = Model(CONFIG, np)
    weights, x = random_weights(model, np.random.default_rng(SEED)), random_tiles(model, 1)
    output, _ = single.attention_forward(model, x, weights, 0)
    layer = naive.assemble(CONFIG, weights)["layers"][0]
    matrices = {name: matrix.astype(np.float64) for name, matrix in layer.items()}
    _, textbook = naive.layer_forward(CONFIG, matrices, weights.gains[:2].astype(np.float64),
                                      in_order_of_text(model.grid, x))
    return Judge(weights, output, textbook["middle"], descend_alone(model, dealt(model, weights)))


def attention(comm: Communicator, model: Model, x: Array, weights: Parameters) -> tuple[Array, int]:
    """x plus the attention of the normed x [p, B, s, h], for this rank's tiles; and the operations of its products of
    queries with keys and of weights with values, counted as they are made."""
    grid, operations = model.grid, 0
    visible = [grid.visible(slot) for slot in grid.slots]  # how many keys each tile sees
    normed = rmsnorm_forward(model.xp, x, weights.gains[0], CONFIG.norm_eps)
    output = Tree[Array](range(CONFIG.blocks))
    for block, packed in zip(grid.blocks, weights.attention[0]):
        wqkv, wo = attention_views(CONFIG, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
        q, own = project(model, normed, wqkv)
        # One block's heads at a time, so that no rank ever has the whole sequence of more than these.
        whole = exchange(comm, model, own)
        heads, logsumexp = model.xp.empty_like(q), model.xp.empty_like(q[..., :1])
        before = model.work.total
        attend_forward(model.xp, q, whole, visible, model.mask, out=(heads, logsumexp))
        operations += model.work.total - before
        output.add(block, out_forward(model.xp, heads, wo, CONFIG.tile_len))
    return x + output.total, operations


def project(model: Model, normed: Array, wqkv: Array) -> tuple[Array, Array]:
    """A block's heads for this rank's tiles: queries [p, B, K/G, g*s, e]; keys and values [p, 2, B, K/G, s, e]."""
    count, heads = len(normed), (CONFIG.batch_size, CONFIG.kv_heads_per_block)
    q = model.empty("working", count, *heads, CONFIG.group_size * CONFIG.tile_len, CONFIG.head_dim)
    own = model.empty("buffers", count, 2, *heads, CONFIG.tile_len, CONFIG.head_dim)
    qkv_forward(model.xp, normed, wqkv, model.rotary, out=(q, own))
    return q, own


def exchange(comm: Communicator, model: Model, own: Array) -> Array:
    """Every rank's keys and values to every rank, into the order of the text.

    own [p, 2, B, K/G, s, e] -> [2, B, K/G, S, e].
    """
    parts = {peer: model.empty("buffers", len(model.grid.slots_of(peer)), *own.shape[1:]) for peer in comm.others}
    requests = [comm.Irecv(part, peer, Tag.EXCHANGE) for peer, part in parts.items()]
    requests += [comm.Isend(own, peer, Tag.EXCHANGE) for peer in comm.others]
    comm.Waitall(requests)
    parts[comm.rank] = own
    whole = model.empty("buffers", *own.shape[1:4], CONFIG.seq_len, CONFIG.head_dim)
    for peer, part in parts.items():
        for number, slot in enumerate(model.grid.slots_of(peer)):
            whole[:, :, :, model.grid.tokens(slot)] = part[number]
    return whole


# Gradients of weights, from this rank's tokens.


def dy_of(y: Array, model: Model) -> Array:
    """The gradient of half the squared distance from random targets [p, B, s, h]."""
    return y - random_tiles(model, 2)


def descend(comm: Communicator, model: Model, weights: Parameters, summed: bool) -> list[Array]:
    """An MLP takes some steps towards its targets. Returns this rank's copy of its weights after each step.

    summed  over the ranks; if not, each rank steps along its own tokens' term of the gradient
    """
    x, states = random_tiles(model, 1), []
    for _ in range(STEPS):
        y, saved = single.mlp_forward(model, x, weights, 0)  # all weights are here: no message
        trees = own_gradients(model, dy_of(y, model), x, weights, saved.projected)
        gradients = all_reduce(comm, model.grid, trees) if summed else [own_term(tree) for tree in trees]
        for block, gradient in zip(weights.mlp[0], gradients):
            block -= RATE * gradient
        states.append(weights.mlp[0].copy())
    return states


def own_gradients(
    model: Model, dy: Array, x: Array, weights: Parameters, projected: dict[int, Array]
) -> list[Tree[Array]]:
    """For each block its gradient's tree over all slots, with the leaves of this rank's."""
    normed, trees = rmsnorm_forward(np, x, weights.gains[1], CONFIG.norm_eps), []
    for block, packed in enumerate(weights.mlp[0]):
        gate_up, down = mlp_views(CONFIG, packed)  # -> [h, 2*f/G], [f/G, h]
        leaves = np.empty((len(x), packed.size), dtype=CONFIG.dtype)  # one for each tile
        swiglu_backward(np, dy, normed, gate_up, down, projected[block], out=mlp_views(CONFIG, leaves))
        trees.append(Tree[Array](range(CONFIG.tiles)))
        trees[-1].add_stack(model.grid.slots, leaves)
    return trees


def own_term(tree: Tree[Array]) -> Array:
    """The sum of all that a rank has of a sum."""
    total: Array = np.sum([piece for _, piece in tree.pieces()], axis=0)
    return total


@dataclass
class Arrival:
    """A piece in flight to this rank: the tree that it belongs in, and the node that it is there."""

    request: Request
    tree: Tree[Array]
    node: tuple[int, int]


def all_reduce(comm: Communicator, grid: Grid, trees: list[Tree[Array]]) -> list[Array]:
    """Each block's gradient from the tokens of all ranks, on every rank. Each rank sums some of the blocks."""
    shape, leaves = trees[0].pieces()[0][1].shape, tuple(range(CONFIG.tiles))
    by = {block: rank for rank in range(comm.size) for block in share(CONFIG.blocks, rank, comm.size)}
    arrivals = [
        Arrival(comm.Irecv(np.empty(shape, CONFIG.dtype), peer, Tag.PIECES), trees[block], node)
        for block, rank in by.items() if rank == comm.rank
        for peer in comm.others
        for node in cover(leaves, grid.slots_of(peer))
    ]
    sends = [comm.Isend(piece, rank, Tag.PIECES)
             for block, rank in by.items() if rank != comm.rank for _, piece in trees[block].pieces()]
    while arrivals:
        arrival = arrivals.pop(comm.Waitany([arrival.request for arrival in arrivals]))
        level, index = arrival.node
        arrival.tree.add(index, arrival.request.array, level)
    comm.Waitall(sends)
    sums = [trees[block].total if rank == comm.rank else np.empty(shape, CONFIG.dtype) for block, rank in by.items()]
    requests = [comm.Irecv(sums[block], rank, Tag.TOTALS) for block, rank in by.items() if rank != comm.rank]
    requests += [comm.Isend(sums[block], peer, Tag.TOTALS)
                 for block, rank in by.items() if rank == comm.rank for peer in comm.others]
    comm.Waitall(requests)
    return sums


def descend_alone(model: Model, weights: Parameters) -> list[Array]:
    """The same steps by one process, with `reference.single`'s backward."""
    x, states, gradients = random_tiles(model, 1), [], zero_parameters(model, "gradients")
    dgain = model.empty("working", CONFIG.tiles, *weights.gains.shape)
    for _ in range(STEPS):
        y, saved = single.mlp_forward(model, x, weights, 0)
        single.mlp_backward(model, dy_of(y, model), saved, weights, 0, gradients, dgain)
        weights.mlp[0] -= RATE * gradients.mlp[0]
        states.append(weights.mlp[0].copy())
    return states


# The lesson.


def grids(lesson: Lesson) -> dict[str, Grid]:
    """layout -> what this rank holds in it."""
    return {layout: Model(CONFIG, np, *sp.place(lesson.comm), layout=layout).grid for layout in CUTS}


def show_owners(lesson: Lesson) -> None:
    """The tiles of each rank."""
    lesson.part("Who holds what")
    lesson.say(f"{CONFIG.batch_size} sequences of S={CONFIG.seq_len} tokens, in T={CONFIG.tiles} tiles of "
               f"s={CONFIG.tile_len}. All G={CONFIG.blocks} blocks of all weights are on every rank. The layout\n"
               "says which tiles a rank has: neighbours in the text, or neighbouring slots, which hold tiles zigzag.")
    dealt_out = {layout: [grid.tile(slot) for slot in grid.slots] for layout, grid in grids(lesson).items()}
    lesson.say_from_all("; ".join(f"{layout}: tiles {names(sorted(tiles))}" for layout, tiles in dealt_out.items()))
    held = [[tile in tiles for tile in range(CONFIG.tiles)] for tiles in dealt_out.values()]
    times = np.sum(all_gather(lesson.comm, np.array(held, dtype=np.int64)), axis=0)
    lesson.check("each tile is on one rank, in either layout; every block is on every rank",
                 bool(np.all(times == 1)) and all(len(grid.blocks) == CONFIG.blocks for grid in grids(lesson).values()))


def show_work(lesson: Lesson) -> None:
    """Pairs of queries and keys by rank, and what that makes of each N."""
    lesson.part("Causal work: why zigzag")
    size = lesson.size if lesson.size > 1 else 4
    lesson.say(f"Pairs of a query and a key that it sees, for one head of one sequence, on {size} ranks"
               + (":" if lesson.size > 1 else " (one has them all):"))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("rank", *(text for layout in CUTS for text in (layout, "of the mean"))):
        table.add_column(heading, justify="right")
    mean = Fraction(CONFIG.seq_len**2, 2 * size)
    for rank, counts in enumerate(zip(*(pairs(layout, size) for layout in CUTS))):
        cells = [(f"{float(count):,g}", f"{float(count / mean):.2f}") for count in counts]
        table.add_row(str(rank), *(text for cell in cells for text in cell))
    lesson.say(table)
    grid = Model(CONFIG, np).grid
    seen = np.tri(CONFIG.seq_len, dtype=np.int64).reshape(CONFIG.tiles, -1).sum(axis=1)  # ones in a tile's rows: [T]
    lesson.check("a tile's pairs are the ones in its rows of a causal mask, less half its diagonal",
                 all(grid.pairs(slot) == seen[grid.tile(slot)] - CONFIG.tile_len / 2 for slot in grid.slots))
    show_efficiency(lesson)


def show_efficiency(lesson: Lesson) -> None:
    """Both layouts on each number of ranks."""
    sizes = range(1, MOST_RANKS + 1)
    found = {layout: {size: efficiency(pairs(layout, size)) for size in sizes} for layout in CUTS}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("mean / largest, in %", *(f"N={size}" for size in sizes)):
        table.add_column(heading, justify="left" if heading.startswith("mean") else "right")
    for layout, parts in found.items():
        table.add_row(layout, *(f"{float(100 * part):.1f}" for part in parts.values()))
    lesson.say(table)
    lesson.say("All wait for the rank with the most. Cut in order, the last of N ranks has 2 - 1/N times the mean, so\n"
               "more ranks come to idle for nearly half of the time. Zigzag, slots 0 and 1, 2 and 3, ... pair a tile\n"
               "that sees little with one that sees much, and all pairs are the same work: what is left is that some\n"
               "ranks have a slot more than others, or half of a pair.")
    contiguous, zigzag = found["contiguous"], found["zigzag"]
    lesson.check("contiguous: exactly N / (2N - 1), wherever N divides T",
                 all(contiguous[size] == Fraction(size, 2 * size - 1) for size in sizes if CONFIG.tiles % size == 0))
    lesson.check("zigzag: exactly 1, wherever N divides T/2",
                 all(zigzag[size] == 1 for size in sizes if CONFIG.tiles // 2 % size == 0))
    lesson.check("zigzag: better than contiguous, for every N from 2 on",
                 all(zigzag[size] > contiguous[size] for size in sizes[1:]))


def show_attention(lesson: Lesson, truth: Judge) -> None:
    """An attention in both layouts."""
    lesson.part("Attention: keys and values cross")
    lesson.say("A query needs the keys and values of all tokens before it. Every rank makes those of its own tokens,\n"
               "block of heads by block of heads, and sends them to all. Bytes sent, and operations of queries times\n"
               "keys and of weights times values, counted as they were made:")
    comm, outputs, done = lesson.comm, [], []
    models = [Model(CONFIG, np, *sp.place(comm), layout=layout, counted=True) for layout in CUTS]
    for model in models:
        before = comm.ledger.sums("send", "EXCHANGE")
        output, operations = attention(comm, model, random_tiles(model, 1), truth.weights)
        outputs.append(output)
        done.append([*np.subtract(comm.ledger.sums("send", "EXCHANGE"), before).tolist(), operations])
    lesson.say_from_all("; ".join(f"{layout}: sent {sent:,}, {work / 1e6:.2f} million operations"
                                  for layout, (_, sent, work) in zip(CUTS, done)))
    show_evenness(lesson, [work for *_, work in done])
    for model, output, counts in zip(models, outputs, done):
        check_attention(lesson, model, output, counts, truth)


def show_evenness(lesson: Lesson, mine: list[int]) -> None:
    """How evenly the operations of attending fell on the ranks. mine: this rank's, by layout."""
    rows = np.stack(all_gather(lesson.comm, np.array(mine, dtype=np.int64)))  # [N, layouts]
    contiguous, zigzag = (efficiency([Fraction(count) for count in column]) for column in rows.T.tolist())
    lesson.say(f"Mean / largest: {float(100 * contiguous):.1f} % contiguous, {float(100 * zigzag):.1f} % zigzag. (Not "
               "quite as by pairs: a tile against\nitself is computed whole, and half of it masked.)")
    if CONFIG.tiles // 2 % lesson.size == 0:
        lesson.check("zigzag, as counted: exactly the same work for all ranks", zigzag == 1)
    if lesson.size > 1:
        lesson.check("contiguous, as counted: less even than zigzag", contiguous < zigzag)


def check_attention(lesson: Lesson, model: Model, output: Array, done: list[int], truth: Judge) -> None:
    """What holds of it in either layout."""
    grid, size, (messages, sent, operations) = model.grid, lesson.size, done
    slots = len(grid.slots)
    lesson.check(f"{grid.layout}: sent = (N-1) times keys and values of its slots, in G(N-1) messages",
                 (messages, sent) == (CONFIG.blocks * (size - 1), (size - 1) * slots * SLOT_BYTES))
    if CONFIG.tiles % size == 0:
        numbers = CONFIG.batch_size * CONFIG.seq_len * CONFIG.hidden_size // CONFIG.group_size
        lesson.check(f"{grid.layout}: that is 2(N-1)/N times B*S*h/g numbers",
                     sent * size == 2 * (size - 1) * numbers * ITEM_BYTES)
    else:
        lesson.say(f"  {grid.layout}: {size} ranks hold unequal numbers of tiles: no formula in N alone")
    keys = sum(grid.visible(slot) for slot in grid.slots)
    lesson.check(f"{grid.layout}: a tile costs 4*B*h*s*n operations, n being the keys that it sees",
                 operations == 4 * CONFIG.batch_size * CONFIG.hidden_size * CONFIG.tile_len * keys)
    lesson.check(f"{grid.layout}: every bit of this rank's tokens equals the single process's",
                 same_bits(output, truth.output[list(grid.slots)]))
    gap = max(relative_gap(tile, truth.plain[:, grid.tokens(slot)]) for slot, tile in zip(grid.slots, output))
    lesson.check(f"{grid.layout}: and plain causal attention agrees within {TOLERANCE:g}", gap < TOLERANCE)


def show_gradients(lesson: Lesson, truth: Judge) -> None:
    """What ranks do to their copies of the weights with and without a sum over the ranks."""
    lesson.part("Gradients of weights: a sum over the tokens of all ranks")
    comm, model = lesson.comm, Model(CONFIG, np, *sp.place(lesson.comm))
    apart = descend(comm, model, dealt(model, truth.weights), summed=False)
    together = descend(comm, model, dealt(model, truth.weights), summed=True)
    start = truth.weights.mlp[0]
    missing = relative_gap(start - apart[0], start - truth.descent[0])
    lesson.say(f"An MLP takes {STEPS} steps of gradient descent towards random targets. Forward it sends nothing, "
               "as\nall weights are here. But a rank knows only its own tokens' term of a weight's gradient. How far "
               "its\nfirst step along that term is off from the whole step, relative to the largest entry:")
    lesson.say_from_all(f"{missing:.2f}")
    lesson.say("Largest distance between two ranks' copies of the weights, relative to the largest weight:")
    gaps = [distances(lesson, states) for states in (apart, together)]
    lesson.say(drift_table(gaps))
    if lesson.size > 1:
        lesson.check("without a sum over ranks the copies differ after the first step, and more after each",
                     gaps[0][0] > 0 and all(now > before for before, now in zip(gaps[0], gaps[0][1:])))
    else:
        lesson.check("a single rank's term is the whole: it needs no sum", missing == 0)
    lesson.check("with it, every rank's copy has the single process's bits after each step",
                 all(own.tobytes() == wanted.tobytes() for own, wanted in zip(together, truth.descent, strict=True)))
    show_reduction(lesson, model.grid, start.nbytes)


def distances(lesson: Lesson, states: list[Array]) -> list[float]:
    """After each step, the largest distance of a rank's copy from rank 0's or another's."""
    copies = np.stack(all_gather(lesson.comm, np.stack(states)))  # [N, STEPS, G, size of a packed block]
    spread = np.max(copies, axis=0) - np.min(copies, axis=0)
    return [float(np.max(gap) / np.max(np.abs(copy))) for gap, copy in zip(spread, copies[0])]


def drift_table(gaps: list[list[float]]) -> Table:
    """A row each for the steps without a sum and with it."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("gradients", *(f"step {step}" for step in range(1, STEPS + 1))):
        table.add_column(heading)
    for name, row in zip(("each rank its own", "summed over the ranks"), gaps):
        table.add_row(name, *(f"{gap:.3g}" for gap in row))
    return table


def show_reduction(lesson: Lesson, grid: Grid, weight_bytes: int) -> None:
    """What the sum over ranks sent."""
    sent = sum(lesson.comm.ledger.sums("send", tag.name)[1] for tag in (Tag.PIECES, Tag.TOTALS)) // STEPS
    pieces, block = subtrees(grid.slots), weight_bytes // CONFIG.blocks
    lesson.say(f"That sum is an all-reduce: each rank sums some of the {CONFIG.blocks} blocks, for which the others "
               "send their pieces,\nand sends the totals to all. Bytes sent in a step, of "
               f"{weight_bytes:,} bytes of weights:")
    lesson.say_from_all(f"slots {names(grid.slots)} fill {pieces} subtree{'s' * (pieces > 1)}: sent {sent:,} bytes")
    lesson.check("sent, where a rank sums b blocks: G-b blocks, once for each of its subtrees, and b blocks to N-1 "
                 "ranks", sent == all_reduce_sends(CONFIG.blocks, pieces, lesson.rank, lesson.size) * block)
    if CONFIG.blocks % lesson.size == 0:
        lesson.check("that is 2(N-1)/N times the weights, whatever B and S are",
                     sent * lesson.size == 2 * (lesson.size - 1) * weight_bytes)
    else:
        lesson.say(f"  {lesson.size} ranks sum unequal numbers of blocks, and their slots may fill several subtrees: "
                   "no formula in N alone")


# Training in both layouts.


def train(comm: Communicator, plan: Plan) -> str:
    """A few steps of the tiny model with one layer: the digest of all bits, on rank 0."""
    training = Training(CONFIG, comm, plan, drawn_text(), np)
    for _ in range(STEPS):
        training.step()
    return digest(training)


def traffic(comm: Communicator) -> Array:
    """Bytes sent so far by `tsp_ref.schedules.sp`: keys and values forward, and gradients of layers' weights."""
    gradients = (comm.ledger.sums("send", tag)[1] for tag in ("ATTENTION_GRADIENTS", "MLP_GRADIENTS"))
    return np.array([comm.ledger.sums("send", "KEYS_VALUES", direction="forward")[1], sum(gradients)], dtype=np.int64)


def show_training(lesson: Lesson, truth: Judge) -> None:
    """The project's schedule, in both layouts."""
    lesson.part(f"Training, {STEPS} steps of `tsp_ref.schedules.sp`")
    comm, alone = lesson.comm, lesson.rank == 0
    digests = {"single process": VirtualWorld(1).run(lambda one: train(one, Plan("single")))[0] if alone else ""}
    rows = {"single process": ["", ""]}
    for layout, grid in grids(lesson).items():
        before = traffic(comm)
        digests[layout] = train(comm, Plan("sp", layout=layout))
        sent = (traffic(comm) - before) // STEPS
        check_traffic(lesson, grid, sent.tolist(), truth.weights.attention[0].nbytes + truth.weights.mlp[0].nbytes)
        rows[layout] = [f"{count:,}" for count in np.max(all_gather(comm, sent), axis=0).tolist()]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("layout", "digest", "keys and values, forward", "gradients of the layer's weights"):
        table.add_column(heading, no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, digests[name][:12], *row)
    lesson.say("The digest is of the bits of all losses, gradients, weights and moments. Bytes are those of a step, on "
               "the\nrank that sent most:")
    lesson.say(table)
    lesson.say("The layout decides who computes what, and no bit. (If gradients cost more in the contiguous layout,\n"
               "that is no property of sequence parallelism: this project's sums run over slots, in the order of\n"
               "zigzag, and consecutive tiles fill more subtrees of them.)")
    lesson.check("both layouts have the single process's digest", not alone or len(set(digests.values())) == 1)


def check_traffic(lesson: Lesson, grid: Grid, sent: list[int], layer_bytes: int) -> None:
    """That training sends what was counted above."""
    arrays = all_reduce_sends(CONFIG.blocks, subtrees(grid.slots), lesson.rank, lesson.size)
    wanted = [(lesson.size - 1) * len(grid.slots) * SLOT_BYTES, arrays * layer_bytes // CONFIG.blocks]
    lesson.check(f"{grid.layout}: keys and values, and the layer's gradients, are sent as counted above",
                 sent == wanted)


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_comparable_bits()
    lesson.require_ranks(MOST_RANKS)
    truth = judge()
    show_owners(lesson)
    show_work(lesson)
    show_attention(lesson, truth)
    show_gradients(lesson, truth)
    show_training(lesson, truth)


if __name__ == "__main__":
    run(__doc__, main)
