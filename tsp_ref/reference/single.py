"""The model in one process, on the grid: the stated computation whose bits every schedule reproduces on N ranks.

Every schedule has these functions, in this order; what it adds is messages. Nothing is imported from them here. The
tiles that are at hand, here all of them in the order of their slots, are the first axis p of every array; they are
worked on a stack at a time.
"""

from __future__ import annotations

from functools import partial

from ..accounting.phase import phase
from ..arrays import Array
from ..grid.tree import Tree
from ..model.activations import AttentionSaved, HeadSaved, MlpSaved, Saved
from ..model.model import Model
from ..model.parameters import Parameters, mlp_views
from ..model.tilewise import (
    BlockSums,
    add_residual,
    attend,
    attended_backward,
    forget,
    in_order_of_slots,
    in_order_of_text,
    joined,
    keep_block,
    keep_projected,
    keys_values_tree,
    losses_of,
    norm_of,
    normalise,
    normalise_backward,
    project,
    project_backward,
    squares,
)
from ..ops.embedding import embed_backward, embed_forward
from ..ops.loss import logits_backward, logits_forward, merge_triples
from ..ops.mlp import swiglu_backward, swiglu_forward


@phase("embedding", "forward")
def embedding_forward(model: Model, tokens: Array, weights: Parameters) -> Array:
    """tokens [p, B, s] -> x [p, B, s, h]."""
    output = BlockSums(model)
    for block, table in zip(model.grid.blocks, weights.embedding):
        for stack in model.stacks:
            output.add(stack, block, embed_forward(model.xp, tokens[stack.tiles], table, block * len(table)))
    return joined(model, output.finish())


@phase("embedding", "backward")
def embedding_backward(model: Model, dx: Array, tokens: Array, weights: Parameters, gradients: Parameters) -> None:
    """Writes the embedding's gradient; where the head is tied to it, adds to what the head has written."""
    for block, out in zip(model.grid.blocks, gradients.embedding):
        dtable = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            leaves = model.empty("working", len(stack.slots), *out.shape)
            embed_backward(model.xp, dx[stack.tiles], tokens[stack.tiles], block * len(out), out=leaves)
            dtable.add_stack(stack.slots, leaves)
        out[...] = out + dtable.total if model.config.tied_head else dtable.total


@phase("attention", "forward")
def attention_forward(model: Model, x: Array, weights: Parameters, layer: int) -> tuple[Array, AttentionSaved]:
    """x plus the attention of the normed x [p, B, s, h]."""
    normed = normalise(model, x, weights.gains[2 * layer])
    output, saved = BlockSums(model), AttentionSaved(x)
    for block, packed in zip(model.grid.blocks, weights.attention[layer]):
        keep_block(model, saved, block)
        for stack in model.stacks:
            project(model, normed, packed, saved, block, stack)
        keys_values = in_order_of_text(model, {0: saved.keys_values[block]})  # -> [2, B, K/G, S, e]
        for stack in model.stacks:
            output.add(stack, block, attend(model, keys_values, packed, saved, block, stack))
    return add_residual(model, x, output.finish()), saved


@phase("attention", "backward")
def attention_backward(
    model: Model, dy: Array, saved: AttentionSaved, weights: Parameters, layer: int, gradients: Parameters, dgain: Array
) -> Array:
    """dy [p, B, s, h] -> dx; writes the layer's attention gradients and the tiles' gain gradients [p, 2L+1, h]."""
    gain = weights.gains[2 * layer]
    normed = normalise(model, saved.x, gain)
    dnormed = BlockSums(model)
    for block, packed, out in zip(model.grid.blocks, weights.attention[layer], gradients.attention[layer]):
        keys_values = in_order_of_text(model, {0: saved.keys_values[block]})  # -> [2, B, K/G, S, e]
        dq, dkeys_values = model.empty("working", *saved.q[block].shape), keys_values_tree(model)
        for stack in model.stacks:
            dq[stack.tiles] = attended_backward(model, dy, keys_values, packed, saved, block, stack, dkeys_values)
        of_tiles = in_order_of_slots(model, dkeys_values.total)  # [2, B, K/G, S, e] -> [p, 2, B, K/G, s, e]
        dweights = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            dnormed.add(stack, block, project_backward(
                model, dy, dq, of_tiles, normed, packed, saved, block, stack, dweights))
        out[...] = dweights.total
    dx = normalise_backward(model, dnormed.finish(), saved.x, gain, dgain[:, 2 * layer])
    dx += dy
    return dx


@phase("mlp", "forward")
def mlp_forward(model: Model, x: Array, weights: Parameters, layer: int) -> tuple[Array, MlpSaved]:
    """x plus the gated feed-forward of the normed x [p, B, s, h]."""
    normed = normalise(model, x, weights.gains[2 * layer + 1])
    output, saved = BlockSums(model), MlpSaved(x)
    for block, packed in zip(model.grid.blocks, weights.mlp[layer]):
        gate_up, down = mlp_views(model.config, packed)  # -> [h, 2*f/G], [f/G, h]
        projected = saved.projected[block] = keep_projected(model, gate_up)  # [p, B*s, 2*f/G]
        for stack in model.stacks:
            tiles = stack.tiles
            output.add(stack, block, swiglu_forward(model.xp, normed[tiles], gate_up, down, out=projected[tiles]))
    return add_residual(model, x, output.finish()), saved


@phase("mlp", "backward")
def mlp_backward(
    model: Model, dy: Array, saved: MlpSaved, weights: Parameters, layer: int, gradients: Parameters, dgain: Array
) -> Array:
    """dy [p, B, s, h] -> dx; writes the layer's MLP gradients and the tiles' gain gradients [p, 2L+1, h]."""
    gain = weights.gains[2 * layer + 1]
    normed = normalise(model, saved.x, gain)
    dnormed = BlockSums(model)
    for block, packed, out in zip(model.grid.blocks, weights.mlp[layer], gradients.mlp[layer]):
        gate_up, down = mlp_views(model.config, packed)  # -> [h, 2*f/G], [f/G, h]
        projected, dweights = saved.projected[block], Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            tiles = stack.tiles
            leaves = model.empty("working", len(stack.slots), packed.size)
            dnormed.add(stack, block, swiglu_backward(
                model.xp, dy[tiles], normed[tiles], gate_up, down, projected[tiles],
                out=mlp_views(model.config, leaves)))
            dweights.add_stack(stack.slots, leaves)
        out[...] = dweights.total
    dx = normalise_backward(model, dnormed.finish(), saved.x, gain, dgain[:, 2 * layer + 1])
    dx += dy
    return dx


@phase("head", "forward")
def head_forward(model: Model, x: Array, targets: Array, weights: Parameters) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats. The logits exist for one block of the vocabulary at a time."""
    normed = normalise(model, x, weights.gains[-1])
    triples = BlockSums(model, partial(merge_triples, model.xp))
    for block, table in zip(model.grid.blocks, weights.head_table):
        for stack in model.stacks:
            triples.add(stack, block, logits_forward(
                model.xp, normed[stack.tiles], table, targets[stack.tiles], block * len(table)))
    losses, saved = losses_of(model, triples.finish(), x)
    return mean_loss(model, losses), saved


@phase("head", "backward")
def head_backward(
    model: Model, saved: HeadSaved, targets: Array, weights: Parameters, gradients: Parameters, dgain: Array
) -> Array:
    """Returns dx [p, B, s, h]; writes the head's gradient and the tiles' gain gradients [p, 2L+1, h]."""
    normed = normalise(model, saved.x, weights.gains[-1])
    dnormed = BlockSums(model)
    for block, table, out in zip(model.grid.blocks, weights.head_table, gradients.head_table):
        dtable = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            tiles = stack.tiles
            leaves = model.empty("working", len(stack.slots), *table.shape)
            dnormed.add(stack, block, logits_backward(
                model.xp, 1.0 / model.config.num_tokens, normed[tiles], table, targets[tiles], block * len(table),
                saved.logsumexp[tiles], out=leaves))
            dtable.add_stack(stack.slots, leaves)
        out[...] = dtable.total
    return normalise_backward(model, dnormed.finish(), saved.x, weights.gains[-1], dgain[:, -1])


@phase("loss", "forward")
def mean_loss(model: Model, losses: Array) -> float:
    """The mean over all tokens of [p, 1], the sum of each tile's losses."""
    total = Tree[Array](range(model.config.tiles))
    total.add_stack(model.grid.slots, losses)
    return model.number(total.total) / model.config.num_tokens


@phase("gains", "backward")
def gains_backward(model: Model, dgain: Array, gradients: Parameters) -> None:
    """Writes the gradient of all gains: the sum over tiles of [p, 2L+1, h]."""
    total = Tree[Array](range(model.config.tiles))
    total.add_stack(model.grid.slots, dgain)
    gradients.gains[...] = total.total


@phase("model", "forward")
def model_forward(model: Model, weights: Parameters, tokens: Array, targets: Array) -> tuple[float, Saved]:
    """The loss of a batch, and what the backward needs. tokens and targets [p, B, s], of whole numbers."""
    attention, mlp = [], []
    x = embedding_forward(model, tokens, weights)
    for layer in range(model.config.num_layers):
        x, saved = attention_forward(model, x, weights, layer)
        attention.append(saved)
        x, kept = mlp_forward(model, x, weights, layer)
        mlp.append(kept)
        forget(model, saved, kept)
    loss, head = head_forward(model, x, targets, weights)
    return loss, Saved(tokens, targets, attention, mlp, head)


@phase("model", "backward")
def model_backward(model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss into `gradients`; uses up what was saved, layer by layer."""
    dgain = model.empty("working", len(model.grid.slots), *weights.gains.shape)
    dx = head_backward(model, saved.head, saved.targets, weights, gradients, dgain)
    for layer in reversed(range(model.config.num_layers)):
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
    tree = Tree[Array](range(model.config.blocks))
    for position, block in enumerate(model.grid.blocks):
        tree.add(block, squares(model, gradients, position))
    return norm_of(model, tree.total, gradients)
