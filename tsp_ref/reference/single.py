"""The model in one process, on the grid: the stated computation whose bits every schedule reproduces on N ranks.

Every schedule has these functions, in this order; what it adds is messages. Nothing is imported from them here. The
tiles that are at hand, here all of them in the order of their slots, are the first axis p of every array; they are
worked on a stack at a time.
"""

from __future__ import annotations

from ..accounting.phase import phase
from ..arrays import Array
from ..grid.tree import Tree
from ..model import tilewise
from ..model.activations import AttentionSaved, HeadSaved, MlpSaved, Saved
from ..model.model import Model
from ..model.parameters import Parameters
from ..model.tilewise import BlockSums


@phase("embedding", "forward")
def embedding_forward(model: Model, tokens: Array, weights: Parameters) -> Array:
    """tokens [p, B, s] -> x [p, B, s, h]."""
    output = BlockSums(model)
    for block, table in zip(model.grid.blocks, weights.embedding):
        for stack in model.stacks:
            output.add(stack, block, tilewise.embed(model, tokens, table, block, stack))
    return tilewise.joined(model, output.totals())


@phase("embedding", "backward")
def embedding_backward(model: Model, dx: Array, tokens: Array, weights: Parameters, gradients: Parameters) -> None:
    """Writes the embedding's gradient; where the head is tied to it, adds to what the head has written."""
    for block, out in zip(model.grid.blocks, gradients.embedding):
        dtable = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            tilewise.embed_backward(model, dx, tokens, out.shape, block, stack, dtable)
        out[...] = out + dtable.total if model.config.tied_head else dtable.total


@phase("attention", "forward")
def attention_forward(model: Model, x: Array, weights: Parameters, layer: int) -> tuple[Array, AttentionSaved]:
    """x plus the attention of the normed x [p, B, s, h]."""
    normed = tilewise.normalise(model, x, weights.gains[2 * layer])
    output, saved = BlockSums(model), AttentionSaved(x)
    tilewise.make_room_for_heads(model, saved, model.grid.blocks)
    for block, packed in zip(model.grid.blocks, weights.attention[layer]):
        for stack in model.stacks:
            tilewise.project(model, normed, packed, saved, block, stack)
    for blocks in model.head_groups:
        keys_values = tilewise.keys_values_of(model, saved, blocks)  # -> [2, m*B, K/G, S, e]
        for stack in model.stacks:
            tilewise.attend(model, keys_values, saved, blocks, stack)
            for block in blocks:
                packed = weights.attention[layer][block]
                output.add(stack, block, tilewise.output(model, packed, saved, block, stack))
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("attention", "backward")
def attention_backward(
    model: Model, dy: Array, saved: AttentionSaved, weights: Parameters, layer: int, gradients: Parameters, dgain: Array
) -> Array:
    """dy [p, B, s, h] -> dx; writes the layer's attention gradients and the tiles' gain gradients [p, 2L+1, h]."""
    gain = weights.gains[2 * layer]
    normed = tilewise.normalise(model, saved.x, gain)
    dnormed = BlockSums(model)
    for blocks in model.head_groups:
        packed = weights.attention[layer][blocks.start : blocks.stop]  # [m, size of a packed block]
        keys_values, partials = tilewise.keys_values_of(model, saved, blocks), tilewise.keys_values_tree(model)
        dq = model.empty("working", *saved.of_blocks(blocks).q.shape)  # [p, m, B, K/G, g*s, e]
        for stack in model.stacks:
            dq[stack.tiles] = tilewise.attend_backward(model, dy, keys_values, packed, saved, blocks, stack, partials)
        dkeys_values = tilewise.in_order_of_slots(model, partials.total)  # -> [p, 2, m, B, K/G, s, e]
        del keys_values, partials
        for number, block in enumerate(blocks):
            dweights = Tree[Array](range(model.config.tiles))
            for stack in model.stacks:
                dnormed.add(stack, block, tilewise.project_backward(
                    model, dy, dq[:, number], dkeys_values[:, :, number], normed, packed[number], saved, block, stack,
                    dweights))
            gradients.attention[layer][block] = dweights.total
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer])


@phase("mlp", "forward")
def mlp_forward(model: Model, x: Array, weights: Parameters, layer: int) -> tuple[Array, MlpSaved]:
    """x plus the gated feed-forward of the normed x [p, B, s, h]."""
    normed = tilewise.normalise(model, x, weights.gains[2 * layer + 1])
    output, saved = BlockSums(model), MlpSaved(x)
    for block, packed in zip(model.grid.blocks, weights.mlp[layer]):
        tilewise.make_room_for_projected(model, saved, block)
        for stack in model.stacks:
            output.add(stack, block, tilewise.feed(model, normed, packed, saved, block, stack))
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("mlp", "backward")
def mlp_backward(
    model: Model, dy: Array, saved: MlpSaved, weights: Parameters, layer: int, gradients: Parameters, dgain: Array
) -> Array:
    """dy [p, B, s, h] -> dx; writes the layer's MLP gradients and the tiles' gain gradients [p, 2L+1, h]."""
    gain = weights.gains[2 * layer + 1]
    normed = tilewise.normalise(model, saved.x, gain)
    dnormed = BlockSums(model)
    for block, packed, out in zip(model.grid.blocks, weights.mlp[layer], gradients.mlp[layer]):
        dweights = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            dnormed.add(stack, block, tilewise.feed_backward(
                model, dy, normed, packed, saved, block, stack, dweights))
        out[...] = dweights.total
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer + 1])


@phase("head", "forward")
def head_forward(model: Model, x: Array, targets: Array, weights: Parameters) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats. The logits exist for one block of the vocabulary at a time."""
    normed = tilewise.normalise(model, x, weights.gains[-1])
    triples = BlockSums(model, tilewise.merge_triples(model))
    for block, table in zip(model.grid.blocks, weights.head_table):
        for stack in model.stacks:
            triples.add(stack, block, tilewise.logits(model, normed, table, targets, block, stack))
    losses, saved = tilewise.losses_of(model, triples.totals(), x)
    return mean_loss(model, losses), saved


@phase("head", "backward")
def head_backward(
    model: Model, saved: HeadSaved, targets: Array, weights: Parameters, gradients: Parameters, dgain: Array
) -> Array:
    """Returns dx [p, B, s, h]; writes the head's gradient and the tiles' gain gradients [p, 2L+1, h]."""
    normed = tilewise.normalise(model, saved.x, weights.gains[-1])
    dnormed = BlockSums(model)
    for block, table, out in zip(model.grid.blocks, weights.head_table, gradients.head_table):
        dtable = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            dnormed.add(stack, block, tilewise.logits_backward(
                model, normed, table, targets, saved, block, stack, dtable))
        out[...] = dtable.total
    return tilewise.normalise_backward(model, dnormed.totals(), saved.x, weights.gains[-1], dgain[:, -1])


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
        tilewise.forget(model, saved, kept)
    loss, head = head_forward(model, x, targets, weights)
    return loss, Saved(tokens, targets, attention, mlp, head)


@phase("model", "backward")
def model_backward(model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss into `gradients`; uses up what was saved, layer by layer."""
    dgain = model.empty("working", len(model.grid.slots), *weights.gains.shape)
    dx = head_backward(model, saved.head, saved.targets, weights, gradients, dgain)
    del saved.head  # which nothing below needs
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
        tree.add(block, tilewise.squares(model, gradients, position))
    return tilewise.norm_of(model, tree.total, gradients)
