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

from collections import deque

from ..accounting.phase import phase
from ..arrays import Array
from ..comm.mesh import Mesh
from ..grid.grid import Place
from ..grid.tree import Tree
from ..model import tilewise
from ..model.activations import AttentionSaved, HeadSaved, MlpSaved, Saved
from ..model.model import Model
from ..model.parameters import Parameters
from .all_reduce import AllReduceTiles, all_reduce
from .gradients import AllReduceGradients, move_on
from .keys_values import AHEAD, GatherKeysValues, ScatterKeysValues
from .order import broadcast_orders, ring_orders, summed_blocks
from .tags import Tag


def place(mesh: Mesh) -> tuple[Place, Place]:
    """Where this rank stands on the axis of weights and on that of tokens."""
    return Place(mesh.weights.rank, mesh.weights.size), Place(mesh.tokens.rank, mesh.tokens.size)


@phase("embedding", "forward")
def embedding_forward(mesh: Mesh, model: Model, tokens: Array, weights: Parameters) -> Array:
    """tokens [p, B, s] -> x [p, B, s, h]."""
    output = AllReduceTiles(mesh.weights, model, Tag.EMBEDDING_SUMS)
    for stack in model.stacks:
        for block, table in zip(model.grid.blocks, weights.embedding):
            mesh.progress(block, *stack.place)
            output.add(stack, block, tilewise.embed(model, tokens, table, block, stack))
    return tilewise.joined(model, output.totals())


@phase("embedding", "backward")
def embedding_backward(
    mesh: Mesh, model: Model, dx: Array, tokens: Array, weights: Parameters, gradients: Parameters
) -> AllReduceGradients:
    """The embedding's gradient in flight; where the head is tied to it, it is added to what the head has written."""
    orders = ring_orders(summed_blocks(model.grid))
    reduce = AllReduceGradients(mesh.tokens, model, gradients.embedding, orders, Tag.EMBEDDING_GRADIENTS,
                                tied=model.config.tied_head)
    for step, (_, block) in enumerate(orders[mesh.tokens.rank]):
        dtable = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            mesh.progress(block, *stack.place)
            tilewise.embed_backward(model, dx, tokens, weights.embedding.shape[1:], block, stack, dtable)
        reduce.wait(step)
        reduce.receive(step)
        reduce.send(step, dtable)
    return reduce


@phase("attention", "forward")
def attention_forward(
    mesh: Mesh, model: Model, x: Array, weights: Parameters, layer: int
) -> tuple[Array, AttentionSaved]:
    """x plus the attention of the normed x [p, B, s, h].

    Two stages, AHEAD blocks apart: a block of heads is projected, and its keys and values are posted to the other
    tokens' ranks; it is attended with when the next two are projected.
    """
    normed = tilewise.normalise(model, x, weights.gains[2 * layer])
    output, saved = AllReduceTiles(mesh.weights, model, Tag.ATTENTION_SUMS), AttentionSaved(x)
    blocks = dict(zip(model.grid.blocks, weights.attention[layer]))
    gather = GatherKeysValues(mesh.tokens, model, saved.keys_values, list(blocks))
    for step in range(len(blocks) + AHEAD):
        if step < len(blocks):
            block = model.grid.blocks[step]
            tilewise.make_room_for_heads(model, saved, range(block, block + 1))
            for stack in model.stacks:
                mesh.progress(block, *stack.place)
                tilewise.project(model, normed, blocks[block], saved, block, stack)
            gather.post(step + 1)  # Isend this block's keys and values to all, Irecv theirs
        if step >= AHEAD:
            block = model.grid.blocks[step - AHEAD]
            keys_values = gather.wait()  # -> [2, B, K/G, S, e]
            for stack in model.stacks:
                mesh.progress(block, *stack.place)
                tilewise.attend(model, keys_values, saved, range(block, block + 1), stack)
                output.add(stack, block, tilewise.output(model, blocks[block], saved, block, stack))
            del keys_values  # before the next block's are put together
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("attention", "backward")
def attention_backward(
    mesh: Mesh, model: Model, dy: Array, saved: AttentionSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Array
) -> tuple[Array, AllReduceGradients]:
    """dy [p, B, s, h] -> dx, and the layer's attention gradients in flight; writes the tiles' gain gradients.

    Keys and values travel again. Two stages, AHEAD blocks apart: with a block's keys and values the gradients that this
    rank's queries give them are formed, and posted to the tokens' ranks; those of the block's weights are formed when
    they are back from all ranks, and posted to the rank that sums them.
    """
    gain, normed = weights.gains[2 * layer], tilewise.normalise(model, saved.x, weights.gains[2 * layer])
    dnormed = AllReduceTiles(mesh.weights, model, Tag.ATTENTION_SUMS)
    orders = broadcast_orders(summed_blocks(model.grid))
    order, blocks = orders[mesh.tokens.rank], dict(zip(model.grid.blocks, weights.attention[layer]))
    gather = GatherKeysValues(mesh.tokens, model, saved.keys_values, [block for _, block in order])
    scatter = ScatterKeysValues(mesh.tokens, model)
    reduce = AllReduceGradients(mesh.tokens, model, gradients.attention[layer], orders, Tag.ATTENTION_GRADIENTS)
    attended: deque[Array] = deque()
    gather.post()
    for step in range(len(order) + AHEAD):
        if step < len(order):
            _, block = order[step]
            keys_values = gather.wait()  # -> [2, B, K/G, S, e]
            gather.post(step + 1 + AHEAD)
            dq, partials = model.empty("working", *saved.q[block].shape), tilewise.keys_values_tree(model)
            for stack in model.stacks:
                mesh.progress(block, *stack.place)
                dq[stack.tiles] = tilewise.attend_backward(
                    model, dy, keys_values, [blocks[block]], saved, range(block, block + 1), stack, partials)[:, 0]
            scatter.post(block, partials)  # Isend what this rank's queries give to others' keys, Irecv what theirs do
            attended.append(dq)
            del keys_values, partials  # before the next block's are put together
        if step >= AHEAD:
            _, block = order[step - AHEAD]
            dq = attended.popleft()
            dkeys_values, dweights = scatter.wait(), Tree[Array](range(model.config.tiles))
            for stack in model.stacks:
                mesh.progress(block, *stack.place)
                dnormed.add(stack, block, tilewise.project_backward(
                    model, dy, dq, dkeys_values, normed, blocks[block], saved, block, stack, dweights))
            reduce.wait(step - AHEAD)
            reduce.receive(step - AHEAD)
            reduce.send(step - AHEAD, dweights)
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer]), reduce


@phase("mlp", "forward")
def mlp_forward(
    mesh: Mesh, model: Model, x: Array, weights: Parameters, layer: int
) -> tuple[Array, MlpSaved]:
    """x plus the gated feed-forward of the normed x [p, B, s, h]."""
    normed = tilewise.normalise(model, x, weights.gains[2 * layer + 1])
    output, saved = AllReduceTiles(mesh.weights, model, Tag.MLP_SUMS), MlpSaved(x)
    for block in model.grid.blocks:
        tilewise.make_room_for_projected(model, saved, block)
    for stack in model.stacks:
        for block, packed in zip(model.grid.blocks, weights.mlp[layer]):
            mesh.progress(block, *stack.place)
            output.add(stack, block, tilewise.feed(model, normed, packed, saved, block, stack))
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("mlp", "backward")
def mlp_backward(
    mesh: Mesh, model: Model, dy: Array, saved: MlpSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Array
) -> tuple[Array, AllReduceGradients]:
    """dy [p, B, s, h] -> dx, and the layer's MLP gradients in flight; writes the tiles' gain gradients."""
    gain, normed = weights.gains[2 * layer + 1], tilewise.normalise(model, saved.x, weights.gains[2 * layer + 1])
    dnormed, orders = AllReduceTiles(mesh.weights, model, Tag.MLP_SUMS), ring_orders(summed_blocks(model.grid))
    blocks = dict(zip(model.grid.blocks, weights.mlp[layer]))
    reduce = AllReduceGradients(mesh.tokens, model, gradients.mlp[layer], orders, Tag.MLP_GRADIENTS)
    for step, (_, block) in enumerate(orders[mesh.tokens.rank]):
        dweights = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            mesh.progress(block, *stack.place)
            dnormed.add(stack, block, tilewise.feed_backward(
                model, dy, normed, blocks[block], saved, block, stack, dweights))
        reduce.wait(step)
        reduce.receive(step)  # Irecv what another rank computed of a block that this rank sums
        reduce.send(step, dweights)  # Isend what this rank computed of another's
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer + 1]), reduce


@phase("head", "forward")
def head_forward(
    mesh: Mesh, model: Model, x: Array, targets: Array, weights: Parameters
) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats. The logits exist for one block of the vocabulary at a time."""
    normed = tilewise.normalise(model, x, weights.gains[-1])
    triples = AllReduceTiles(mesh.weights, model, Tag.HEAD_SUMS, tilewise.merge_triples(model))
    for stack in model.stacks:
        for block, table in zip(model.grid.blocks, weights.head_table):
            mesh.progress(block, *stack.place)
            triples.add(stack, block, tilewise.logits(model, normed, table, targets, block, stack))
    losses, saved = tilewise.losses_of(model, triples.totals(), x)
    return mean_loss(mesh, model, losses), saved


@phase("head", "backward")
def head_backward(
    mesh: Mesh, model: Model, saved: HeadSaved, targets: Array, weights: Parameters, gradients: Parameters,
    dgain: Array
) -> tuple[Array, AllReduceGradients]:
    """Returns dx [p, B, s, h], and the head's gradient in flight; writes the tiles' gain gradients."""
    normed = tilewise.normalise(model, saved.x, weights.gains[-1])
    dnormed, orders = AllReduceTiles(mesh.weights, model, Tag.HEAD_SUMS), ring_orders(summed_blocks(model.grid))
    tables = dict(zip(model.grid.blocks, weights.head_table))
    reduce = AllReduceGradients(mesh.tokens, model, gradients.head_table, orders, Tag.HEAD_GRADIENTS)
    for step, (_, block) in enumerate(orders[mesh.tokens.rank]):
        table, dtable = tables[block], Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            mesh.progress(block, *stack.place)
            dnormed.add(stack, block, tilewise.logits_backward(
                model, normed, table, targets, saved, block, stack, dtable))
        reduce.wait(step)
        reduce.receive(step)
        reduce.send(step, dtable)
    dx = tilewise.normalise_backward(model, dnormed.totals(), saved.x, weights.gains[-1], dgain[:, -1])
    return dx, reduce


@phase("loss", "forward")
def mean_loss(mesh: Mesh, model: Model, losses: Array) -> float:
    """The mean over all tokens, on every rank, losses [p, 1], the sum of each tile's."""
    total = all_reduce(mesh.tokens, model.grid.slots_of, losses, Tag.LOSS)
    return model.number(total) / model.config.num_tokens


@phase("gains", "backward")
def gains_backward(mesh: Mesh, model: Model, dgain: Array, gradients: Parameters) -> None:
    """Writes the gradient of all gains, which every rank holds: the sum over tiles of [p, 2L+1, h]."""
    gradients.gains[...] = all_reduce(mesh.tokens, model.grid.slots_of, dgain, Tag.GAIN_GRADIENTS)


@phase("model", "forward")
def model_forward(
    mesh: Mesh, model: Model, weights: Parameters, tokens: Array, targets: Array
) -> tuple[float, Saved]:
    """The loss of a batch, and what the backward needs. tokens and targets [p, B, s], of whole numbers."""
    attention, mlp = [], []
    x = embedding_forward(mesh, model, tokens, weights)
    for layer in range(model.config.num_layers):
        x, saved = attention_forward(mesh, model, x, weights, layer)
        attention.append(saved)
        x, kept = mlp_forward(mesh, model, x, weights, layer)
        mlp.append(kept)
        tilewise.forget(model, saved, kept)
    loss, head = head_forward(mesh, model, x, targets, weights)
    return loss, Saved(tokens, targets, attention, mlp, head)


@phase("model", "backward")
def model_backward(mesh: Mesh, model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss into `gradients`; uses up what was saved, layer by layer."""
    dgain = model.empty("working", len(model.grid.slots), *weights.gains.shape)
    dx, reduce = head_backward(mesh, model, saved.head, saved.targets, weights, gradients, dgain)
    del saved.head  # which nothing below needs
    in_flight = [reduce]
    for layer in reversed(range(model.config.num_layers)):
        if model.recompute == "full":
            x, saved.attention[-1] = attention_forward(mesh, model, saved.attention[-1].x, weights, layer)
            saved.mlp[-1] = mlp_forward(mesh, model, x, weights, layer)[1]
            del x  # which from here on only the MLP's backward needs
        dx, reduce = mlp_backward(mesh, model, dx, saved.mlp.pop(), weights, layer, gradients, dgain)
        in_flight = move_on(in_flight, reduce)
        if model.recompute == "attention":
            saved.attention[-1] = attention_forward(mesh, model, saved.attention[-1].x, weights, layer)[1]
        dx, reduce = attention_backward(mesh, model, dx, saved.attention.pop(), weights, layer, gradients, dgain)
        in_flight = move_on(in_flight, reduce)
    reduce = embedding_backward(mesh, model, dx, saved.tokens, weights, gradients)
    in_flight = move_on(in_flight, reduce)
    gains_backward(mesh, model, dgain, gradients)
    while in_flight:
        in_flight = move_on(in_flight)


@phase("optimizer", "backward")
def gradient_norm(mesh: Mesh, model: Model, gradients: Parameters) -> float:
    """The Euclidean norm of all gradients, the same bits on every rank: squares summed over blocks by the tree."""
    partials = model.xp.stack([tilewise.squares(model, gradients, row) for row in range(len(model.grid.blocks))])
    total = all_reduce(mesh.weights, model.grid.blocks_of, partials, Tag.GRADIENT_NORM)
    return tilewise.norm_of(model, total, gradients)
