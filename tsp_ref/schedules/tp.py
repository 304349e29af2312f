"""TP: tensor parallelism. Every rank holds 1/N of the weights and all of the tokens.

Tokens are replicated, weights stay where they are: each rank applies its own blocks to every token, attention by heads
and MLP by columns first and rows after, so that nothing travels until the end of a part. There the ranks' partial
outputs are summed by an all-reduce, and so are, in the backward, the gradients of the part's input: two all-reduces a
layer forward, two backward. Embedding and head are cut by vocabulary rows. All tokens being here, gradients of weights
and gains need no message. (Source: Megatron-LM, arXiv 1909.08053; the order of every sum is ours, and so is the
all-reduce as an exchange to the rank that sums and a gather.)

Between layers a rank holds its 1/N of weights, gradients, optimizer state and of what is computed by blocks (queries,
keys, values, heads, gate and up), but the layers' inputs whole: they are not divided by N.

Read beside `reference.single`: the same functions in the same order; what differs is the messages.
"""

from __future__ import annotations

from functools import partial

from ..accounting.phase import phase
from ..arrays import Array, Tiles
from ..comm.communicator import Communicator
from ..grid.grid import ALONE, Place
from ..grid.tree import Tree
from ..model.activations import AttentionSaved, HeadSaved, MlpSaved, Saved
from ..model.model import Model
from ..model.parameters import Parameters, attention_views, mlp_views
from ..model.tilewise import add_residual, forget, normalise, normalise_backward, squares
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
from .collectives import AllReduceTiles, all_reduce
from .tags import Tag


def place(comm: Communicator) -> tuple[Place, Place]:
    """Where this rank stands on the axis of weights and on that of tokens: there is no axis of tokens."""
    return Place(comm.rank, comm.size), ALONE


@phase("embedding", "forward")
def embedding_forward(comm: Communicator, model: Model, tokens: Tiles, weights: Parameters) -> Tiles:
    """tokens: slot -> [B, s]. Returns slot -> [B, s, h]."""
    grid, xp = model.grid, model.xp
    sums = AllReduceTiles(comm, model, Tag.EMBEDDING_SUMS)
    for slot in sums.order:
        for block, table in zip(grid.blocks, weights.embedding):
            comm.progress(block, slot)
            sums.add(slot, block, embed_forward(xp, tokens[slot], table, block * len(table)))
    return {slot: model.memory.track("activations", total) for slot, total in sums.finish().items()}


@phase("embedding", "backward")
def embedding_backward(
    comm: Communicator, model: Model, dx: Tiles, tokens: Tiles, weights: Parameters, gradients: Parameters
) -> None:
    """Writes the embedding's gradient; where the head is tied to it, adds to what the head has written."""
    config, grid, xp = model.config, model.grid, model.xp
    for block, out in zip(grid.blocks, gradients.embedding):
        dtable = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            comm.progress(block, slot)
            leaf = model.empty("working", *weights.embedding.shape[1:])
            embed_backward(xp, dx[slot], tokens[slot], block * len(leaf), out=leaf)
            dtable.add(slot, leaf)
        out[...] = out + dtable.total if config.tied_head else dtable.total


@phase("attention", "forward")
def attention_forward(
    comm: Communicator, model: Model, x: Tiles, weights: Parameters, layer: int
) -> tuple[Tiles, AttentionSaved]:
    """x plus the attention of the normalised x: slot -> [B, s, h].

    Kept keys and values: block -> [2, B, K/G, S, e], of the whole sequence.
    """
    config, grid, xp, track = model.config, model.grid, model.xp, model.memory.track
    normed = normalise(model, x, weights.gains[2 * layer])
    sums = AllReduceTiles(comm, model, Tag.ATTENTION_SUMS)
    saved = AttentionSaved(x)
    for block, packed in zip(grid.blocks, weights.attention[layer]):
        wqkv, _ = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
        keys_values = model.empty(
            "activations", 2, config.batch_size, config.kv_heads_per_block, config.seq_len, config.head_dim)
        saved.keys_values[block] = keys_values
        for slot in grid.slots:
            comm.progress(block, slot)
            q, k, v = qkv_forward(xp, normed[slot], wqkv, model.rotary[slot], config.group_size)
            saved.q[block, slot] = track("activations", q)
            keys_values[0, :, :, grid.tokens(slot)] = k
            keys_values[1, :, :, grid.tokens(slot)] = v
            saved.tile_keys_values[block, slot] = keys_values[:, :, :, grid.tokens(slot)]
    for slot in sums.order:
        for block, packed in zip(grid.blocks, weights.attention[layer]):
            comm.progress(block, slot)
            _, wo = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
            k, v = saved.keys_values[block][:, :, :, : grid.visible(slot)]  # -> [B, K/G, n, e], [B, K/G, n, e]
            heads, logsumexp = attend_forward(xp, saved.q[block, slot], k, v, model.mask)
            sums.add(slot, block, out_forward(xp, heads, wo, config.tile_len))
            saved.heads[block, slot] = track("activations", heads)
            saved.logsumexp[block, slot] = track("activations", logsumexp)
    return add_residual(model, x, sums.finish()), saved


@phase("attention", "backward")
def attention_backward(
    comm: Communicator, model: Model, dy: Tiles, saved: AttentionSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's attention gradients and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer]
    normed = normalise(model, saved.x, gain)
    sums = AllReduceTiles(comm, model, Tag.ATTENTION_SUMS)
    for block, packed, out in zip(grid.blocks, weights.attention[layer], gradients.attention[layer]):
        wqkv, wo = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
        dq: Tiles = {}
        dkv = {slot: Tree[Array](grid.readers(slot)) for slot in grid.slots}
        for slot in grid.slots:
            comm.progress(block, slot)
            k, v = saved.keys_values[block][:, :, :, : grid.visible(slot)]  # -> [B, K/G, n, e], [B, K/G, n, e]
            heads = saved.heads[block, slot]
            dheads = out_backward(xp, dy[slot], heads, wo, config.tile_len)  # -> [B, K/G, g*s, e]
            dq[slot], dkeys = attend_backward(
                xp, dheads, saved.q[block, slot], k, v, model.mask, heads, saved.logsumexp[block, slot])
            for seen, tree in dkv.items():
                if slot in tree.leaves:
                    tree.add(slot, dkeys[:, :, :, grid.tokens(seen)])
        dweights = Tree[Array](range(config.tiles))
        for slot in sums.order:
            comm.progress(block, slot)
            leaf = model.empty("working", packed.size)
            dwqkv, dwo = attention_views(config, leaf)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
            dk, dv = dkv[slot].total  # -> [B, K/G, s, e], [B, K/G, s, e]
            sums.add(slot, block, qkv_backward(
                xp, dq[slot], dk, dv, normed[slot], wqkv, model.rotary[slot], out=dwqkv))
            out_backward_weight(xp, dy[slot], saved.heads[block, slot], out=dwo)
            dweights.add(slot, leaf)
        out[...] = dweights.total
    dx = normalise_backward(model, sums.finish(), saved.x, gain, dgain, 2 * layer)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("mlp", "forward")
def mlp_forward(
    comm: Communicator, model: Model, x: Tiles, weights: Parameters, layer: int
) -> tuple[Tiles, MlpSaved]:
    """x plus the gated feed-forward part of the normalised x: slot -> [B, s, h]."""
    config, grid, xp = model.config, model.grid, model.xp
    normed = normalise(model, x, weights.gains[2 * layer + 1])
    sums = AllReduceTiles(comm, model, Tag.MLP_SUMS)
    saved = MlpSaved(x)
    for slot in sums.order:
        for block, packed in zip(grid.blocks, weights.mlp[layer]):
            comm.progress(block, slot)
            gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
            y, projected = swiglu_forward(xp, normed[slot], gate_up, down)  # -> [B, s, h], [B*s, 2*f/G]
            sums.add(slot, block, y)
            saved.projected[block, slot] = model.memory.track("activations", projected)
    return add_residual(model, x, sums.finish()), saved


@phase("mlp", "backward")
def mlp_backward(
    comm: Communicator, model: Model, dy: Tiles, saved: MlpSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's MLP gradients and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer + 1]
    normed = normalise(model, saved.x, gain)
    sums = AllReduceTiles(comm, model, Tag.MLP_SUMS)
    for block, packed, out in zip(grid.blocks, weights.mlp[layer], gradients.mlp[layer]):
        gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
        dweights = Tree[Array](range(config.tiles))
        for slot in sums.order:
            comm.progress(block, slot)
            leaf = model.empty("working", packed.size)
            projected = saved.projected[block, slot]
            sums.add(slot, block, swiglu_backward(
                xp, dy[slot], normed[slot], gate_up, down, projected, out=mlp_views(config, leaf)))
            dweights.add(slot, leaf)
        out[...] = dweights.total
    dx = normalise_backward(model, sums.finish(), saved.x, gain, dgain, 2 * layer + 1)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("head", "forward")
def head_forward(
    comm: Communicator, model: Model, x: Tiles, targets: Tiles, weights: Parameters
) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats. The logits exist for one block of the vocabulary at a time."""
    grid, xp = model.grid, model.xp
    normed = normalise(model, x, weights.gains[-1])
    exchange = AllReduceTiles(comm, model, Tag.HEAD_SUMS, partial(merge_triples, xp))
    for slot in exchange.order:
        for block, table in zip(grid.blocks, weights.head_table):
            comm.progress(block, slot)
            exchange.add(slot, block, logits_forward(xp, normed[slot], table, targets[slot], block * len(table)))
    saved = HeadSaved(x)
    merged = exchange.finish()
    sums: Tiles = {}
    for slot in grid.slots:
        losses, logsumexp = token_losses(xp, merged[slot])  # -> [B*s], [B*s]
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
    sums = AllReduceTiles(comm, model, Tag.HEAD_SUMS)
    for block, table, out in zip(grid.blocks, weights.head_table, gradients.head_table):
        dtable = Tree[Array](range(config.tiles))
        for slot in sums.order:
            comm.progress(block, slot)
            leaf = model.empty("working", *table.shape)
            sums.add(slot, block, logits_backward(
                xp, scale, normed[slot], table, targets[slot], block * len(table), saved.logsumexp[slot], out=leaf))
            dtable.add(slot, leaf)
        out[...] = dtable.total
    return normalise_backward(model, sums.finish(), saved.x, weights.gains[-1], dgain, -1)


@phase("loss", "forward")
def mean_loss(comm: Communicator, model: Model, sums: Tiles) -> float:
    """The mean over all tokens of slot -> [1], the sum of a tile's losses."""
    tree = Tree[Array](range(model.config.tiles))
    for slot in model.grid.slots:
        tree.add(slot, sums[slot])
    return model.number(tree.total) / (model.config.batch_size * model.config.seq_len)


@phase("gains", "backward")
def gains_backward(comm: Communicator, model: Model, dgain: Tiles, gradients: Parameters) -> None:
    """Writes the gradient of all gains: the sum over tiles of slot -> [2L+1, h]."""
    tree = Tree[Array](range(model.config.tiles))
    for slot in model.grid.slots:
        tree.add(slot, dgain[slot])
    gradients.gains[...] = tree.total


def model_forward(
    comm: Communicator, model: Model, weights: Parameters, tokens: Tiles, targets: Tiles
) -> tuple[float, Saved]:
    """The loss of a batch, and what the backward needs. tokens and targets: slot -> [B, s] of whole numbers."""
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
    """Writes the gradient of the loss into `gradients`; uses up what was saved, layer by layer."""
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
    return model.number(xp.sqrt(xp.sum(total) + xp.sum(gradients.gains * gradients.gains)))
