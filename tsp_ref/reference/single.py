"""The model in one process, on the grid: the stated computation whose bits every schedule reproduces on N ranks.

Every schedule has these functions, in this order; what it adds is messages. Nothing is imported from them here.
"""

from __future__ import annotations

from functools import partial

from ..accounting.phase import phase
from ..arrays import Array, Tiles
from ..grid.tree import Tree
from ..model.activations import AttentionSaved, HeadSaved, MlpSaved, Saved
from ..model.model import Model
from ..model.parameters import Parameters, attention_views, mlp_views
from ..model.tilewise import add_residual, forget, normalise, normalise_backward, squares, totals
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


@phase("embedding", "forward")
def embedding_forward(model: Model, tokens: Tiles, weights: Parameters) -> Tiles:
    """tokens: slot -> [B, s]. Returns slot -> [B, s, h]."""
    config, grid, xp = model.config, model.grid, model.xp
    output = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    for block, table in zip(grid.blocks, weights.embedding):
        for slot in grid.slots:
            output[slot].add(block, embed_forward(xp, tokens[slot], table, block * len(table)))
    return {slot: model.memory.track("activations", output[slot].total) for slot in grid.slots}


@phase("embedding", "backward")
def embedding_backward(model: Model, dx: Tiles, tokens: Tiles, weights: Parameters, gradients: Parameters) -> None:
    """Writes the embedding's gradient; where the head is tied to it, adds to what the head has written."""
    config, grid, xp = model.config, model.grid, model.xp
    for block, out in zip(grid.blocks, gradients.embedding):
        dtable = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            leaf = model.empty("working", *weights.embedding.shape[1:])
            embed_backward(xp, dx[slot], tokens[slot], block * len(leaf), out=leaf)
            dtable.add(slot, leaf)
        out[...] = out + dtable.total if config.tied_head else dtable.total


@phase("attention", "forward")
def attention_forward(model: Model, x: Tiles, weights: Parameters, layer: int) -> tuple[Tiles, AttentionSaved]:
    """x plus the attention of the normalised x: slot -> [B, s, h].

    Kept keys and values: block -> [2, B, K/G, S, e], of the whole sequence.
    """
    config, grid, xp, track = model.config, model.grid, model.xp, model.memory.track
    normed = normalise(model, x, weights.gains[2 * layer])
    output = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    saved = AttentionSaved(x)
    for block, packed in zip(grid.blocks, weights.attention[layer]):
        wqkv, wo = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
        keys_values = model.empty(
            "activations", 2, config.batch_size, config.kv_heads_per_block, config.seq_len, config.head_dim)
        saved.keys_values[block] = keys_values
        for slot in grid.slots:
            q, k, v = qkv_forward(xp, normed[slot], wqkv, model.rotary[slot], config.group_size)
            saved.q[block, slot] = track("activations", q)
            keys_values[0, :, :, grid.tokens(slot)] = k
            keys_values[1, :, :, grid.tokens(slot)] = v
            saved.tile_keys_values[block, slot] = keys_values[:, :, :, grid.tokens(slot)]
        for slot in grid.slots:
            k, v = keys_values[:, :, :, : grid.visible(slot)]  # [2, B, K/G, S, e] -> [B, K/G, n, e], [B, K/G, n, e]
            heads, logsumexp = attend_forward(xp, saved.q[block, slot], k, v, model.mask)
            output[slot].add(block, out_forward(xp, heads, wo, config.tile_len))
            saved.heads[block, slot] = track("activations", heads)
            saved.logsumexp[block, slot] = track("activations", logsumexp)
    return add_residual(model, x, totals(output)), saved


@phase("attention", "backward")
def attention_backward(
    model: Model, dy: Tiles, saved: AttentionSaved, weights: Parameters, layer: int, gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's attention gradients and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer]
    normed = normalise(model, saved.x, gain)
    dnormed = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    for block, packed, out in zip(grid.blocks, weights.attention[layer], gradients.attention[layer]):
        wqkv, wo = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
        dq: Tiles = {}
        dkv = {slot: Tree[Array](grid.readers(slot)) for slot in grid.slots}
        for slot in grid.slots:
            k, v = saved.keys_values[block][:, :, :, : grid.visible(slot)]  # -> [B, K/G, n, e], [B, K/G, n, e]
            heads = saved.heads[block, slot]
            dheads = out_backward(xp, dy[slot], heads, wo, config.tile_len)  # -> [B, K/G, g*s, e]
            dq[slot], dkeys = attend_backward(
                xp, dheads, saved.q[block, slot], k, v, model.mask, heads, saved.logsumexp[block, slot])
            for seen, tree in dkv.items():
                if slot in tree.leaves:
                    tree.add(slot, dkeys[:, :, :, grid.tokens(seen)])
        dweights = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            leaf = model.empty("working", packed.size)
            dwqkv, dwo = attention_views(config, leaf)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
            dk, dv = dkv[slot].total  # -> [B, K/G, s, e], [B, K/G, s, e]
            dnormed[slot].add(block, qkv_backward(
                xp, dq[slot], dk, dv, normed[slot], wqkv, model.rotary[slot], out=dwqkv))
            out_backward_weight(xp, dy[slot], saved.heads[block, slot], out=dwo)
            dweights.add(slot, leaf)
        out[...] = dweights.total
    dx = normalise_backward(model, totals(dnormed), saved.x, gain, dgain, 2 * layer)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("mlp", "forward")
def mlp_forward(model: Model, x: Tiles, weights: Parameters, layer: int) -> tuple[Tiles, MlpSaved]:
    """x plus the gated feed-forward part of the normalised x: slot -> [B, s, h]."""
    config, grid, xp = model.config, model.grid, model.xp
    normed = normalise(model, x, weights.gains[2 * layer + 1])
    output = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    saved = MlpSaved(x)
    for block, packed in zip(grid.blocks, weights.mlp[layer]):
        gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
        for slot in grid.slots:
            y, projected = swiglu_forward(xp, normed[slot], gate_up, down)  # -> [B, s, h], [B*s, 2*f/G]
            output[slot].add(block, y)
            saved.projected[block, slot] = model.memory.track("activations", projected)
    return add_residual(model, x, totals(output)), saved


@phase("mlp", "backward")
def mlp_backward(
    model: Model, dy: Tiles, saved: MlpSaved, weights: Parameters, layer: int, gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's MLP gradients and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer + 1]
    normed = normalise(model, saved.x, gain)
    dnormed = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    for block, packed, out in zip(grid.blocks, weights.mlp[layer], gradients.mlp[layer]):
        gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
        dweights = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            leaf = model.empty("working", packed.size)
            projected = saved.projected[block, slot]
            dnormed[slot].add(block, swiglu_backward(
                xp, dy[slot], normed[slot], gate_up, down, projected, out=mlp_views(config, leaf)))
            dweights.add(slot, leaf)
        out[...] = dweights.total
    dx = normalise_backward(model, totals(dnormed), saved.x, gain, dgain, 2 * layer + 1)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("head", "forward")
def head_forward(model: Model, x: Tiles, targets: Tiles, weights: Parameters) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats. The logits exist for one block of the vocabulary at a time."""
    config, grid, xp = model.config, model.grid, model.xp
    normed = normalise(model, x, weights.gains[-1])
    triples = {slot: Tree[Array](range(config.blocks), partial(merge_triples, xp)) for slot in grid.slots}
    for block, table in zip(grid.blocks, weights.head_table):
        for slot in grid.slots:
            triples[slot].add(block, logits_forward(xp, normed[slot], table, targets[slot], block * len(table)))
    saved = HeadSaved(x)
    sums: Tiles = {}
    for slot in grid.slots:
        losses, logsumexp = token_losses(xp, triples[slot].total)  # -> [B*s], [B*s]
        saved.logsumexp[slot] = model.memory.track("activations", logsumexp)
        sums[slot] = xp.sum(losses, keepdims=True)  # [B*s] -> [1]
    return mean_loss(model, sums), saved


@phase("head", "backward")
def head_backward(
    model: Model, saved: HeadSaved, targets: Tiles, weights: Parameters, gradients: Parameters, dgain: Tiles
) -> Tiles:
    """Returns dx: slot -> [B, s, h]; writes the head's gradient and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    scale = 1.0 / (config.batch_size * config.seq_len)
    normed = normalise(model, saved.x, weights.gains[-1])
    dnormed = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    for block, table, out in zip(grid.blocks, weights.head_table, gradients.head_table):
        dtable = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            leaf = model.empty("working", *table.shape)
            dnormed[slot].add(block, logits_backward(
                xp, scale, normed[slot], table, targets[slot], block * len(table), saved.logsumexp[slot], out=leaf))
            dtable.add(slot, leaf)
        out[...] = dtable.total
    return normalise_backward(model, totals(dnormed), saved.x, weights.gains[-1], dgain, -1)


@phase("loss", "forward")
def mean_loss(model: Model, sums: Tiles) -> float:
    """The mean over all tokens of slot -> [1], the sum of a tile's losses."""
    tree = Tree[Array](range(model.config.tiles))
    for slot in model.grid.slots:
        tree.add(slot, sums[slot])
    return model.number(tree.total) / (model.config.batch_size * model.config.seq_len)


@phase("gains", "backward")
def gains_backward(model: Model, dgain: Tiles, gradients: Parameters) -> None:
    """Writes the gradient of all gains: the sum over tiles of slot -> [2L+1, h]."""
    tree = Tree[Array](range(model.config.tiles))
    for slot in model.grid.slots:
        tree.add(slot, dgain[slot])
    gradients.gains[...] = tree.total


def model_forward(model: Model, weights: Parameters, tokens: Tiles, targets: Tiles) -> tuple[float, Saved]:
    """The loss of a batch, and what the backward needs. tokens and targets: slot -> [B, s] of whole numbers."""
    saved = Saved(tokens, targets)
    x = embedding_forward(model, tokens, weights)
    for layer in range(model.config.num_layers):
        x, attention = attention_forward(model, x, weights, layer)
        x, mlp = mlp_forward(model, x, weights, layer)
        saved.attention.append(attention)
        saved.mlp.append(mlp)
        forget(model, saved)
    loss, saved.head = head_forward(model, x, targets, weights)
    return loss, saved


@phase("model", "backward")
def model_backward(model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss into `gradients`; uses up what was saved, layer by layer."""
    config = model.config
    dgain = {slot: model.empty("working", *weights.gains.shape) for slot in model.grid.slots}
    dx = head_backward(model, saved.head, saved.targets, weights, gradients, dgain)
    for layer in reversed(range(config.num_layers)):
        if model.recompute == "full":
            x, saved.attention[-1] = attention_forward(model, saved.attention[-1].x, weights, layer)
            saved.mlp[-1] = mlp_forward(model, x, weights, layer)[1]
            del x  # which the MLP's backward is the last to need
        dx = mlp_backward(model, dx, saved.mlp.pop(), weights, layer, gradients, dgain)
        if model.recompute == "attention":
            saved.attention[-1] = attention_forward(model, saved.attention[-1].x, weights, layer)[1]
        dx = attention_backward(model, dx, saved.attention.pop(), weights, layer, gradients, dgain)
    embedding_backward(model, dx, saved.tokens, weights, gradients)
    gains_backward(model, dgain, gradients)


@phase("optimizer", "backward")
def gradient_norm(model: Model, gradients: Parameters) -> float:
    """The Euclidean norm of all gradients: squares summed over blocks by the tree, then over the tensors."""
    xp = model.xp
    tree = Tree[Array](range(model.config.blocks))
    for position, block in enumerate(model.grid.blocks):
        tree.add(block, squares(model, gradients, position))
    return model.number(xp.sqrt(xp.sum(tree.total) + xp.sum(gradients.gains * gradients.gains)))
