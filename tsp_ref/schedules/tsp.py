"""TSP: tensor and sequence parallelism folded on one axis. Every rank holds 1/N of the weights and 1/N of the tokens.

Weights come to the tokens: attention blocks are broadcast by each owner in turn, MLP and vocabulary blocks go round a
ring. Between tokens only keys, values and their gradients cross. Gradients of weights go straight to the blocks'
owners. The forward of attention and MLP follows what is known of the paper (arXiv 2604.26294); the backward, the
embedding, the head, the order of every sum, and the transfer block by block, are ours.

What travels is posted early and waited for late. What crosses from a sub-layer to the next is handed on by
`model_forward` and `model_backward`: the next one's ring or broadcast, with `prefetch`, which posts its first messages,
and which a sub-layer calls when it has posted its own last weights, keys and values (on a shared link, what is needed
sooner must be posted sooner); and gradients in flight to their owners, which a backward returns, to be finished after
the next. Beside its 1/N of everything a rank holds the blocks in use and in flight, one block's keys and values of the
whole sequence, with those of the next two as they arrive, and in the backward their gradients alike.

Read beside `reference.single`: the same functions in the same order; what differs is the messages.
"""

from __future__ import annotations

from collections import deque

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
from .all_reduce import all_reduce
from .gradients import ReduceToOwner
from .keys_values import AHEAD, GatherKeysValues, ScatterKeysValues
from .order import owned_blocks, ring_orders
from .prefetch import Prefetch, messages_of_layer, nothing
from .ring import Broadcast, Ring
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
    ring = Ring(comm, model, weights.embedding, Tag.EMBEDDING_WEIGHTS)
    ring.post()
    for step, (_, block) in enumerate(ring.order):
        table = ring.wait(step)
        ring.post()
        if not (ring.to_receive or ring.to_send):
            prefetch()
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            output.add(stack, block, tilewise.embed(model, tokens, table, block, stack))
    ring.finish()
    return tilewise.joined(model, output.totals())


@phase("embedding", "backward")
def embedding_backward(
    comm: Communicator, model: Model, dx: Array, tokens: Array, weights: Parameters, gradients: Parameters
) -> ReduceToOwner:
    """The embedding's gradients in flight to their owners; where the head is tied to it, they are added to the head's.
    The rows are not needed, so no ring circulates: every rank works for the owners in its order."""
    orders, tied = ring_orders(owned_blocks(model.grid)), model.config.tied_head
    reduce = ReduceToOwner(comm, model, gradients.embedding, orders, Tag.EMBEDDING_GRADIENTS, tied=tied)
    for step, (_, block) in enumerate(orders[comm.rank]):
        dtable = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            tilewise.embed_backward(model, dx, tokens, weights.embedding.shape[1:], block, stack, dtable)
        reduce.wait(step)
        reduce.receive(step)
        reduce.send(step, dtable)
    return reduce


@phase("attention", "forward")
def attention_forward(
    comm: Communicator, model: Model, x: Array, weights: Parameters, layer: int, broadcast: Broadcast | None = None,
    prefetch: Prefetch = nothing, saved: AttentionSaved | None = None
) -> tuple[Array, AttentionSaved]:
    """x plus the attention of the normed x [p, B, s, h].

    Two stages, AHEAD blocks apart: a block of heads is projected, and its keys and values are posted to all ranks; they
    are used when the next two are projected. When recomputed, the given `saved` is refilled.
    """
    normed = tilewise.normalise(model, x, weights.gains[2 * layer])
    output, saved = BlockSums(model), saved or AttentionSaved(x)
    broadcast = broadcast or Broadcast(comm, model, weights.attention[layer], Tag.ATTENTION_WEIGHTS)
    gather = GatherKeysValues(comm, model, saved.keys_values, [block for _, block in broadcast.order])
    projected: deque[tuple[int, Array]] = deque()
    for step in range(len(broadcast.order) + AHEAD):
        if step < len(broadcast.order):
            _, block = broadcast.order[step]
            broadcast.post(step + 1 + AHEAD)  # Isend, or Irecv, this and the next two steps' blocks, if not yet posted
            packed = broadcast.wait(step)  # until this block is here
            tilewise.make_room_for_heads(model, saved, range(block, block + 1))
            for stack in model.stacks:
                comm.progress(block, *stack.place)
                tilewise.project(model, normed, packed, saved, block, stack)
            gather.post(step + 1)  # Isend this block's keys and values to all, Irecv theirs
            projected.append((block, packed))
        if step + 1 == len(broadcast.order):
            prefetch()
        if step >= AHEAD:
            block, packed = projected.popleft()
            keys_values = gather.wait()  # -> [2, B, K/G, S, e]
            for stack in model.stacks:
                comm.progress(block, *stack.place)
                tilewise.attend(model, keys_values, saved, range(block, block + 1), stack)
                output.add(stack, block, tilewise.output(model, packed, saved, block, stack))
            del keys_values  # before the next block's are put together
    broadcast.finish()
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("attention", "backward")
def attention_backward(
    comm: Communicator, model: Model, dy: Array, saved: AttentionSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Array, broadcast: Broadcast | None = None, gather: GatherKeysValues | None = None,
    prefetch: Prefetch = nothing
) -> tuple[Array, ReduceToOwner]:
    """dy [p, B, s, h] -> dx, and the layer's attention gradients in flight; writes the tiles' gain gradients.

    Keys and values travel again. Two stages, AHEAD blocks apart: what this rank's queries give to a block's keys and
    values is posted to the tokens' ranks; and with what theirs give to this rank's, the block's weights get gradients.
    """
    gain, normed = weights.gains[2 * layer], tilewise.normalise(model, saved.x, weights.gains[2 * layer])
    dnormed, scatter = BlockSums(model), ScatterKeysValues(comm, model)
    broadcast = broadcast or Broadcast(comm, model, weights.attention[layer], Tag.ATTENTION_WEIGHTS)
    gather = gather or GatherKeysValues(comm, model, saved.keys_values, [block for _, block in broadcast.order])
    reduce = ReduceToOwner(comm, model, gradients.attention[layer], broadcast.orders, Tag.ATTENTION_GRADIENTS)
    attended: deque[tuple[int, Array, Array]] = deque()
    gather.post()
    for step in range(len(broadcast.order) + AHEAD):
        if step < len(broadcast.order):
            _, block = broadcast.order[step]
            broadcast.post(step + 1 + AHEAD)
            packed, keys_values = broadcast.wait(step), gather.wait()  # -> [size of a packed block], [2, B, K/G, S, e]
            gather.post(step + 1 + AHEAD)
            dq, partials = model.empty("working", *saved.q[block].shape), tilewise.keys_values_tree(model)
            for stack in model.stacks:
                comm.progress(block, *stack.place)
                dq[stack.tiles] = tilewise.attend_backward(
                    model, dy, keys_values, [packed], saved, range(block, block + 1), stack, partials)[:, 0]
            scatter.post(block, partials)  # Isend what this rank's queries give to others' keys, Irecv what theirs do
            attended.append((block, packed, dq))
            del keys_values, partials  # before the next block's are put together
        if step + 1 == len(broadcast.order):
            prefetch()
        if step >= AHEAD:
            block, packed, dq = attended.popleft()
            dkeys_values, dweights = scatter.wait(), Tree[Array](range(model.config.tiles))
            for stack in model.stacks:
                comm.progress(block, *stack.place)
                dnormed.add(stack, block, tilewise.project_backward(
                    model, dy, dq, dkeys_values, normed, packed, saved, block, stack, dweights))
            reduce.wait(step - AHEAD)
            reduce.receive(step - AHEAD)  # Irecv what the others have computed of this rank's block
            reduce.send(step - AHEAD, dweights)  # Isend what this rank has computed of another's
    broadcast.finish()
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer]), reduce


@phase("mlp", "forward")
def mlp_forward(
    comm: Communicator, model: Model, x: Array, weights: Parameters, layer: int, ring: Ring | None = None,
    prefetch: Prefetch = nothing
) -> tuple[Array, MlpSaved]:
    """x plus the gated feed-forward of the normed x [p, B, s, h]."""
    normed = tilewise.normalise(model, x, weights.gains[2 * layer + 1])
    output, saved = BlockSums(model), MlpSaved(x)
    ring = ring or Ring(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS)
    ring.post()
    for step, (_, block) in enumerate(ring.order):
        packed = ring.wait(step)  # until this block is here
        ring.post()  # Irecv another from the left; when the last send is over, Isend what the right needs next
        if not (ring.to_receive or ring.to_send):
            prefetch()  # the first blocks of the next sub-layer
        tilewise.make_room_for_projected(model, saved, block)
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            output.add(stack, block, tilewise.feed(model, normed, packed, saved, block, stack))
    ring.finish()
    return tilewise.add_residual(model, x, output.totals()), saved


@phase("mlp", "backward")
def mlp_backward(
    comm: Communicator, model: Model, dy: Array, saved: MlpSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Array, ring: Ring | None = None, prefetch: Prefetch = nothing
) -> tuple[Array, ReduceToOwner]:
    """dy [p, B, s, h] -> dx, and the layer's MLP gradients in flight; writes the tiles' gain gradients."""
    gain, normed = weights.gains[2 * layer + 1], tilewise.normalise(model, saved.x, weights.gains[2 * layer + 1])
    dnormed = BlockSums(model)
    ring = ring or Ring(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS)
    reduce = ReduceToOwner(comm, model, gradients.mlp[layer], ring.orders, Tag.MLP_GRADIENTS)
    ring.post()
    for step, (_, block) in enumerate(ring.order):
        packed = ring.wait(step)
        ring.post()
        if not (ring.to_receive or ring.to_send):
            prefetch()
        dweights = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            dnormed.add(stack, block, tilewise.feed_backward(
                model, dy, normed, packed, saved, block, stack, dweights))
        reduce.wait(step)  # for the oldest gradients in flight, to make room
        reduce.receive(step)  # Irecv what another rank has computed of this rank's block
        reduce.send(step, dweights)  # Isend what this rank has computed of another's
    ring.finish()
    return tilewise.add_residual_backward(model, dy, dnormed.totals(), saved.x, gain, dgain[:, 2 * layer + 1]), reduce


@phase("head", "forward")
def head_forward(
    comm: Communicator, model: Model, x: Array, targets: Array, weights: Parameters, ring: Ring | None = None
) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats, on every rank. The logits exist for one block at a time."""
    normed = tilewise.normalise(model, x, weights.gains[-1])
    triples = BlockSums(model, tilewise.merge_triples(model))
    ring = ring or Ring(comm, model, weights.head_table, Tag.HEAD_WEIGHTS)
    ring.post()
    for step, (_, block) in enumerate(ring.order):
        table = ring.wait(step)
        ring.post()
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            triples.add(stack, block, tilewise.logits(model, normed, table, targets, block, stack))
    ring.finish()
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
    ring = Ring(comm, model, weights.head_table, Tag.HEAD_WEIGHTS)
    reduce = ReduceToOwner(comm, model, gradients.head_table, ring.orders, Tag.HEAD_GRADIENTS)
    ring.post()
    for step, (_, block) in enumerate(ring.order):
        table = ring.wait(step)
        ring.post()
        if not (ring.to_receive or ring.to_send):
            prefetch()
        dtable = Tree[Array](range(model.config.tiles))
        for stack in model.stacks:
            comm.progress(block, *stack.place)
            dnormed.add(stack, block, tilewise.logits_backward(
                model, normed, table, targets, saved, block, stack, dtable))
        reduce.wait(step)
        reduce.receive(step)
        reduce.send(step, dtable)
    ring.finish()
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
    broadcast = Broadcast(comm, model, weights.attention[0], Tag.ATTENTION_WEIGHTS)
    head_ring = Ring(comm, model, weights.head_table, Tag.HEAD_WEIGHTS)
    x = embedding_forward(comm, model, tokens, weights, prefetch=broadcast.post)
    for layer in range(model.config.num_layers):
        ring = Ring(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS)
        x, saved = attention_forward(comm, model, x, weights, layer, broadcast, prefetch=ring.post)
        attention.append(saved)
        prefetch = head_ring.post
        if layer + 1 < model.config.num_layers:
            broadcast = Broadcast(comm, model, weights.attention[layer + 1], Tag.ATTENTION_WEIGHTS)
            prefetch = broadcast.post
        x, kept = mlp_forward(comm, model, x, weights, layer, ring, prefetch)
        mlp.append(kept)
        tilewise.forget(model, saved, kept)
    loss, head = head_forward(comm, model, x, targets, weights, head_ring)
    return loss, Saved(tokens, targets, attention, mlp, head)


@phase("model", "backward")
def model_backward(comm: Communicator, model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss, for this rank's blocks, into `gradients`; uses up what was saved."""
    dgain = model.empty("working", len(model.grid.slots), *weights.gains.shape)
    messages_of = [messages_of_layer(comm, model, weights, saved, layer) for layer in range(model.config.num_layers)]
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
