"""TP: tensor parallelism. Every rank holds 1/N of the weights and all of the tokens.

Tokens are replicated, weights are cut: each rank applies its own blocks to all tokens, and what the ranks compute of a
sub-layer's output, or of its input's gradient, is summed by an all-reduce, tile by tile, under the work on the next
tiles. Gradients of weights need no message: their owner has all tokens. (Source: Megatron-LM, arXiv 1909.08053; the
order of every sum is ours, and so is the all-reduce as an exchange to the rank that sums and a gather.)

Between layers a rank holds its 1/N of weights, gradients, optimizer state and of what is computed by blocks (queries,
keys, values, heads, gate and up), but the layers' inputs whole: they are not divided by N.

Read beside `reference.single`: the same functions in the same order; what differs is the messages.
"""

from __future__ import annotations

from ..accounting.phase import phase
from ..arrays import Array
from ..comm.communicator import Communicator
from ..grid.grid import ALONE, Place
from ..grid.tree import Tree
from ..model import tilewise
from ..model.activations import AttentionSaved, HeadSaved, MlpSaved, Saved
from ..model.model import Model
from ..model.parameters import Parameters
from .all_reduce import AllReduceTiles, all_reduce
from .tags import Tag


def place(comm: Communicator) -> tuple[Place, Place]:
    """Where this rank stands on the axis of weights and on that of tokens: there is no axis of tokens."""
    return Place(comm.rank, comm.size), ALONE


@phase("embedding", "forward")
def embedding_forward(comm: Communicator, model: Model, tokens: Array, weights: Parameters) -> Array:
    """tokens [p, B, s] -> x [p, B, s, h]."""
    output = AllReduceTiles(comm, model, Tag.EMBEDDING_SUMS)
    for stack in model.stacks:
        for block, table in zip(model.grid.blocks, weights.embedding):
            comm.progress(block, *stack.place)
            output.add(stack, block, tilewise.embed(model, tokens, table, block, stack))
    return tilewise.joined(model, output.totals())


@phase("embedding", "backward")
def embedding_backward(
    comm: Communicator, model: Model, dx: Array, tokens: Array, weights: Parameters, gradients: Parameters
) -> None:
    """Writes the embedding's gradient; where the head is tied to it, adds to what the head has written."""
    for block, out in zip(model.grid.blocks, gradients.embedding):
        dtable = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            tilewise.embed_backward(model, dx, tokens, out.shape, block, stack, dtable)
        out[...] = out + dtable.total if model.config.tied_head else dtable.total


@phase("attention", "forward")
def attention_forward(
    comm: Communicator, model: Model, x: Array, weights: Parameters, layer: int
) -> tuple[Array, AttentionSaved]:
    """x plus the attention of the normed x [p, B, s, h]."""
    normed = tilewise.normalise(model, x, weights.gains[2 * layer])
    output, saved = AllReduceTiles(comm, model, Tag.ATTENTION_SUMS), AttentionSaved(x)
    packed = dict(zip(model.grid.blocks, weights.attention[layer]))
    tilewise.make_room_for_heads(model, saved, model.grid.blocks)
    for block in model.grid.blocks:
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            tilewise.project(model, normed, packed[block], saved, block, stack)
    gathered = [tilewise.keys_values_of(model, saved, blocks) for blocks in model.head_groups]
    for stack in model.stacks:
        for keys_values, blocks in zip(gathered, model.head_groups):
            comm.progress(blocks.start, *stack.place)
            tilewise.attend(model, keys_values, saved, blocks, stack)
            for block in blocks:
                output.add(stack, block, tilewise.output(model, packed[block], saved, block, stack))
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("attention", "backward")
def attention_backward(
    comm: Communicator, model: Model, dy: Array, saved: AttentionSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Array
) -> Array:
    """dy [p, B, s, h] -> dx; writes the layer's attention gradients and the tiles' gain gradients [p, 2L+1, h]."""
    gain = weights.gains[2 * layer]
    normed = tilewise.normalise(model, saved.x, gain)
    dnormed = AllReduceTiles(comm, model, Tag.ATTENTION_SUMS)
    own = model.grid.blocks.start
    for blocks in model.head_groups:
        packed = weights.attention[layer][blocks.start - own : blocks.stop - own]  # [m, size of a packed block]
        keys_values, partials = tilewise.keys_values_of(model, saved, blocks), tilewise.keys_values_tree(model)
        dq = model.empty("working", *saved.of_blocks(blocks).q.shape)  # [p, m, B, K/G, g*s, e]
        for stack in model.stacks:
            comm.progress(blocks.start, *stack.place)
            dq[stack.tiles] = tilewise.attend_backward(model, dy, keys_values, packed, saved, blocks, stack, partials)
        dkeys_values = tilewise.in_order_of_slots(model, partials.total)  # -> [p, 2, m, B, K/G, s, e]
        del keys_values, partials
        for number, block in enumerate(blocks):
            dweights = Tree[Array](range(model.config.tiles))
            for stack in model.stacks:
                comm.progress(block, *stack.place)
                dnormed.add(stack, block, tilewise.project_backward(
                    model, dy, dq[:, number], dkeys_values[:, :, number], normed, packed[number], saved, block, stack,
                    dweights))
            gradients.attention[layer][block - own] = dweights.total
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer])


@phase("mlp", "forward")
def mlp_forward(
    comm: Communicator, model: Model, x: Array, weights: Parameters, layer: int
) -> tuple[Array, MlpSaved]:
    """x plus the gated feed-forward of the normed x [p, B, s, h]."""
    normed = tilewise.normalise(model, x, weights.gains[2 * layer + 1])
    output, saved = AllReduceTiles(comm, model, Tag.MLP_SUMS), MlpSaved(x)
    for block in model.grid.blocks:
        tilewise.make_room_for_projected(model, saved, block)
    for stack in model.stacks:
        for block, packed in zip(model.grid.blocks, weights.mlp[layer]):
            comm.progress(block, *stack.place)
            output.add(stack, block, tilewise.feed(model, normed, packed, saved, block, stack))
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("mlp", "backward")
def mlp_backward(
    comm: Communicator, model: Model, dy: Array, saved: MlpSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Array
) -> Array:
    """dy [p, B, s, h] -> dx; writes the layer's MLP gradients and the tiles' gain gradients [p, 2L+1, h]."""
    gain = weights.gains[2 * layer + 1]
    normed = tilewise.normalise(model, saved.x, gain)
    dnormed = AllReduceTiles(comm, model, Tag.MLP_SUMS)
    for block, packed, out in zip(model.grid.blocks, weights.mlp[layer], gradients.mlp[layer]):
        dweights = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            dnormed.add(stack, block, tilewise.feed_backward(
                model, dy, normed, packed, saved, block, stack, dweights))
        out[...] = dweights.total
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer + 1])


@phase("head", "forward")
def head_forward(
    comm: Communicator, model: Model, x: Array, targets: Array, weights: Parameters
) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats. The logits exist for one block of the vocabulary at a time."""
    normed = tilewise.normalise(model, x, weights.gains[-1])
    triples = AllReduceTiles(comm, model, Tag.HEAD_SUMS, tilewise.merge_triples(model))
    for stack in model.stacks:
        for block, table in zip(model.grid.blocks, weights.head_table):
            comm.progress(block, *stack.place)
            triples.add(stack, block, tilewise.logits(model, normed, table, targets, block, stack))
    losses, saved = tilewise.losses_of(model, triples.totals(), x)
    return mean_loss(comm, model, losses), saved


@phase("head", "backward")
def head_backward(
    comm: Communicator, model: Model, saved: HeadSaved, targets: Array, weights: Parameters, gradients: Parameters,
    dgain: Array
) -> Array:
    """Returns dx [p, B, s, h]; writes the head's gradient and the tiles' gain gradients [p, 2L+1, h]."""
    normed = tilewise.normalise(model, saved.x, weights.gains[-1])
    dnormed = AllReduceTiles(comm, model, Tag.HEAD_SUMS)
    for block, table, out in zip(model.grid.blocks, weights.head_table, gradients.head_table):
        dtable = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            dnormed.add(stack, block, tilewise.logits_backward(
                model, normed, table, targets, saved, block, stack, dtable))
        out[...] = dtable.total
    return tilewise.normalise_backward(model, dnormed.totals(), saved.x, weights.gains[-1], dgain[:, -1])


@phase("loss", "forward")
def mean_loss(comm: Communicator, model: Model, losses: Array) -> float:
    """The mean over all tokens losses [p, 1], the sum of each tile's."""
    total = Tree[Array](range(model.config.tiles))
    total.add_stack(model.grid.slots, losses)
    return model.number(total.total) / model.config.num_tokens


@phase("gains", "backward")
def gains_backward(comm: Communicator, model: Model, dgain: Array, gradients: Parameters) -> None:
    """Writes the gradient of all gains: the sum over tiles of [p, 2L+1, h]."""
    total = Tree[Array](range(model.config.tiles))
    total.add_stack(model.grid.slots, dgain)
    gradients.gains[...] = total.total


@phase("model", "forward")
def model_forward(
    comm: Communicator, model: Model, weights: Parameters, tokens: Array, targets: Array
) -> tuple[float, Saved]:
    """The loss of a batch, and what the backward needs. tokens and targets [p, B, s], of whole numbers."""
    attention, mlp = [], []
    x = embedding_forward(comm, model, tokens, weights)
    for layer in range(model.config.num_layers):
        x, saved = attention_forward(comm, model, x, weights, layer)
        attention.append(saved)
        x, kept = mlp_forward(comm, model, x, weights, layer)
        mlp.append(kept)
        tilewise.forget(model, saved, kept)
    loss, head = head_forward(comm, model, x, targets, weights)
    return loss, Saved(tokens, targets, attention, mlp, head)


@phase("model", "backward")
def model_backward(comm: Communicator, model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss into `gradients`; uses up what was saved, layer by layer."""
    dgain = model.empty("working", len(model.grid.slots), *weights.gains.shape)
    dx = head_backward(comm, model, saved.head, saved.targets, weights, gradients, dgain)
    del saved.head  # which nothing below needs
    for layer in reversed(range(model.config.num_layers)):
        if model.recompute == "full":
            x, saved.attention[-1] = attention_forward(comm, model, saved.attention[-1].x, weights, layer)
            saved.mlp[-1] = mlp_forward(comm, model, x, weights, layer)[1]
            del x  # which from here on only the MLP's backward needs
        dx = mlp_backward(comm, model, dx, saved.mlp.pop(), weights, layer, gradients, dgain)
        if model.recompute == "attention":
            saved.attention[-1] = attention_forward(comm, model, saved.attention[-1].x, weights, layer)[1]
        dx = attention_backward(comm, model, dx, saved.attention.pop(), weights, layer, gradients, dgain)
    embedding_backward(comm, model, dx, saved.tokens, weights, gradients)
    gains_backward(comm, model, dgain, gradients)


@phase("optimizer", "backward")
def gradient_norm(comm: Communicator, model: Model, gradients: Parameters) -> float:
    """The Euclidean norm of all gradients, the same bits on every rank: squares summed over blocks by the tree."""
    partials = model.xp.stack([tilewise.squares(model, gradients, row) for row in range(len(model.grid.blocks))])
    total = all_reduce(comm, model.grid.blocks_of, partials, Tag.GRADIENT_NORM)
    return tilewise.norm_of(model, total, gradients)
