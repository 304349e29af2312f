"""The TSP MLP ring: weights go round, and meet every rank's tokens.

Objective: after this lesson you can write the ring yourself, forward and backward, and say from the number of ranks
alone what it sends and what it holds. (The forward is the ring of arXiv 2604.26294; the backward, and the fixed order
of every sum, are this project's.)

    mpirun -n 4 python lessons/05_tsp_mlp_ring.py
    python lessons/05_tsp_mlp_ring.py --ranks 4 --shuffle 7

Look at: the table of who holds which blocks at which step (every rank meets every block once); the bytes, which follow
from a formula; the two buffers, which are all that a ring needs besides a rank's own blocks; and the output, which has
the bits of a single process, although every rank met the blocks in another order.

Try it: with 4 ranks, in `ring`, send `shard` instead of `held` to the right, as if a rank only had to give away what it
owns. No size is wrong and nothing hangs, but the check that rank r holds the blocks of rank r - s after s steps fails,
and with it those of bits, of closeness and of slopes. Try it with 2 ranks, too: all checks hold. Why?
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

from stage import Lesson, in_order_of_text, members, names, random_tiles, recognise, relative_gap, run, same_bits

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tsp_ref.arrays import Array
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import all_gather, from_root
from tsp_ref.comm.request import Request
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.grid.grid import Grid, folded
from tsp_ref.grid.tree import Tree, cover
from tsp_ref.model.config import make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import Parameters, initial_parameters, mlp_views, named_views, zero_parameters
from tsp_ref.ops.mlp import swiglu_backward, swiglu_forward
from tsp_ref.ops.norm import rmsnorm_backward, rmsnorm_forward
from tsp_ref.reference import single

CONFIG = make_config("tiny", num_layers=1, ffn_size=256)
BLOCK_SIZE = 3 * CONFIG.hidden_size * CONFIG.ffn_size // CONFIG.blocks
BLOCK_BYTES = BLOCK_SIZE * np.dtype(CONFIG.dtype).itemsize
TOLERANCE = 1e-5

Kept: TypeAlias = dict[int, Array]
"""block -> [p, B*s, 2f/G]: x gate and x up of this rank's tiles, p of them in the order of their slots."""


class Tag(IntEnum):
    """What the messages of this lesson are about."""

    WEIGHTS = 1
    WEIGHTS_BACKWARD = 2
    GRADIENTS = 3


@dataclass
class Notes:
    """What a rank noted at each step of its round of the ring, when its first product began.

    held    which of the layer's blocks it held, one bit per block, recognised by their bytes
    posted  how many receives it had posted so far
    """

    held: list[int] = field(default_factory=list)
    posted: list[int] = field(default_factory=list)


def layer_weights(model: Model) -> Parameters:
    """The initial weights, the MLP's eight times as large: its term of the output is then as large as the input's."""
    weights = initial_parameters(model)
    weights.mlp[0] *= 8
    return weights


@dataclass
class Judge:
    """One process that owns everything, on every rank: what the ring is compared with."""

    model: Model
    weights: Parameters
    output: Array  # [T, B, s, h]
    gradient: Array  # [G, size of a packed block]
    dx: Array  # [T, B, s, h]


def judge() -> Judge:
    """`reference.single` on the whole layer, forward and backward."""
    model = Model(CONFIG, np)
    weights, gradients = layer_weights(model), zero_parameters(model, "gradients")
    dgain = np.empty((CONFIG.tiles, *weights.gains.shape), dtype=CONFIG.dtype)
    output, saved = single.mlp_forward(model, random_tiles(model, 1), weights, 0)
    dx = single.mlp_backward(model, random_tiles(model, 2), saved, weights, 0, gradients, dgain)
    return Judge(model, weights, output, gradients.mlp[0], dx)


# The ring.


def ring(comm: Communicator, model: Model, shard: Array, tag: Tag) -> Iterator[tuple[int, Array]]:
    """One round: yields (owner, its blocks), this rank's own first, then those of its left neighbour, and so on."""
    grid = model.grid
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    held, spare = shard, two_buffers(comm, model)
    for step in range(comm.size):
        owner = (comm.rank - step) % comm.size
        if step + 1 == comm.size:
            yield owner, held
            return
        # The left neighbour has the next blocks now. Their messages are posted before the caller multiplies these, so
        # that they can travel meanwhile; whether they do is up to the MPI library.
        following = spare[step % 2][: len(grid.blocks_of((owner - 1) % comm.size))]
        requests = [comm.Irecv(following, left, tag), comm.Isend(held, right, tag)]
        yield owner, held
        # Both must be done: `following` is read next, and the buffer that `held` lies in is filled again.
        comm.Waitall(requests)
        held = following


def two_buffers(comm: Communicator, model: Model) -> list[Array]:
    """Room for what is in flight: one buffer fills while the other is read and passed on. Each is as large as the
    largest shard, because ranks may own uneven numbers of blocks. Two ranks need one buffer, one rank none."""
    grid = model.grid
    most = max(len(grid.blocks_of(rank)) for rank in range(comm.size))
    return [model.empty("buffers", most, BLOCK_SIZE) for _ in range(min(2, comm.size - 1))]


def ring_forward(
    comm: Communicator, model: Model, x: Array, weights: Parameters, notes: Notes, truth: Judge
) -> tuple[Array, Kept]:
    """x plus the MLP of the normed x, for this rank's tiles [p, B, s, h]; and, kept for the backward, x gate and x up.

    The operations take a stack of tiles, here all that the rank has; to each they do what they would do to it alone.
    """
    normed = rmsnorm_forward(np, x, weights.gains[1], CONFIG.norm_eps)
    output, projected = Tree[Array](range(CONFIG.blocks)), Kept()
    for owner, held in ring(comm, model, weights.mlp[0], Tag.WEIGHTS):
        notes.held.append(recognise(held, truth.weights.mlp[0]))
        notes.posted.append(comm.ledger.sums("receive", "WEIGHTS")[0])
        for block, packed in zip(model.grid.blocks_of(owner), held):
            gate_up, down = mlp_views(CONFIG, packed)  # -> [h, 2*f/G], [f/G, h]
            projected[block] = np.empty(
                (len(x), CONFIG.batch_size * CONFIG.tile_len, gate_up.shape[1]), dtype=CONFIG.dtype)
            y = swiglu_forward(np, normed, gate_up, down, out=projected[block])  # -> [p, B, s, h]
            # Blocks come in another order on every rank; the tree over the block index makes that immaterial.
            output.add(block, y)
    return x + output.total, projected


@dataclass
class Arrival:
    """A piece of the gradient of one of this rank's blocks, in flight, and its node in that block's tree."""

    request: Request
    tree: Tree[Array]
    node: tuple[int, int]


def ring_backward(
    comm: Communicator, model: Model, dy: Array, x: Array, weights: Parameters, projected: Kept
) -> tuple[Array, list[Array]]:
    """dx [p, B, s, h] for this rank's tiles, and the whole gradient of each of this rank's blocks."""
    grid, gain = model.grid, weights.gains[1]
    normed, dnormed = rmsnorm_forward(np, x, gain, CONFIG.norm_eps), Tree[Array](range(CONFIG.blocks))
    own: list[Tree[Array]] = []
    arrivals: list[Arrival] = []
    sends: list[Request] = []
    for step, (owner, held) in enumerate(ring(comm, model, weights.mlp[0], Tag.WEIGHTS_BACKWARD)):
        partials = block_gradients(model, dy, normed, held, grid.blocks_of(owner), dnormed, projected)
        if step == 0:
            own = partials
            continue
        # The pieces of the step before were posted before these products; now wait for them.
        merge(comm, arrivals, sends)
        # Gradients do not go round: they are sent straight to the owner, as those of this rank's blocks come from the
        # rank that is `step` to the right, which has just multiplied them.
        arrivals = expect(comm, grid, own, (comm.rank + step) % comm.size)
        sends = [comm.Isend(piece, owner, Tag.GRADIENTS) for tree in partials for _, piece in tree.pieces()]
    merge(comm, arrivals, sends)
    dx, _ = rmsnorm_backward(np, dnormed.total, x, gain, CONFIG.norm_eps)
    return dx + dy, [tree.total for tree in own]


def block_gradients(
    model: Model, dy: Array, normed: Array, held: Array, blocks: range, dnormed: Tree[Array], projected: Kept
) -> list[Tree[Array]]:
    """For each block at hand a sum over tiles: its gradient, as far as this rank's tokens make it."""
    partials = []
    for block, packed in zip(blocks, held):
        gate_up, down = mlp_views(CONFIG, packed)  # -> [h, 2*f/G], [f/G, h]
        leaves = np.empty((len(dy), packed.size), dtype=CONFIG.dtype)  # one for each tile
        dnormed.add(block, swiglu_backward(
            np, dy, normed, gate_up, down, projected[block], out=mlp_views(CONFIG, leaves)))
        dweights = Tree[Array](range(CONFIG.tiles))
        dweights.add_stack(model.grid.slots, leaves)
        partials.append(dweights)
    return partials


def expect(comm: Communicator, grid: Grid, own: list[Tree[Array]], peer: int) -> list[Arrival]:
    """Post a receive for each piece that a peer will send. Which they are follows from the slots that it owns."""
    nodes = cover(tuple(range(CONFIG.tiles)), tuple(grid.slots_of(peer)))
    return [
        Arrival(comm.Irecv(np.empty(BLOCK_SIZE, dtype=CONFIG.dtype), peer, Tag.GRADIENTS), tree, node)
        for tree in own
        for node in nodes
    ]


def merge(comm: Communicator, arrivals: list[Arrival], sends: list[Request]) -> None:
    """Put each piece into its tree as it comes in, whichever comes first; then wait for this rank's own sends."""
    while arrivals:
        arrival = arrivals.pop(comm.Waitany([arrival.request for arrival in arrivals]))
        level, index = arrival.node
        arrival.tree.add(index, arrival.request.array, level)
    comm.Waitall(sends)


# The independent calculations that the checks compare with.


def plain_inputs(truth: Judge) -> tuple[Array, Array, Array]:
    """x, the packed weights of all blocks and dy as whole arrays, in float64."""
    x, dy = (in_order_of_text(truth.model.grid, random_tiles(truth.model, purpose)) for purpose in (1, 2))
    return x, truth.weights.mlp[0].astype(np.float64), dy


def plain_mlp(x: Array, packed: Array, gain: Array) -> Array:
    """The whole-array formula in float64, without blocks or tiles: x + (silu(n gate) * (n up)) down."""
    blocks = [named_views(CONFIG, "mlp", block) for block in packed]
    gate = np.concatenate([block["gate"] for block in blocks], axis=1)  # -> [h, f]
    up = np.concatenate([block["up"] for block in blocks], axis=1)  # -> [h, f]
    down = np.concatenate([block["down"] for block in blocks], axis=0)  # -> [f, h]
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * gain
    gate, up = normed @ gate, normed @ up  # -> [B, S, f], [B, S, f]
    return x + (gate / (1 + np.exp(-gate)) * up) @ down  # -> [B, S, h]


def slope(x: Array, packed: Array, gain: Array, dy: Array, dx: Array, dpacked: Array) -> float:
    """The central difference of <dy, plain_mlp> in the direction (dx, dpacked)."""
    reach = 1e-4
    ahead = plain_mlp(x + reach * dx, packed + reach * dpacked, gain)
    behind = plain_mlp(x - reach * dx, packed - reach * dpacked, gain)
    return float(np.sum(dy * (ahead - behind)) / (2 * reach))


def subtrees(part: range) -> int:
    """How many whole subtrees a range of leaves falls into, from the alignment of its ends."""
    count, start = 0, part.start
    while start < part.stop:
        length = 1
        while start % (2 * length) == 0 and start + 2 * length <= part.stop:
            length *= 2
        start, count = start + length, count + 1
    return count


# The lesson.


def show_owners(lesson: Lesson, grid: Grid) -> None:
    """The blocks and the slots of each rank."""
    lesson.part("Who owns what")
    lesson.say(f"One MLP layer, h={CONFIG.hidden_size} and f={CONFIG.ffn_size}, is cut in G={CONFIG.blocks} packed "
               f"blocks {{gate, up, down}} of {BLOCK_BYTES:,} bytes.\nEach sequence of {CONFIG.seq_len} tokens is cut "
               f"in T={CONFIG.tiles} tiles. The number of ranks decides only who owns them:")
    lesson.say_from_all(f"owns blocks {names(grid.blocks)} and the tokens of slots {names(grid.slots)}")
    if lesson.size == 1:
        lesson.say("One rank has no neighbour: its ring is one step, without a message. Run it on more ranks, too.")


def show_round(lesson: Lesson, grid: Grid, notes: Notes) -> None:
    """The blocks that each rank held at each step, as it recognised them."""
    lesson.part("A round of the ring")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("blocks held by", *(f"step {step}" for step in range(lesson.size))):
        table.add_column(heading, no_wrap=True)
    for rank, row in enumerate(all_gather(lesson.comm, np.array(notes.held, dtype=np.int64))):
        table.add_row(f"rank {rank}", *(names(members(mask)) for mask in row.tolist()))
    lesson.say(table)
    lesson.say("Along a row: a rank meets every block once. Along a diagonal: a shard moves one rank on at each step.")
    steps = range(lesson.size)
    expected = [sum(1 << block for block in grid.blocks_of((lesson.rank - step) % lesson.size)) for step in steps]
    lesson.check("after s steps rank r holds the blocks of rank r - s, byte for byte", notes.held == expected)
    lesson.check("at each step the next blocks' receive was posted before the first product",
                 notes.posted == [min(step + 1, lesson.size - 1) for step in steps])


def show_bytes(lesson: Lesson, grid: Grid) -> None:
    """What the forward sent."""
    lesson.part("Bytes")
    lesson.say("At each of N-1 steps rank r passes on what it holds: its own blocks, then those of r-1, r-2, ...\n"
               "The blocks of rank r+1 it never sends: their round ends with it. So it sends all blocks of\n"
               "the layer but its right neighbour's, and receives all but its own: with even shards, (N-1)/N of it.")
    messages, sent = lesson.comm.ledger.sums("send", "WEIGHTS")
    _, received = lesson.comm.ledger.sums("receive", "WEIGHTS")
    lesson.say_from_all(f"sent {messages} messages, {sent:,} bytes; received {received:,} bytes")
    neighbour = len(grid.blocks_of((lesson.rank + 1) % lesson.size))
    lesson.check("messages sent = N - 1", messages == lesson.size - 1)
    lesson.check("bytes sent = (G - blocks of rank r+1) x bytes of a block",
                 sent == (CONFIG.blocks - neighbour) * BLOCK_BYTES)
    lesson.check("bytes received = (G - blocks of rank r) x bytes of a block",
                 received == (CONFIG.blocks - len(grid.blocks)) * BLOCK_BYTES)


def bare_ring_bytes(size: int) -> int:
    """What a round of the ring allocates per rank beside the shards, in bytes, as Python's allocators report it.

    All ranks of a process share these reports, so this is a world of its own, of `size` virtual ranks that do nothing
    else. None can end its round before all have begun theirs, so at the peak all hold at once what they hold while they
    wait for a message.
    """
    models = [Model(CONFIG, np, *folded(rank, size)) for rank in range(size)]
    shards = [layer_weights(model).mlp[0] for model in models]
    world = VirtualWorld(size)

    def one_round(comm: Communicator) -> None:
        for _ in ring(comm, models[comm.rank], shards[comm.rank], Tag.WEIGHTS):
            pass

    tracemalloc.start()
    try:
        world.run(one_round)
        return tracemalloc.get_traced_memory()[1] // size
    finally:
        tracemalloc.stop()


def show_memory(lesson: Lesson, grid: Grid, own: int, in_flight: int) -> None:
    """What the forward held of the layer's weights at its peak, in bytes: by the program's account, and as measured."""
    lesson.part("Memory")
    lesson.say(f"The layer's weights are {CONFIG.blocks * BLOCK_BYTES:,} bytes. Held of them at the peak, own blocks "
               "and those in flight, by the program's own account:")
    lesson.say_from_all(f"{own:,} + {in_flight:,} = {own + in_flight:,} bytes")
    # On rank 0 alone: where all ranks are threads of one process, the others wait meanwhile, and allocate nothing.
    measured = from_root(lesson.comm, bare_ring_bytes(lesson.size) if lesson.rank == 0 else 0)
    lesson.say(f"Measured by tracemalloc, in a ring of N = {lesson.size} virtual ranks that do nothing else: "
               f"{measured:,} bytes per\nrank beside its own blocks, Python's objects for ranks and messages included.")
    largest = max(len(grid.blocks_of(rank)) for rank in range(lesson.size)) * BLOCK_BYTES
    lesson.check("the ring allocates min(2, N - 1) times the largest shard, and beyond that less than one block",
                 0 <= measured - min(2, lesson.size - 1) * largest < BLOCK_BYTES)
    lesson.check("the program's account of what is in flight misses less than one block of that",
                 0 <= measured - in_flight < BLOCK_BYTES)


def show_output(lesson: Lesson, grid: Grid, output: Array, truth: Judge) -> None:
    """Bits and closeness of the forward."""
    lesson.part("The output")
    x, weights, _ = plain_inputs(truth)
    plain = plain_mlp(x, weights, truth.weights.gains[1])
    gap = max(relative_gap(tile, plain[:, grid.tokens(slot)]) for slot, tile in zip(grid.slots, output))
    lesson.say("No message carries an output: after a round every rank's own tokens are complete. Largest distance\n"
               "from the whole-array formula in float64, relative to the largest value:")
    lesson.say_from_all(f"{gap:.1e}")
    lesson.check("every bit of this rank's tokens equals the single process's",
                 same_bits(output, truth.output[list(grid.slots)]))
    lesson.check(f"and the whole-array formula agrees within {TOLERANCE:g}", gap < TOLERANCE)


def show_backward(lesson: Lesson, grid: Grid) -> None:
    """What the backward sent."""
    lesson.part("Backward: weights go round again, gradients go straight to the owner")
    lesson.say("Each rank's tokens have a term of every block's gradient, summed in a tree over the tiles. The few\n"
               "whole subtrees that a rank's slots fill go to the block's owner, who merges them as they come in.")
    pieces, away = subtrees(range(grid.slots[0], grid.slots[-1] + 1)), CONFIG.blocks - len(grid.blocks)
    messages, sent = lesson.comm.ledger.sums("send", "GRADIENTS")
    filled = "1 subtree" if pieces == 1 else f"{pieces} subtrees"
    lesson.say_from_all(f"slots {names(grid.slots)} fill {filled}: sent {messages} pieces, {sent:,} bytes")
    lesson.say("With one subtree per rank, all gradients together cost what a round of weights does; with more, more.")
    lesson.check("gradient bytes sent = subtrees of this rank's slots x blocks of other ranks x bytes of a block",
                 sent == pieces * away * BLOCK_BYTES)
    lesson.check("the weights' second round sends what the first did",
                 lesson.comm.ledger.sums("send", "WEIGHTS_BACKWARD") == lesson.comm.ledger.sums("send", "WEIGHTS"))


def show_gradients(lesson: Lesson, model: Model, dx: Array, gradient: Array, truth: Judge) -> None:
    """Bits of the gradients, and slopes of the plain formula."""
    grid = model.grid
    lesson.part("The gradients")
    x, weights, dy = plain_inputs(truth)
    mine = slice(grid.blocks.start, grid.blocks.stop)
    along_weights, along_x = np.zeros_like(weights), in_order_of_text(grid, random_tiles(model, 4))
    along_weights[mine] = np.random.default_rng([3, lesson.rank]).standard_normal(gradient.shape)
    gain = truth.weights.gains[1]
    measured = slope(x, weights, gain, dy, 0 * x, along_weights), slope(x, weights, gain, dy, along_x, 0 * weights)
    whole_dx = in_order_of_text(grid, dx)
    found = float(np.sum(along_weights[mine] * gradient)), float(np.sum(along_x * whole_dx))
    lesson.say("Slopes in a random direction, of each rank's own weights and of its own tokens: by the gradients,\n"
               "and by a central difference of the whole-array formula.")
    lesson.say_from_all(
        f"weights {found[0]:+.4f} and {measured[0]:+.4f}, tokens {found[1]:+.4f} and {measured[1]:+.4f}")
    lesson.check("every bit of the gradient of this rank's blocks equals the single process's",
                 gradient.tobytes() == truth.gradient[mine].tobytes())
    lesson.check("every bit of dx of this rank's tokens equals the single process's",
                 same_bits(dx, truth.dx[list(grid.slots)]))
    # A direction of standard normals meets a gradient with about its norm: the scale that an error is seen on.
    norms = np.linalg.norm(gradient), np.linalg.norm(whole_dx)
    lesson.check("and the slopes agree within 1e-4 of the gradient's norm",
                 all(abs(f - m) < 1e-4 * norm for f, m, norm in zip(found, measured, norms)))


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_ranks(CONFIG.max_ranks)
    comm, model, truth = lesson.comm, Model(CONFIG, np, *folded(lesson.rank, lesson.size)), judge()
    weights, notes = layer_weights(model), Notes()
    x, dy = random_tiles(model, 1), random_tiles(model, 2)
    show_owners(lesson, model.grid)
    output, projected = ring_forward(comm, model, x, weights, notes, truth)
    in_flight = model.memory.peak["buffers"]
    show_round(lesson, model.grid, notes)
    show_bytes(lesson, model.grid)
    show_memory(lesson, model.grid, weights.mlp[0].nbytes, in_flight)
    show_output(lesson, model.grid, output, truth)
    dx, gradient = ring_backward(comm, model, dy, x, weights, projected)
    show_backward(lesson, model.grid)
    show_gradients(lesson, model, dx, np.stack(gradient), truth)


if __name__ == "__main__":
    run(__doc__, main)
