"""TP+SP: tensor and sequence parallelism, each on an axis of its own. A mesh of T x Σ ranks, T·Σ = N; every rank holds
1/T of the weights and 1/Σ of the tokens.

Along the axis of weights it is TP: the T ranks that share tokens apply different blocks to them, and sum their outputs
by an all-reduce of these tokens. Along the axis of tokens it is SP: the Σ ranks that share weights exchange the keys
and values of their heads, and sum the gradients of their blocks. With Σ = 1 this is `tp`, with T = 1 it is `sp`.
(What comes from where is said there; the order of every sum is ours.)

Between layers a rank holds 1/T of weights, gradients and optimizer state, and the layers' inputs of 1/Σ of the tokens.

Read beside `reference.single`: the same functions in the same order; what differs is the messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..accounting.phase import phase
from ..arrays import Array, Tiles
from ..comm.mesh import Mesh
from ..grid.grid import Place, share
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
from .collectives import (
    Ahead,
    AllReduceTiles,
    GatherKeysValues,
    ReduceToOwner,
    ScatterKeysValues,
    all_gather_gradients,
    all_reduce,
    finish_all,
    in_turn,
    own_last,
    put_off,
    turn,
    when_own_is_last,
)
from .tags import Tag


def place(mesh: Mesh) -> tuple[Place, Place]:
    """Where this rank stands on the axis of weights and on that of tokens."""
    return Place(mesh.weights.rank, mesh.weights.size), Place(mesh.tokens.rank, mesh.tokens.size)


@phase("embedding", "forward")
def embedding_forward(mesh: Mesh, model: Model, tokens: Tiles, weights: Parameters) -> Tiles:
    """tokens: slot -> [B, s]. Returns slot -> [B, s, h]."""
    grid, xp = model.grid, model.xp
    sums = AllReduceTiles(mesh.weights, model, Tag.EMBEDDING_SUMS)
    for slot in sums.order:
        for block, table in zip(grid.blocks, weights.embedding):
            mesh.progress(block, slot)
            sums.add(slot, block, embed_forward(xp, tokens[slot], table, block * len(table)))
    return {slot: model.memory.track("activations", total) for slot, total in sums.finish().items()}


@phase("embedding", "backward")
def embedding_backward(
    mesh: Mesh, model: Model, dx: Tiles, tokens: Tiles, weights: Parameters, gradients: Parameters
) -> None:
    """Writes the embedding's gradient; where the head is tied to it, adds to what the head has written."""
    config, grid, xp = model.config, model.grid, model.xp
    summed_by = [share(len(grid.blocks), rank, mesh.tokens.size) for rank in range(mesh.tokens.size)]
    expected = when_own_is_last(summed_by, mesh.tokens.rank)
    home = ReduceToOwner(mesh.tokens, model, weights.embedding.shape[1:], Tag.EMBEDDING_GRADIENTS, expected)
    for owner, position in in_turn(summed_by, mesh.tokens.rank, own_last(mesh.tokens.size)):
        dtable = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            mesh.progress(grid.blocks[position], slot)
            leaf = model.empty("working", *weights.embedding.shape[1:])
            embed_backward(xp, dx[slot], tokens[slot], grid.blocks[position] * len(leaf), out=leaf)
            dtable.add(slot, leaf)
        home.receive(turn(summed_by, mesh.tokens.rank, owner, position))
        home.send(owner, position, dtable)
    put_off(model, partial(all_gather_gradients, home, gradients.embedding, config.tied_head))


@phase("attention", "forward")
def attention_forward(
    mesh: Mesh, model: Model, x: Tiles, weights: Parameters, layer: int
) -> tuple[Tiles, AttentionSaved]:
    """x plus the attention of the normalised x: slot -> [B, s, h].

    Kept keys and values: block -> [tiles, 2, B, K/G, s, e], this rank's tokens only. Those of one block are exchanged
    while the block before it is attended with.
    """
    config, grid, xp, track = model.config, model.grid, model.xp, model.memory.track
    normed = normalise(model, x, weights.gains[2 * layer])
    sums = AllReduceTiles(mesh.weights, model, Tag.ATTENTION_SUMS)
    saved = AttentionSaved(x)

    def projected() -> Iterator[tuple[int, Array, GatherKeysValues]]:
        for block, packed in zip(grid.blocks, weights.attention[layer]):
            wqkv, wo = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
            own = model.empty("activations", len(grid.slots), 2, config.batch_size,
                              config.kv_heads_per_block, config.tile_len, config.head_dim)
            saved.keys_values[block] = own
            for tile, slot in enumerate(grid.slots):
                mesh.progress(block, slot)
                q, own[tile, 0], own[tile, 1] = qkv_forward(
                    xp, normed[slot], wqkv, model.rotary[slot], config.group_size)
                saved.q[block, slot] = track("activations", q)
                saved.tile_keys_values[block, slot] = own[tile]
            yield block, wo, GatherKeysValues(mesh.tokens, model, own, Tag.KEYS_VALUES)

    for block, wo, exchange in Ahead(projected()):
        keys_values = exchange.finish()  # -> [2, B, K/G, S, e]
        for slot in sums.order:
            mesh.progress(block, slot)
            k, v = keys_values[:, :, :, : grid.visible(slot)]  # -> [B, K/G, n, e], [B, K/G, n, e]
            heads, logsumexp = attend_forward(xp, saved.q[block, slot], k, v, model.mask)
            sums.add(slot, block, out_forward(xp, heads, wo, config.tile_len))
            saved.heads[block, slot] = track("activations", heads)
            saved.logsumexp[block, slot] = track("activations", logsumexp)
        del keys_values, k, v  # before the next block's are put together
    return add_residual(model, x, sums.finish()), saved


@phase("attention", "backward")
def attention_backward(
    mesh: Mesh, model: Model, dy: Tiles, saved: AttentionSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's attention gradients and the tiles' gain gradients.

    Keys and values travel again, those of the next block while this one is attended with. Their gradients go home to
    the tokens' rank under the next block's attention; only then can those of the block's weights be formed.
    """
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer]
    normed = normalise(model, saved.x, gain)
    sums = AllReduceTiles(mesh.weights, model, Tag.ATTENTION_SUMS)
    summed_by = [share(len(grid.blocks), rank, mesh.tokens.size) for rank in range(mesh.tokens.size)]
    mine = summed_by[mesh.tokens.rank]
    expected = [((position, 0), peer, position) for position in mine for peer in mesh.tokens.others]
    home = ReduceToOwner(mesh.tokens, model, weights.attention[layer].shape[1:], Tag.ATTENTION_GRADIENTS, expected)
    order = list(in_turn(summed_by, 0, range(0, -mesh.tokens.size, -1)))  # the same on all ranks

    def gathered() -> Iterator[GatherKeysValues]:
        for _, position in order:
            yield GatherKeysValues(mesh.tokens, model, saved.keys_values[grid.blocks[position]], Tag.KEYS_VALUES)

    def attended() -> Iterator[tuple[int, int, Tiles, dict[int, Tree[Array]], ScatterKeysValues]]:
        for exchange, (owner, position) in zip(Ahead(gathered()), order, strict=True):
            block = grid.blocks[position]
            _, wo = attention_views(config, weights.attention[layer][position])  # -> [h, (H+2*K)/G*e], [H/G*e, h]
            keys_values = exchange.finish()  # -> [2, B, K/G, S, e]
            dq: Tiles = {}
            dkv = {slot: Tree[Array](grid.readers(slot)) for slot in range(config.tiles)}
            for slot in grid.slots:
                mesh.progress(block, slot)
                k, v = keys_values[:, :, :, : grid.visible(slot)]  # -> [B, K/G, n, e], [B, K/G, n, e]
                heads = saved.heads[block, slot]
                dheads = out_backward(xp, dy[slot], heads, wo, config.tile_len)  # -> [B, K/G, g*s, e]
                dq[slot], dkeys = attend_backward(
                    xp, dheads, saved.q[block, slot], k, v, model.mask, heads, saved.logsumexp[block, slot])
                for seen, tree in dkv.items():
                    if slot in tree.leaves:
                        tree.add(slot, dkeys[:, :, :, grid.tokens(seen)])
            del keys_values, k, v, dkeys  # before the next block's are put together
            yield owner, position, dq, dkv, ScatterKeysValues(mesh.tokens, model, dkv, Tag.KEYS_VALUES_GRADIENTS)

    for owner, position, dq, dkv, exchange in Ahead(attended()):
        exchange.finish()
        block, packed = grid.blocks[position], weights.attention[layer][position]
        wqkv, _ = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
        dweights = Tree[Array](range(config.tiles))
        for slot in sums.order:
            mesh.progress(block, slot)
            leaf = model.empty("working", packed.size)
            dwqkv, dwo = attention_views(config, leaf)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
            dk, dv = dkv[slot].total  # -> [B, K/G, s, e], [B, K/G, s, e]
            sums.add(slot, block, qkv_backward(
                xp, dq[slot], dk, dv, normed[slot], wqkv, model.rotary[slot], out=dwqkv))
            out_backward_weight(xp, dy[slot], saved.heads[block, slot], out=dwo)
            dweights.add(slot, leaf)
        if owner == mesh.tokens.rank:
            home.receive((position, 0))
        home.send(owner, position, dweights)
    put_off(model, partial(all_gather_gradients, home, gradients.attention[layer]))
    dx = normalise_backward(model, sums.finish(), saved.x, gain, dgain, 2 * layer)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("mlp", "forward")
def mlp_forward(
    mesh: Mesh, model: Model, x: Tiles, weights: Parameters, layer: int
) -> tuple[Tiles, MlpSaved]:
    """x plus the gated feed-forward part of the normalised x: slot -> [B, s, h]."""
    config, grid, xp = model.config, model.grid, model.xp
    normed = normalise(model, x, weights.gains[2 * layer + 1])
    sums = AllReduceTiles(mesh.weights, model, Tag.MLP_SUMS)
    saved = MlpSaved(x)
    for slot in sums.order:
        for block, packed in zip(grid.blocks, weights.mlp[layer]):
            mesh.progress(block, slot)
            gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
            y, projected = swiglu_forward(xp, normed[slot], gate_up, down)  # -> [B, s, h], [B*s, 2*f/G]
            sums.add(slot, block, y)
            saved.projected[block, slot] = model.memory.track("activations", projected)
    return add_residual(model, x, sums.finish()), saved


@phase("mlp", "backward")
def mlp_backward(
    mesh: Mesh, model: Model, dy: Tiles, saved: MlpSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's MLP gradients and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer + 1]
    normed = normalise(model, saved.x, gain)
    sums = AllReduceTiles(mesh.weights, model, Tag.MLP_SUMS)
    summed_by = [share(len(grid.blocks), rank, mesh.tokens.size) for rank in range(mesh.tokens.size)]
    expected = when_own_is_last(summed_by, mesh.tokens.rank)
    home = ReduceToOwner(mesh.tokens, model, weights.mlp[layer].shape[1:], Tag.MLP_GRADIENTS, expected)
    for owner, position in in_turn(summed_by, mesh.tokens.rank, own_last(mesh.tokens.size)):
        block, packed = grid.blocks[position], weights.mlp[layer][position]
        gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
        dweights = Tree[Array](range(config.tiles))
        for slot in sums.order:
            mesh.progress(block, slot)
            leaf = model.empty("working", packed.size)
            projected = saved.projected[block, slot]
            sums.add(slot, block, swiglu_backward(
                xp, dy[slot], normed[slot], gate_up, down, projected, out=mlp_views(config, leaf)))
            dweights.add(slot, leaf)
        home.receive(turn(summed_by, mesh.tokens.rank, owner, position))
        home.send(owner, position, dweights)
    put_off(model, partial(all_gather_gradients, home, gradients.mlp[layer]))
    dx = normalise_backward(model, sums.finish(), saved.x, gain, dgain, 2 * layer + 1)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("head", "forward")
def head_forward(
    mesh: Mesh, model: Model, x: Tiles, targets: Tiles, weights: Parameters
) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats. The logits exist for one block of the vocabulary at a time."""
    grid, xp = model.grid, model.xp
    normed = normalise(model, x, weights.gains[-1])
    exchange = AllReduceTiles(mesh.weights, model, Tag.HEAD_SUMS, partial(merge_triples, xp))
    for slot in exchange.order:
        for block, table in zip(grid.blocks, weights.head_table):
            mesh.progress(block, slot)
            exchange.add(slot, block, logits_forward(xp, normed[slot], table, targets[slot], block * len(table)))
    saved = HeadSaved(x)
    merged = exchange.finish()
    sums: Tiles = {}
    for slot in grid.slots:
        losses, logsumexp = token_losses(xp, merged[slot])  # -> [B*s], [B*s]
        saved.logsumexp[slot] = model.memory.track("activations", logsumexp)
        sums[slot] = xp.sum(losses, keepdims=True)  # [B*s] -> [1]
    return mean_loss(mesh, model, sums), saved


@phase("head", "backward")
def head_backward(
    mesh: Mesh, model: Model, saved: HeadSaved, targets: Tiles, weights: Parameters, gradients: Parameters,
    dgain: Tiles
) -> Tiles:
    """Returns dx: slot -> [B, s, h]; writes the head's gradient and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    scale = 1.0 / (config.batch_size * config.seq_len)
    normed = normalise(model, saved.x, weights.gains[-1])
    sums = AllReduceTiles(mesh.weights, model, Tag.HEAD_SUMS)
    summed_by = [share(len(grid.blocks), rank, mesh.tokens.size) for rank in range(mesh.tokens.size)]
    expected = when_own_is_last(summed_by, mesh.tokens.rank)
    home = ReduceToOwner(mesh.tokens, model, weights.head_table.shape[1:], Tag.HEAD_GRADIENTS, expected)
    for owner, position in in_turn(summed_by, mesh.tokens.rank, own_last(mesh.tokens.size)):
        block, table = grid.blocks[position], weights.head_table[position]
        dtable = Tree[Array](range(config.tiles))
        for slot in sums.order:
            mesh.progress(block, slot)
            leaf = model.empty("working", *table.shape)
            sums.add(slot, block, logits_backward(
                xp, scale, normed[slot], table, targets[slot], block * len(table), saved.logsumexp[slot], out=leaf))
            dtable.add(slot, leaf)
        home.receive(turn(summed_by, mesh.tokens.rank, owner, position))
        home.send(owner, position, dtable)
    put_off(model, partial(all_gather_gradients, home, gradients.head_table))
    return normalise_backward(model, sums.finish(), saved.x, weights.gains[-1], dgain, -1)


@phase("loss", "forward")
def mean_loss(mesh: Mesh, model: Model, sums: Tiles) -> float:
    """The mean over all tokens, on every rank, of slot -> [1], the sum of a tile's losses."""
    total = all_reduce(mesh.tokens, model.grid.slots_of, sums, Tag.LOSS)
    return model.number(total) / (model.config.batch_size * model.config.seq_len)


@phase("gains", "backward")
def gains_backward(mesh: Mesh, model: Model, dgain: Tiles, gradients: Parameters) -> None:
    """Writes the gradient of all gains, which every rank holds: the sum over tiles of slot -> [2L+1, h]."""
    gradients.gains[...] = all_reduce(mesh.tokens, model.grid.slots_of, dgain, Tag.GAIN_GRADIENTS)


def model_forward(
    mesh: Mesh, model: Model, weights: Parameters, tokens: Tiles, targets: Tiles
) -> tuple[float, Saved]:
    """The loss of a batch, and what the backward needs. tokens and targets: slot -> [B, s] of whole numbers."""
    saved = Saved(tokens, targets)
    x = embedding_forward(mesh, model, tokens, weights)
    for layer in range(model.config.num_layers):
        x, attention = attention_forward(mesh, model, x, weights, layer)
        x, mlp = mlp_forward(mesh, model, x, weights, layer)
        saved.attention.append(attention)
        saved.mlp.append(mlp)
        forget(model, saved)
    loss, saved.head = head_forward(mesh, model, x, targets, weights)
    finish_all(mesh.whole, model)
    return loss, saved


@phase("model", "backward")
def model_backward(mesh: Mesh, model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss into `gradients`; uses up what was saved, layer by layer."""
    config = model.config
    dgain = {slot: model.empty("working", *weights.gains.shape) for slot in model.grid.slots}
    dx = head_backward(mesh, model, saved.head, saved.targets, weights, gradients, dgain)
    for layer in reversed(range(config.num_layers)):
        if model.recompute == "full":
            x, saved.attention[-1] = attention_forward(mesh, model, saved.attention[-1].x, weights, layer)
            saved.mlp[-1] = mlp_forward(mesh, model, x, weights, layer)[1]
            del x  # which the MLP's backward is the last to need
        dx = mlp_backward(mesh, model, dx, saved.mlp.pop(), weights, layer, gradients, dgain)
        if model.recompute == "attention":
            saved.attention[-1] = attention_forward(mesh, model, saved.attention[-1].x, weights, layer)[1]
        dx = attention_backward(mesh, model, dx, saved.attention.pop(), weights, layer, gradients, dgain)
    embedding_backward(mesh, model, dx, saved.tokens, weights, gradients)
    gains_backward(mesh, model, dgain, gradients)
    finish_all(mesh.whole, model)


@phase("optimizer", "backward")
def gradient_norm(mesh: Mesh, model: Model, gradients: Parameters) -> float:
    """The Euclidean norm of all gradients, the same bits on every rank: squares summed over blocks by the tree."""
    grid, xp = model.grid, model.xp
    partials = {block: squares(model, gradients, position) for position, block in enumerate(grid.blocks)}
    total = all_reduce(mesh.weights, grid.blocks_of, partials, Tag.GRADIENT_NORM)
    return model.number(xp.sqrt(xp.sum(total) + xp.sum(gradients.gains * gradients.gains)))
