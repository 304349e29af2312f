"""TSP: tensor and sequence parallelism folded on one axis. Every rank holds 1/N of the weights and 1/N of the tokens.

Weights come to the tokens: attention blocks are broadcast by each owner in turn, MLP and vocabulary blocks go round a
ring, and each rank applies every block to its own tokens. Only keys and values cross between tokens. Gradients of
weights go straight home to the blocks' owners. The forward of attention and MLP follows the paper (arXiv 2604.26294) as
its readers describe its attention algorithm and its ring; the backward, the embedding, the head and the order of every
sum are ours. So is one simplification: the paper moves keys and values while it computes, here they are waited for.

Between layers a rank holds its 1/N of weights, gradients, optimizer state and token activations. Within a part it also
holds, counted as `buffers`:

- weights: two shards of other owners, the one in use and the one in flight;
- keys and values of one owner's heads for the whole sequence, once as they arrived and once in the order of the text,
  and in the backward the pieces of their gradients on their way home;
- gradients: of the blocks of two owners, and the pieces of its own blocks that wait for the piece beside them.

Read beside `reference.single`: the same functions in the same order; what differs is the messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..activations import AttentionSaved, HeadSaved, MlpSaved, Saved
from ..arrays import Array, Tiles
from ..comm.communicator import Communicator, Request
from ..grid import Place, folded
from ..model import Model
from ..ops.attention import (
    attend_backward,
    attend_forward,
    out_backward,
    out_backward_weight,
    out_forward,
    qkv_backward,
    qkv_forward,
)
from ..ops.embedding import embed_backward, embed_forward
from ..ops.loss import logits_backward, logits_forward, merge_triples, token_losses
from ..ops.mlp import swiglu_backward, swiglu_forward
from ..parameters import Parameters, attention_views, mlp_views
from ..phase import phase
from ..tilewise import add_residual, forget, normalise, normalise_backward, squares, totals
from ..tree import Tree
from .collectives import ReduceToOwner, all_gather_keys_values, all_reduce, reduce_scatter_keys_values
from .tags import Tag


def place(comm: Communicator) -> tuple[Place, Place]:
    """Where this rank stands on the axis of weights and on that of tokens: both are folded on the same ranks."""
    return folded(comm.rank, comm.size)


def largest_shard(comm: Communicator, model: Model, shard: Array) -> Array:
    """A buffer for any rank's blocks [m, ...] of the tensor that `shard` is this rank's part of."""
    most = max(len(model.grid.blocks_of(rank)) for rank in range(comm.size))
    return model.empty("buffers", most, *shard.shape[1:])


def ring(comm: Communicator, model: Model, shard: Array, tag: Tag) -> Iterator[tuple[int, Array]]:
    """Pass every rank's blocks round: yields (owner, its blocks [m, ...]), this rank's own first, then its left
    neighbour's and so on. The next messages are posted before the caller works on the blocks it was given."""
    grid = model.grid
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    spare = [largest_shard(comm, model, shard) for _ in range(min(2, comm.size - 1))]
    held = shard
    for step in range(comm.size):
        owner = (comm.rank - step) % comm.size
        if step + 1 == comm.size:
            yield owner, held
            return
        coming = spare[step % 2][: len(grid.blocks_of((owner - 1) % comm.size))]
        requests = [comm.Irecv(coming, left, tag), comm.Isend(held, right, tag)]
        yield owner, held
        # Both: `coming` must be here before it is read, and `held` gone before its place is received into.
        comm.Waitall(requests)
        held = coming


def broadcasts(comm: Communicator, model: Model, shard: Array, tag: Tag) -> Iterator[tuple[int, Array]]:
    """Every owner in turn sends its blocks to all: yields (owner, its blocks [m, ...]), in one order on every rank. The
    next owner's message is posted before the caller works on the blocks it was given."""
    grid = model.grid
    spare = [largest_shard(comm, model, shard) for _ in range(min(2, comm.size - 1))]

    def start(owner: int) -> tuple[Array, list[Request]]:
        if owner == comm.rank:
            return shard, [comm.Isend(shard, peer, tag) for peer in comm.others]
        coming = spare[owner % len(spare)][: len(grid.blocks_of(owner))]
        return coming, [comm.Irecv(coming, owner, tag)]

    coming, requests = start(0)
    for owner in range(comm.size):
        comm.Waitall(requests)
        held = coming
        if owner + 1 < comm.size:
            coming, requests = start(owner + 1)
        yield owner, held


@phase("embedding", "forward")
def embedding_forward(comm: Communicator, model: Model, tokens: Tiles, weights: Parameters) -> Tiles:
    """tokens: slot -> [B, s], of this rank's slots. Returns slot -> [B, s, h]."""
    config, grid, xp = model.config, model.grid, model.xp
    output = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    for owner, tables in ring(comm, model, weights.embedding, Tag.EMBEDDING_WEIGHTS):
        for block, table in zip(grid.blocks_of(owner), tables):
            for slot in grid.slots:
                output[slot].add(block, embed_forward(xp, tokens[slot], table, block * len(table)))
    return {slot: model.memory.track("activations", output[slot].total) for slot in grid.slots}


@phase("embedding", "backward")
def embedding_backward(
    comm: Communicator, model: Model, dx: Tiles, tokens: Tiles, weights: Parameters, gradients: Parameters
) -> None:
    """Writes the embedding's gradient; where the head is tied to it, adds to what the head has written.

    The rows themselves are not needed, so nothing circulates: every rank works for each owner in turn, as in the ring.
    """
    config, grid, xp = model.config, model.grid, model.xp
    home = ReduceToOwner(comm, model, Tag.EMBEDDING_GRADIENTS)
    for step in range(comm.size):
        owner = (comm.rank - step) % comm.size
        partials = []
        for block in grid.blocks_of(owner):
            dtable = Tree[Array](range(config.tiles))
            for slot in grid.slots:
                leaf = model.empty("working", *weights.embedding.shape[1:])
                embed_backward(xp, dx[slot], tokens[slot], block * len(leaf), out=leaf)
                dtable.add(slot, leaf)
            partials.append(dtable)
        home.send(partials, owner)
        home.receive((comm.rank + step) % comm.size)
    for out, total in zip(gradients.embedding, home.finish()):
        out[...] = out + total if config.tied_head else total


@phase("attention", "forward")
def attention_forward(
    comm: Communicator, model: Model, x: Tiles, weights: Parameters, layer: int
) -> tuple[Tiles, AttentionSaved]:
    """x plus the attention of the normalised x: slot -> [B, s, h].

    Kept keys and values: owner of the heads -> [m, tiles, 2, B, K/G, s, e] of m blocks, this rank's tokens only.
    """
    config, grid, xp, track = model.config, model.grid, model.xp, model.memory.track
    normed = normalise(model, x, weights.gains[2 * layer])
    output = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    saved = AttentionSaved(x)
    for owner, shard in broadcasts(comm, model, weights.attention[layer], Tag.ATTENTION_WEIGHTS):
        blocks = grid.blocks_of(owner)
        own = model.empty("activations", len(blocks), len(grid.slots), 2, config.batch_size,
                          config.kv_heads_per_block, config.tile_len, config.head_dim)
        saved.keys_values[owner] = own
        for position, block in enumerate(blocks):
            wqkv, _ = attention_views(config, shard[position])
            for tile, slot in enumerate(grid.slots):
                q, k, v = qkv_forward(xp, normed[slot], wqkv, model.rotary[slot], config.group_size)
                saved.q[block, slot] = track("activations", q)
                own[position, tile, 0] = k
                own[position, tile, 1] = v
                saved.tile_keys_values[block, slot] = own[position, tile]
        keys_values = all_gather_keys_values(comm, model, own, Tag.KEYS_VALUES)  # -> [m, 2, B, K/G, S, e]
        for position, block in enumerate(blocks):
            _, wo = attention_views(config, shard[position])
            for slot in grid.slots:
                k, v = keys_values[position, :, :, :, : grid.visible(slot)]  # -> [B, K/G, n, e], [B, K/G, n, e]
                heads, logsumexp = attend_forward(xp, saved.q[block, slot], k, v, model.mask)
                output[slot].add(block, out_forward(xp, heads, wo, config.tile_len))
                saved.heads[block, slot] = track("activations", heads)
                saved.logsumexp[block, slot] = track("activations", logsumexp)
        del keys_values, k, v  # before the next owner's are gathered
    return add_residual(model, x, totals(output)), saved


@phase("attention", "backward")
def attention_backward(
    comm: Communicator, model: Model, dy: Tiles, saved: AttentionSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's attention gradients and the tiles' gain gradients.

    Weights, keys and values travel again; gradients of keys and values go home to the tokens' owners before the
    weights' gradients can be formed, which then go home to the blocks' owner.
    """
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer]
    normed = normalise(model, saved.x, gain)
    dnormed = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    home = ReduceToOwner(comm, model, Tag.ATTENTION_GRADIENTS)
    for owner, shard in broadcasts(comm, model, weights.attention[layer], Tag.ATTENTION_WEIGHTS):
        blocks = grid.blocks_of(owner)
        keys_values = all_gather_keys_values(comm, model, saved.keys_values[owner], Tag.KEYS_VALUES)
        dq: dict[tuple[int, int], Array] = {}
        dkv = {(block, slot): Tree[Array](grid.readers(slot)) for block in blocks for slot in range(config.tiles)}
        for position, block in enumerate(blocks):
            _, wo = attention_views(config, shard[position])
            for slot in grid.slots:
                k, v = keys_values[position, :, :, :, : grid.visible(slot)]  # -> [B, K/G, n, e], [B, K/G, n, e]
                heads = saved.heads[block, slot]
                dheads = out_backward(xp, dy[slot], heads, wo, config.tile_len)  # -> [B, K/G, g*s, e]
                dq[block, slot], dkeys = attend_backward(
                    xp, dheads, saved.q[block, slot], k, v, model.mask, heads, saved.logsumexp[block, slot])
                for seen in range(config.tiles):
                    if slot in dkv[block, seen].leaves:
                        dkv[block, seen].add(slot, dkeys[:, :, :, grid.tokens(seen)])
        del keys_values, k, v  # before the gradients travel, and the next owner's are gathered
        reduce_scatter_keys_values(comm, model, dkv, Tag.KEYS_VALUES_GRADIENTS)
        partials = []
        for position, block in enumerate(blocks):
            wqkv, _ = attention_views(config, shard[position])
            dweights = Tree[Array](range(config.tiles))
            for slot in grid.slots:
                leaf = model.empty("working", shard[position].size)
                dwqkv, dwo = attention_views(config, leaf)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
                dk, dv = dkv[block, slot].total  # -> [B, K/G, s, e], [B, K/G, s, e]
                dnormed[slot].add(block, qkv_backward(
                    xp, dq[block, slot], dk, dv, normed[slot], wqkv, model.rotary[slot], out=dwqkv))
                out_backward_weight(xp, dy[slot], saved.heads[block, slot], out=dwo)
                dweights.add(slot, leaf)
            partials.append(dweights)
        home.send(partials, owner)
        if owner == comm.rank:
            for peer in comm.others:
                home.receive(peer)
    for out, total in zip(gradients.attention[layer], home.finish()):
        out[...] = total
    dx = normalise_backward(model, totals(dnormed), saved.x, gain, dgain, 2 * layer)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("mlp", "forward")
def mlp_forward(
    comm: Communicator, model: Model, x: Tiles, weights: Parameters, layer: int
) -> tuple[Tiles, MlpSaved]:
    """x plus the gated feed-forward part of the normalised x: slot -> [B, s, h]."""
    config, grid, xp = model.config, model.grid, model.xp
    normed = normalise(model, x, weights.gains[2 * layer + 1])
    output = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    saved = MlpSaved(x)
    for owner, shard in ring(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS):
        for block, packed in zip(grid.blocks_of(owner), shard):
            gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
            for slot in grid.slots:
                y, projected = swiglu_forward(xp, normed[slot], gate_up, down)  # -> [B, s, h], [B*s, 2*f/G]
                output[slot].add(block, y)
                saved.projected[block, slot] = model.memory.track("activations", projected)
    return add_residual(model, x, totals(output)), saved


@phase("mlp", "backward")
def mlp_backward(
    comm: Communicator, model: Model, dy: Tiles, saved: MlpSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's MLP gradients and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer + 1]
    normed = normalise(model, saved.x, gain)
    dnormed = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    home = ReduceToOwner(comm, model, Tag.MLP_GRADIENTS)
    for step, (owner, shard) in enumerate(ring(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS)):
        partials = []
        for block, packed in zip(grid.blocks_of(owner), shard):
            gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
            dweights = Tree[Array](range(config.tiles))
            for slot in grid.slots:
                leaf = model.empty("working", packed.size)
                projected = saved.projected[block, slot]
                dnormed[slot].add(block, swiglu_backward(
                    xp, dy[slot], normed[slot], gate_up, down, projected, out=mlp_views(config, leaf)))
                dweights.add(slot, leaf)
            partials.append(dweights)
        home.send(partials, owner)
        home.receive((comm.rank + step) % comm.size)
    for out, total in zip(gradients.mlp[layer], home.finish()):
        out[...] = total
    dx = normalise_backward(model, totals(dnormed), saved.x, gain, dgain, 2 * layer + 1)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("head", "forward")
def head_forward(
    comm: Communicator, model: Model, x: Tiles, targets: Tiles, weights: Parameters
) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats, on every rank. The logits exist for one block at a time."""
    config, grid, xp = model.config, model.grid, model.xp
    normed = normalise(model, x, weights.gains[-1])
    triples = {slot: Tree[Array](range(config.blocks), partial(merge_triples, xp)) for slot in grid.slots}
    for owner, tables in ring(comm, model, weights.head_table, Tag.HEAD_WEIGHTS):
        for block, table in zip(grid.blocks_of(owner), tables):
            for slot in grid.slots:
                triples[slot].add(block, logits_forward(xp, normed[slot], table, targets[slot], block * len(table)))
    saved = HeadSaved(x)
    sums: Tiles = {}
    for slot in grid.slots:
        losses, logsumexp = token_losses(xp, triples[slot].total)  # -> [B*s], [B*s]
        saved.logsumexp[slot] = model.memory.track("activations", logsumexp)
        sums[slot] = xp.sum(losses, keepdims=True)  # [B*s] -> [1]
    return mean_loss(comm, model, sums), saved


@phase("head", "backward")
def head_backward(
    comm: Communicator, model: Model, saved: HeadSaved, targets: Tiles, weights: Parameters, gradients: Parameters,
    dgain: Tiles
) -> Tiles:
    """Returns dx: slot -> [B, s, h]; writes the head's gradient and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    scale = 1.0 / (config.batch_size * config.seq_len)
    normed = normalise(model, saved.x, weights.gains[-1])
    dnormed = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    home = ReduceToOwner(comm, model, Tag.HEAD_GRADIENTS)
    for step, (owner, tables) in enumerate(ring(comm, model, weights.head_table, Tag.HEAD_WEIGHTS)):
        partials = []
        for block, table in zip(grid.blocks_of(owner), tables):
            dtable = Tree[Array](range(config.tiles))
            for slot in grid.slots:
                leaf = model.empty("working", *table.shape)
                dnormed[slot].add(block, logits_backward(
                    xp, scale, normed[slot], table, targets[slot], block * len(table), saved.logsumexp[slot], out=leaf))
                dtable.add(slot, leaf)
            partials.append(dtable)
        home.send(partials, owner)
        home.receive((comm.rank + step) % comm.size)
    for out, total in zip(gradients.head_table, home.finish()):
        out[...] = total
    return normalise_backward(model, totals(dnormed), saved.x, weights.gains[-1], dgain, -1)


@phase("loss", "forward")
def mean_loss(comm: Communicator, model: Model, sums: Tiles) -> float:
    """The mean over all tokens, on every rank, of slot -> [1], the sum of a tile's losses."""
    total = all_reduce(comm, model.grid.slots_of, sums, Tag.LOSS)
    return float(total[0]) / (model.config.batch_size * model.config.seq_len)


@phase("gains", "backward")
def gains_backward(comm: Communicator, model: Model, dgain: Tiles, gradients: Parameters) -> None:
    """Writes the gradient of all gains, which every rank holds: the sum over tiles of slot -> [2L+1, h]."""
    gradients.gains[...] = all_reduce(comm, model.grid.slots_of, dgain, Tag.GAIN_GRADIENTS)


def model_forward(
    comm: Communicator, model: Model, weights: Parameters, tokens: Tiles, targets: Tiles
) -> tuple[float, Saved]:
    """The loss of a batch, and what the backward needs. tokens and targets: slot -> [B, s], of this rank's slots."""
    saved = Saved(tokens, targets)
    x = embedding_forward(comm, model, tokens, weights)
    for layer in range(model.config.num_layers):
        x, attention = attention_forward(comm, model, x, weights, layer)
        x, mlp = mlp_forward(comm, model, x, weights, layer)
        saved.attention.append(attention)
        saved.mlp.append(mlp)
        forget(model, saved)
    loss, saved.head = head_forward(comm, model, x, targets, weights)
    return loss, saved


@phase("model", "backward")
def model_backward(comm: Communicator, model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss, for this rank's blocks, into `gradients`; uses up what was saved."""
    config = model.config
    dgain = {slot: model.empty("working", *weights.gains.shape) for slot in model.grid.slots}
    dx = head_backward(comm, model, saved.head, saved.targets, weights, gradients, dgain)
    for layer in reversed(range(config.num_layers)):
        if model.recompute == "full":
            x, saved.attention[-1] = attention_forward(comm, model, saved.attention[-1].x, weights, layer)
            saved.mlp[-1] = mlp_forward(comm, model, x, weights, layer)[1]
            del x  # which the MLP's backward is the last to need
        dx = mlp_backward(comm, model, dx, saved.mlp.pop(), weights, layer, gradients, dgain)
        if model.recompute == "attention":
            saved.attention[-1] = attention_forward(comm, model, saved.attention[-1].x, weights, layer)[1]
        dx = attention_backward(comm, model, dx, saved.attention.pop(), weights, layer, gradients, dgain)
    embedding_backward(comm, model, dx, saved.tokens, weights, gradients)
    gains_backward(comm, model, dgain, gradients)


@phase("optimizer", "backward")
def gradient_norm(comm: Communicator, model: Model, gradients: Parameters) -> float:
    """The Euclidean norm of all gradients, the same bits on every rank: squares summed over blocks by the tree."""
    grid, xp = model.grid, model.xp
    partials = {block: squares(model, gradients, position) for position, block in enumerate(grid.blocks)}
    total = all_reduce(comm, grid.blocks_of, partials, Tag.GRADIENT_NORM)
    return float(xp.sqrt(xp.sum(total) + xp.sum(gradients.gains * gradients.gains)))
