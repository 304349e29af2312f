"""What a rank does to its own tiles and blocks without any message: the same in the reference and in every schedule.

Each function takes one stack of tiles through the maths of one block, or all of a rank's tiles through a norm. The
loops over blocks and stacks stand in the sub-layers, where what travels meanwhile is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from ..arrays import Array
from ..grid.grid import Stack
from ..grid.tree import Tree, add
from ..ops import attention, embedding, loss, mlp, norm, projection
from .activations import AttentionSaved, Heads, HeadSaved, MlpSaved
from .model import Model
from .parameters import Parameters, attention_views, bias_view, mlp_views


class BlockSums:
    """The sums over blocks of what each stack of tiles gives with each: a tree for every stack."""

    def __init__(self, model: Model, merge: Callable[[Array, Array], Array] = add) -> None:
        self.trees = {stack.number: Tree[Array](range(model.config.blocks), merge) for stack in model.stacks}

    def add(self, stack: Stack, block: int, leaf: Array) -> None:
        """What a stack gives with a block."""
        self.trees[stack.number].add(block, leaf)

    def totals(self) -> list[Array]:
        """The totals, stack by stack, once all blocks are in; they are the caller's alone."""
        totals = [tree.total for tree in self.trees.values()]
        self.trees.clear()
        return totals


class Normed(NamedTuple):
    """What a sub-layer's norm hands to its blocks: the normed input of all tiles, and, of an attention whose heads are
    normed, how."""

    x: Array  # [p, B, s, h]
    heads: projection.HeadNorm | None


def normalise(model: Model, x: Array, gain: Array) -> Normed:
    """RMSNorm of all tiles x [p, B, s, h] with a row of the gains; the backward recomputes it rather than keep it."""
    hidden, eps = model.config.hidden_size, model.config.norm_eps
    y = model.empty("working", *x.shape)
    for stack in model.stacks:
        norm.rmsnorm_forward(model.xp, x[stack.tiles], gain[:hidden], eps, out=y[stack.tiles])
    return Normed(y, projection.HeadNorm(gain[hidden:].reshape(2, -1), eps) if model.config.qk_norm else None)


def normalise_backward(model: Model, dy: list[Array], x: Array, gain: Array, dgain: Array) -> Array:
    """dx [p, B, s, h] from dy stack by stack, which is used up; each tile's gradient of the gain goes into its row of
    dgain [p, length of a row of gains]."""
    hidden, dx = model.config.hidden_size, model.empty("working", *x.shape)
    for stack in model.stacks:
        dnormed, dgains_of_heads = apart(model, dy.pop(0), x[stack.tiles].shape)
        _, dgain[stack.tiles, :hidden] = norm.rmsnorm_backward(
            model.xp, dnormed, x[stack.tiles], gain[:hidden], model.config.norm_eps, out=dx[stack.tiles])
        if model.config.qk_norm:
            dgain[stack.tiles, hidden:] = dgains_of_heads
    return dx


def together(model: Model, dnormed: Array, dgains: Array) -> Array:
    """A stack's gradients of its normed input [p, B, s, h] and of the gains of queries and keys [p, 2, e] as one row
    for each tile: both are sums over blocks, so they are summed, and travel, as one."""
    return model.xp.concatenate([part.reshape(len(part), -1) for part in (dnormed, dgains)], axis=1)


def apart(model: Model, dy: Array, shape: tuple[int, ...]) -> tuple[Array, Array | float]:
    """The sums over blocks of what `together` has put together: the gradient of the normed input, of this shape, and
    those of the gains [p, 2e]; no gradient, 0, where only the former was summed."""
    if dy.ndim == len(shape):
        return dy, 0.0
    gains = 2 * model.config.head_dim
    return model.xp.ascontiguousarray(dy[:, :-gains]).reshape(shape), dy[:, -gains:]


def add_residual(model: Model, x: Array, y: list[Array]) -> Array:
    """x plus a sub-layer's output, which is given stack by stack and used up: a new array [p, B, s, h]."""
    total = model.empty("activations", *x.shape)
    for stack in model.stacks:
        model.xp.add(x[stack.tiles], y.pop(0), out=total[stack.tiles])
    return total


def add_residual_backward(model: Model, dy: Array, dnormed: list[Array], x: Array, gain: Array, dgain: Array) -> Array:
    """dx [p, B, s, h] of x plus a sub-layer of the normed x: dy, and what comes back through the norm from dnormed,
    which is given stack by stack and used up; each tile's gradient of the gain goes into its row of dgain [p, h]."""
    dx = normalise_backward(model, dnormed, x, gain, dgain)
    dx += dy
    return dx


def joined(model: Model, y: list[Array]) -> Array:
    """What is given stack by stack, as one array [p, ...] that is kept."""
    whole = model.empty("activations", len(model.grid.slots), *y[0].shape[1:])
    for stack in model.stacks:
        whole[stack.tiles] = y[stack.number]
    return whole


def embed(model: Model, tokens: Array, table: Array, block: int, stack: Stack) -> Array:
    """A stack's rows of a block of the embedding [p, B, s, h]."""
    return embedding.embed_forward(model.xp, tokens[stack.tiles], table, block * len(table))


def embed_backward(
    model: Model, dx: Array, tokens: Array, shape: tuple[int, ...], block: int, stack: Stack, dtable: Tree[Array]
) -> None:
    """Adds to `dtable` the gradients that a stack's tiles give to a block of the embedding, of this shape."""
    leaves = model.empty("working", len(stack.slots), *shape)  # [p, V/G, h]
    embedding.embed_backward(model.xp, dx[stack.tiles], tokens[stack.tiles], block * shape[0], out=leaves)
    dtable.add_stack(stack.slots, leaves)


def make_room_for_heads(model: Model, saved: AttentionSaved, blocks: range) -> None:
    """Make room for what some blocks of heads keep of this rank's tiles: for one, or for all that it attends with."""
    config, count = model.config, len(model.grid.slots)
    batch, kv_heads, length, head_dim = (
        config.batch_size, config.kv_heads_per_block, config.tile_len, config.head_dim)
    rows = count, len(blocks), batch, kv_heads, config.group_size * length
    kept = Heads(blocks, model.empty("activations", count, 2, len(blocks), batch, kv_heads, length, head_dim),
                 *(model.empty("activations", *rows, width) for width in (head_dim, head_dim, 1)))
    if len(blocks) > 1:
        saved.together = kept
    for number, block in enumerate(blocks):
        saved.keys_values[block] = kept.keys_values[:, :, number]
        saved.q[block], saved.heads[block] = kept.q[:, number], kept.heads[:, number]
        saved.logsumexp[block] = kept.logsumexp[:, number]


def project(model: Model, normed: Normed, packed: Array, saved: AttentionSaved, block: int, stack: Stack) -> None:
    """A stack's queries, keys and values with a block of heads, written where they are kept."""
    tiles = stack.tiles
    wqkv, _ = attention_views(model.config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
    projection.qkv_forward(model.xp, normed.x[tiles], wqkv, model.rotary[tiles],
                           out=(saved.q[block][tiles], saved.keys_values[block][tiles]),
                           bias=bias_view(model.config, packed), norm=normed.heads)


def project_backward(
    model: Model, dy: Array, dq: Array, dkeys_values: Array, normed: Normed, packed: Array, saved: AttentionSaved,
    block: int, stack: Stack, dweights: Tree[Array]
) -> Array:
    """A stack's gradient of the normed input [p, B, s, h], from dq [p, B, K/G, g·s, e] and dkeys_values
    [p, 2, B, K/G, s, e] of all tiles; its tiles' gradients of the block, wo's too, are added to `dweights`. Where heads
    are normed, the gradients of their gains come with it, as `together` puts them."""
    config, tiles = model.config, stack.tiles
    wqkv, _ = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
    leaves = model.empty("working", len(stack.slots), packed.size)
    dwqkv, dwo = attention_views(config, leaves)  # -> [p, h, (H+2*K)/G*e], [p, H/G*e, h]
    bias, dbias = bias_view(config, packed), bias_view(config, leaves)
    dgains = None if normed.heads is None else model.empty("working", len(stack.slots), *normed.heads.gains.shape)
    dnormed = projection.qkv_backward(
        model.xp, dq[tiles], dkeys_values[tiles], normed.x[tiles], wqkv, model.rotary[tiles], out=dwqkv,
        bias=None if bias is None or dbias is None else (bias, dbias),
        norm=None if normed.heads is None or dgains is None else (normed.heads, dgains))
    attention.out_backward_weight(model.xp, dy[tiles], saved.heads[block][tiles], out=dwo)
    dweights.add_stack(stack.slots, leaves)
    return dnormed if dgains is None else together(model, dnormed, dgains)


def attend(model: Model, keys_values: Array, saved: AttentionSaved, blocks: range, stack: Stack) -> None:
    """A stack's attention, with some blocks of heads, to the keys and values of the whole sequence
    [2, m·B, K/G, S, e]; the heads' output is written where it is kept."""
    kept, visible = saved.of_blocks(blocks), [model.grid.visible(slot) for slot in stack.slots]
    q, heads, logsumexp = (flat(x[stack.tiles]) for x in (kept.q, kept.heads, kept.logsumexp))
    attention.attend_forward(model.xp, q, keys_values, visible, model.mask, out=(heads, logsumexp))


def output(model: Model, packed: Array, saved: AttentionSaved, block: int, stack: Stack) -> Array:
    """A stack's term of the attention's output with a block [p, B, s, h]."""
    _, wo = attention_views(model.config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
    return attention.out_forward(model.xp, saved.heads[block][stack.tiles], wo, model.config.tile_len)


def attend_backward(
    model: Model, dy: Array, keys_values: Array, packed: Iterable[Array], saved: AttentionSaved, blocks: range,
    stack: Stack, dkeys_values: Tree[Array]
) -> Array:
    """A stack's dq with some blocks [p, m, B, K/G, g·s, e]; what each tile gives to the keys and values that it sees
    [2, m·B, K/G, n, e] is added to `dkeys_values`."""
    kept, visible = saved.of_blocks(blocks), [model.grid.visible(slot) for slot in stack.slots]
    q, heads, logsumexp = (x[stack.tiles] for x in (kept.q, kept.heads, kept.logsumexp))
    dheads = model.xp.empty_like(q)  # [p, m, B, K/G, g*s, e]
    for number, block in enumerate(packed):
        _, wo = attention_views(model.config, block)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
        dheads[:, number] = attention.out_backward(model.xp, dy[stack.tiles], heads[:, number], wo)
    dq, given = attention.attend_backward(
        model.xp, flat(dheads), flat(q), keys_values, visible, model.mask, flat(heads), flat(logsumexp), len(blocks))
    for slot, gradient in zip(stack.slots, given):
        dkeys_values.add(slot, gradient)
    return dq.reshape(q.shape)  # [p, m*B, K/G, g*s, e] -> [p, m, B, K/G, g*s, e]


def flat(x: Array) -> Array:
    """Blocks and sequences as one axis: [p, m, B, ...] -> [p, m·B, ...]."""
    return x.reshape(len(x), -1, *x.shape[3:])


def keys_values_tree(model: Model) -> Tree[Array]:
    """The sum over all tiles of queries of what each gives to the keys and values that it sees."""
    return Tree[Array](range(model.config.tiles), attention.add_keys)


def in_order_of_text(model: Model, tiles_of: dict[int, Array]) -> Array:
    """Keys and values of the whole sequence [2, m·B, K/G, S, e] from those of the ranks' tiles: place on the axis of
    tokens -> [p, 2, m·B, K/G, s, e]."""
    config, grid = model.config, model.grid
    _, _, batch, kv_heads, length, head_dim = next(iter(tiles_of.values())).shape
    shape = 2, batch, kv_heads, config.tiles, length, head_dim
    by_tile = model.empty("buffers" if len(tiles_of) > 1 else "working", *shape)  # [2, m*B, K/G, T, s, e]
    for place, tiles in tiles_of.items():
        by_tile[:, :, :, grid.tiles_of(place)] = tiles.transpose(1, 2, 3, 0, 4, 5)
    return by_tile.reshape(*shape[:3], config.seq_len, head_dim)  # -> [2, m*B, K/G, S, e]


def keys_values_of(model: Model, saved: AttentionSaved, blocks: range) -> Array:
    """Those of some blocks, for one who holds all tiles [2, m·B, K/G, S, e]."""
    kept = saved.of_blocks(blocks).keys_values
    return in_order_of_text(model, {0: kept.reshape(*kept.shape[:2], -1, *kept.shape[4:])})


def in_order_of_slots(model: Model, whole: Array) -> Array:
    """The other way round, for one who holds all tiles: [2, m·B, K/G, S, e] -> [p, 2, m, B, K/G, s, e]."""
    config = model.config
    by_tile = whole.reshape(2, -1, config.batch_size, config.kv_heads_per_block, config.tiles, config.tile_len,
                            config.head_dim)  # -> [2, m, B, K/G, T, s, e]
    return by_tile[:, :, :, :, model.grid.tiles_of(0)].transpose(4, 0, 1, 2, 3, 5, 6)  # -> [p, 2, m, B, K/G, s, e]


def make_room_for_projected(model: Model, saved: MlpSaved, block: int) -> None:
    """Make room for what a block of the MLP keeps of this rank's tiles."""
    config = model.config
    tokens, width = config.batch_size * config.tile_len, 2 * config.ffn_size // config.blocks
    saved.projected[block] = model.empty("activations", len(model.grid.slots), tokens, width)  # [p, B*s, 2*f/G]


def feed(model: Model, normed: Normed, packed: Array, saved: MlpSaved, block: int, stack: Stack) -> Array:
    """A stack's term of the MLP's output with a block [p, B, s, h]."""
    gate_up, down = mlp_views(model.config, packed)  # -> [h, 2*f/G], [f/G, h]
    return mlp.swiglu_forward(model.xp, normed.x[stack.tiles], gate_up, down, out=saved.projected[block][stack.tiles])


def feed_backward(
    model: Model, dy: Array, normed: Normed, packed: Array, saved: MlpSaved, block: int, stack: Stack,
    dweights: Tree[Array]
) -> Array:
    """A stack's gradient of the normed input [p, B, s, h]; its tiles' gradients of the block are added to `dweights`.
    """
    gate_up, down = mlp_views(model.config, packed)  # -> [h, 2*f/G], [f/G, h]
    leaves = model.empty("working", len(stack.slots), packed.size)
    dnormed = mlp.swiglu_backward(
        model.xp, dy[stack.tiles], normed.x[stack.tiles], gate_up, down, saved.projected[block][stack.tiles],
        out=mlp_views(model.config, leaves))
    dweights.add_stack(stack.slots, leaves)
    return dnormed


def logits(model: Model, normed: Normed, table: Array, targets: Array, block: int, stack: Stack) -> Array:
    """The triples [p, 3, B·s] of a stack's logits with a block of the head, of the rows that are a token's."""
    return loss.logits_forward(
        model.xp, normed.x[stack.tiles], table[: model.config.tokens_in_block(block)], targets[stack.tiles],
        block * len(table))


def logits_backward(
    model: Model, normed: Normed, table: Array, targets: Array, saved: HeadSaved, block: int, stack: Stack,
    dtable: Tree[Array]
) -> Array:
    """A stack's gradient of the normed input [p, B, s, h], of the mean loss; its tiles' gradients of the block, zeros
    for rows that are no token's, are added to `dtable`."""
    tiles, rows = stack.tiles, model.config.tokens_in_block(block)
    leaves = model.empty("working", len(stack.slots), *table.shape)  # [p, V/G, h]
    leaves[:, rows:] = 0.0
    dnormed = loss.logits_backward(
        model.xp, 1.0 / model.config.num_tokens, normed.x[tiles], table[:rows], targets[tiles], block * len(table),
        saved.logsumexp[tiles], out=leaves[:, :rows])
    dtable.add_stack(stack.slots, leaves)
    return dnormed


def merge_triples(model: Model) -> Callable[[Array, Array], Array]:
    """The tree's operation for the head's triples."""
    return partial(loss.merge_triples, model.xp)


def losses_of(model: Model, triples: list[Array], x: Array) -> tuple[Array, HeadSaved]:
    """The sum of each tile's losses [p, 1], from the triples of all blocks, stack by stack; and what the head keeps."""
    tokens = model.config.batch_size * model.config.tile_len
    losses = model.empty("working", len(model.grid.slots), 1)
    saved = HeadSaved(x, model.empty("activations", len(model.grid.slots), tokens))
    for stack in model.stacks:
        of_tokens, saved.logsumexp[stack.tiles] = loss.token_losses(model.xp, triples[stack.number])
        losses[stack.tiles] = model.xp.sum(of_tokens, axis=-1, keepdims=True)  # [p, B*s] -> [p, 1]
    return losses, saved


def squares(model: Model, gradients: Parameters, position: int) -> Array:
    """The sum of squares of each tensor's block at `position` among those that this rank holds: [number of tensors]."""
    blocks = [tensor[position].reshape(-1) for _, tensor in gradients.tensors()]
    return model.xp.stack([model.xp.vdot(block, block) for block in blocks])


def norm_of(model: Model, squares_of_tensors: Array, gradients: Parameters) -> float:
    """The Euclidean norm of all gradients, from the sums of squares of all tensors but the gains [number of
    tensors]."""
    xp, gains = model.xp, gradients.gains
    return model.number(xp.sqrt(xp.sum(squares_of_tensors) + xp.sum(gains * gains)))


def forget(model: Model, attention: AttentionSaved, mlp: MlpSaved) -> None:
    """Drop of a layer what the backward will recompute."""
    if model.recompute != "none":
        attention.keep_input_only()
    if model.recompute == "full":
        mlp.keep_nothing()
