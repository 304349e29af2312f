"""FSDP+SP: weights, gradients and optimizer state are cut as in FSDP (ZeRO-3), over the ranks that cut the sequence.

Every rank holds 1/N of the weights and 1/N of the tokens, as under TSP, and sends the same bytes. What differs is the
grain: a sub-layer's weights are gathered whole before they are used, dropped after, and gathered again in the backward;
keys and values of all heads are exchanged at once; all gradients of a sub-layer are reduced to their owners at its end.
TSP does all this a block at a time. (FSDP: arXiv 2304.11277, ZeRO-3: arXiv 1910.02054, both over the batch; here over
the sequence, a sub-layer a unit. The order of every sum is ours, and so is the exchange as direct messages.)

While a sub-layer works, the weights of the next are in flight: `prefetch` posts them. Gradients in flight are returned
by a backward, to be finished after the next. Beside its 1/N of everything a rank holds two sub-layers' weights whole,
the keys and values of all heads of the whole sequence, and in the backward their gradients, and those of two
sub-layers' weights.

Read beside `reference.single` and `schedules.tsp`: the same functions in the same order.
"""

from __future__ import annotations

from ..accounting.phase import phase
from ..arrays import Array
from ..comm.communicator import Communicator
from ..grid.grid import Place, folded
from ..grid.tree import Tree
from ..model import tilewise
from ..model.activations import AttentionSaved, HeadSaved, MlpSaved, Saved
from ..model.model import Model
from ..model.parameters import Parameters
from ..model.tilewise import BlockSums
from .all_gather import AllGather
from .all_reduce import all_reduce
from .gradients import ReduceToOwner, reduce_scatter
from .keys_values import GatherKeysValues, ScatterKeysValues
from .prefetch import Prefetch, gathers_of_layer, nothing
from .tags import Tag


def place(comm: Communicator) -> tuple[Place, Place]:
    """Where this rank stands on the axis of weights and on that of tokens: both are folded on the same ranks."""
    return folded(comm.rank, comm.size)


@phase("embedding", "forward")
def embedding_forward(
    comm: Communicator, model: Model, tokens: Array, weights: Parameters, prefetch: Prefetch = nothing
) -> Array:
    """tokens [p, B, s], of this rank's tiles -> x [p, B, s, h]."""
    output = BlockSums(model)
    gather = AllGather(comm, model, weights.embedding, Tag.EMBEDDING_WEIGHTS)
    gather.post()
    tables = gather.wait()
    prefetch()
    for block, table in enumerate(tables):
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            output.add(stack, block, tilewise.embed(model, tokens, table, block, stack))
    return tilewise.joined(model, output.totals())


@phase("embedding", "backward")
def embedding_backward(
    comm: Communicator, model: Model, dx: Array, tokens: Array, weights: Parameters, gradients: Parameters
) -> ReduceToOwner:
    """The embedding's gradients in flight to their owners; where the head is tied to it, they are added to the head's.
    The rows are not needed, so nothing is gathered."""
    dtables = []
    for block in range(model.config.blocks):
        dtables.append(Tree[Array](range(model.config.tiles)))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            tilewise.embed_backward(model, dx, tokens, weights.embedding.shape[1:], block, stack, dtables[block])
    return reduce_scatter(comm, model, dtables, gradients.embedding, Tag.EMBEDDING_GRADIENTS, model.config.tied_head)


@phase("attention", "forward")
def attention_forward(
    comm: Communicator, model: Model, x: Array, weights: Parameters, layer: int, gather: AllGather | None = None,
    prefetch: Prefetch = nothing, saved: AttentionSaved | None = None
) -> tuple[Array, AttentionSaved]:
    """x plus the attention of the normed x [p, B, s, h]. When recomputed, the given `saved` is refilled."""
    normed = tilewise.normalise(model, x, weights.gains[2 * layer])
    output, saved = BlockSums(model), saved or AttentionSaved(x)
    gather = gather or AllGather(comm, model, weights.attention[layer], Tag.ATTENTION_WEIGHTS)
    exchange = GatherKeysValues(comm, model, saved.keys_values, list(range(model.config.blocks)))
    gather.post()
    blocks = gather.wait()  # until all of the sub-layer's weights are here
    for block, packed in enumerate(blocks):
        tilewise.make_room_for_heads(model, saved, range(block, block + 1))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            tilewise.project(model, normed, packed, saved, block, stack)
        exchange.post(block + 1)  # Isend this block's keys and values to all, Irecv theirs
    prefetch()  # the weights of the next sub-layer
    for block, packed in enumerate(blocks):
        keys_values = exchange.wait()  # -> [2, B, K/G, S, e]
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            tilewise.attend(model, keys_values, saved, range(block, block + 1), stack)
            output.add(stack, block, tilewise.output(model, packed, saved, block, stack))
        del keys_values  # before the next block's are put together
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("attention", "backward")
def attention_backward(
    comm: Communicator, model: Model, dy: Array, saved: AttentionSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Array, gather: AllGather | None = None, exchange: GatherKeysValues | None = None,
    prefetch: Prefetch = nothing
) -> tuple[Array, ReduceToOwner]:
    """dy [p, B, s, h] -> dx, and the layer's attention gradients in flight; writes the tiles' gain gradients.

    Keys and values travel again. Of all blocks, what this rank's queries give to keys and values is posted to the
    tokens' ranks; then, with what theirs give to this rank's, the weights get their gradients.
    """
    gain, normed = weights.gains[2 * layer], tilewise.normalise(model, saved.x, weights.gains[2 * layer])
    dnormed, scatter = BlockSums(model), ScatterKeysValues(comm, model)
    gather = gather or AllGather(comm, model, weights.attention[layer], Tag.ATTENTION_WEIGHTS)
    exchange = exchange or GatherKeysValues(comm, model, saved.keys_values, list(range(model.config.blocks)))
    exchange.post(model.config.blocks)
    gather.post()
    blocks, dqs, dweights = gather.wait(), [], []
    for block, packed in enumerate(blocks):
        keys_values = exchange.wait()  # -> [2, B, K/G, S, e]
        dq, partials = model.empty("working", *saved.q[block].shape), tilewise.keys_values_tree(model)
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            dq[stack.tiles] = tilewise.attend_backward(
                model, dy, keys_values, [packed], saved, range(block, block + 1), stack, partials)[:, 0]
        scatter.post(block, partials)  # Isend what this rank's queries give to others' keys, Irecv what theirs do
        dqs.append(dq)
        del keys_values, partials  # before the next block's are put together
    prefetch()
    for block, packed in enumerate(blocks):
        dkeys_values, dq = scatter.wait(), dqs.pop(0)
        dweights.append(Tree[Array](range(model.config.tiles)))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            dnormed.add(stack, block, tilewise.project_backward(
                model, dy, dq, dkeys_values, normed, packed, saved, block, stack, dweights[block]))
    reduce = reduce_scatter(comm, model, dweights, gradients.attention[layer], Tag.ATTENTION_GRADIENTS)
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer]), reduce


@phase("mlp", "forward")
def mlp_forward(
    comm: Communicator, model: Model, x: Array, weights: Parameters, layer: int, gather: AllGather | None = None,
    prefetch: Prefetch = nothing
) -> tuple[Array, MlpSaved]:
    """x plus the gated feed-forward of the normed x [p, B, s, h]."""
    normed = tilewise.normalise(model, x, weights.gains[2 * layer + 1])
    output, saved = BlockSums(model), MlpSaved(x)
    gather = gather or AllGather(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS)
    gather.post()
    blocks = gather.wait()  # until all of the sub-layer's weights are here
    prefetch()  # the weights of the next sub-layer
    for block, packed in enumerate(blocks):
        tilewise.make_room_for_projected(model, saved, block)
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            output.add(stack, block, tilewise.feed(model, normed, packed, saved, block, stack))
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("mlp", "backward")
def mlp_backward(
    comm: Communicator, model: Model, dy: Array, saved: MlpSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Array, gather: AllGather | None = None, prefetch: Prefetch = nothing
) -> tuple[Array, ReduceToOwner]:
    """dy [p, B, s, h] -> dx, and the layer's MLP gradients in flight; writes the tiles' gain gradients."""
    gain, normed = weights.gains[2 * layer + 1], tilewise.normalise(model, saved.x, weights.gains[2 * layer + 1])
    dnormed = BlockSums(model)
    gather = gather or AllGather(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS)
    gather.post()
    blocks, dweights = gather.wait(), []
    prefetch()
    for block, packed in enumerate(blocks):
        dweights.append(Tree[Array](range(model.config.tiles)))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            dnormed.add(stack, block, tilewise.feed_backward(
                model, dy, normed, packed, saved, block, stack, dweights[block]))
    reduce = reduce_scatter(comm, model, dweights, gradients.mlp[layer], Tag.MLP_GRADIENTS)
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer + 1]), reduce


@phase("head", "forward")
def head_forward(
    comm: Communicator, model: Model, x: Array, targets: Array, weights: Parameters, gather: AllGather | None = None
) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats, on every rank. The logits exist for one block at a time."""
    normed = tilewise.normalise(model, x, weights.gains[-1])
    triples = BlockSums(model, tilewise.merge_triples(model))
    gather = gather or AllGather(comm, model, weights.head_table, Tag.HEAD_WEIGHTS)
    gather.post()
    tables = gather.wait()
    for block, table in enumerate(tables):
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            triples.add(stack, block, tilewise.logits(model, normed, table, targets, block, stack))
    losses, saved = tilewise.losses_of(model, triples.totals(), x)
    return mean_loss(comm, model, losses), saved


@phase("head", "backward")
def head_backward(
    comm: Communicator, model: Model, saved: HeadSaved, targets: Array, weights: Parameters, gradients: Parameters,
    dgain: Array, prefetch: Prefetch = nothing
) -> tuple[Array, ReduceToOwner]:
    """Returns dx [p, B, s, h], and the head's gradients in flight; writes the tiles' gain gradients."""
    normed = tilewise.normalise(model, saved.x, weights.gains[-1])
    dnormed = BlockSums(model)
    gather = AllGather(comm, model, weights.head_table, Tag.HEAD_WEIGHTS)
    gather.post()
    tables, dtables = gather.wait(), []
    prefetch()
    for block, table in enumerate(tables):
        dtables.append(Tree[Array](range(model.config.tiles)))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            dnormed.add(stack, block, tilewise.logits_backward(
                model, normed, table, targets, saved, block, stack, dtables[block]))
    reduce = reduce_scatter(comm, model, dtables, gradients.head_table, Tag.HEAD_GRADIENTS)
    return tilewise.normalise_backward(model, dnormed.totals(), saved.x, weights.gains[-1], dgain[:, -1]), reduce


@phase("loss", "forward")
def mean_loss(comm: Communicator, model: Model, losses: Array) -> float:
    """The mean over all tokens, on every rank; losses [p, 1], the sum of each tile's."""
    total = all_reduce(comm, model.grid.slots_of, losses, Tag.LOSS)
    return model.number(total) / model.config.num_tokens


@phase("gains", "backward")
def gains_backward(comm: Communicator, model: Model, dgain: Array, gradients: Parameters) -> None:
    """Writes the gradient of all gains, which every rank holds: the sum over tiles of [p, 2L+1, h]."""
    gradients.gains[...] = all_reduce(comm, model.grid.slots_of, dgain, Tag.GAIN_GRADIENTS)


@phase("model", "forward")
def model_forward(
    comm: Communicator, model: Model, weights: Parameters, tokens: Array, targets: Array
) -> tuple[float, Saved]:
    """The loss of a batch, and what the backward needs. tokens and targets [p, B, s], of this rank's tiles."""
    attention, mlp = [], []
    gather = AllGather(comm, model, weights.attention[0], Tag.ATTENTION_WEIGHTS)
    head_gather = AllGather(comm, model, weights.head_table, Tag.HEAD_WEIGHTS)
    x = embedding_forward(comm, model, tokens, weights, prefetch=gather.post)
    for layer in range(model.config.num_layers):
        mlp_gather = AllGather(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS)
        x, saved = attention_forward(comm, model, x, weights, layer, gather, prefetch=mlp_gather.post)
        attention.append(saved)
        prefetch = head_gather.post
        if layer + 1 < model.config.num_layers:
            gather = AllGather(comm, model, weights.attention[layer + 1], Tag.ATTENTION_WEIGHTS)
            prefetch = gather.post
        x, kept = mlp_forward(comm, model, x, weights, layer, mlp_gather, prefetch)
        mlp.append(kept)
        tilewise.forget(model, saved, kept)
    loss, head = head_forward(comm, model, x, targets, weights, head_gather)
    return loss, Saved(tokens, targets, attention, mlp, head)


@phase("model", "backward")
def model_backward(comm: Communicator, model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss, for this rank's blocks, into `gradients`; uses up what was saved."""
    dgain = model.empty("working", len(model.grid.slots), *weights.gains.shape)
    messages_of = [gathers_of_layer(comm, model, weights, saved, layer) for layer in range(model.config.num_layers)]
    prefetch = messages_of[-1].post_first(model.recompute)
    dx, reduce = head_backward(comm, model, saved.head, saved.targets, weights, gradients, dgain, prefetch)
    del saved.head  # which nothing below needs
    for layer in reversed(range(model.config.num_layers)):
        messages, attention = messages_of.pop(), saved.attention[-1]
        if model.recompute != "none":  # before the MLP's backward, under which attention's keys and values then travel
            prefetch = messages.mlp_recomputed.post if model.recompute == "full" else messages.mlp.post
            x = attention_forward(comm, model, attention.x, weights, layer, messages.attention_recomputed, prefetch,
                                  attention)[0]
            if model.recompute == "full":
                saved.mlp[-1] = mlp_forward(
                    comm, model, x, weights, layer, messages.mlp_recomputed, messages.mlp.post)[1]
            del x  # which at most the MLP's backward still needs, and keeps
        dx, reduce_mlp = mlp_backward(
            comm, model, dx, saved.mlp.pop(), weights, layer, gradients, dgain, messages.mlp, messages.post_attention)
        reduce.finish()
        del attention
        prefetch = messages_of[-1].post_first(model.recompute) if messages_of else nothing
        dx, reduce = attention_backward(comm, model, dx, saved.attention.pop(), weights, layer, gradients, dgain,
                                        messages.attention, messages.keys_values, prefetch)
        reduce_mlp.finish()
    reduce_embedding = embedding_backward(comm, model, dx, saved.tokens, weights, gradients)
    reduce.finish()
    gains_backward(comm, model, dgain, gradients)
    reduce_embedding.finish()


@phase("optimizer", "backward")
def gradient_norm(comm: Communicator, model: Model, gradients: Parameters) -> float:
    """The Euclidean norm of all gradients, the same bits on every rank: squares summed over blocks by the tree."""
    partials = model.xp.stack([tilewise.squares(model, gradients, row) for row in range(len(model.grid.blocks))])
    total = all_reduce(comm, model.grid.blocks_of, partials, Tag.GRADIENT_NORM)
    return tilewise.norm_of(model, total, gradients)
