"""Grouped-query causal attention for one block of heads and a stack of tiles of queries.

The g query heads that share a key/value head are stacked as g·s rows under it, so keys are never repeated and each
product is one matrix multiplication per key/value head. Each tile sees another number n of keys, so what meets keys is
done tile by tile; all else for the whole stack. Sources: grouped queries, arXiv 2305.13245; a backward that needs only
the log-sum-exp of the scores, FlashAttention, arXiv 2205.14135.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

from ..arrays import Array, Namespace

STRIP = 128
"""Queries of a strip in the forward, at most: more scores do not fit the cache, fewer make the matrix products slower
(chosen by measurement)."""

CHUNK_BYTES = 512 * 1024
"""Of a chunk of scores in the backward: with its gradient it fits the second-level cache of most processors (chosen by
measurement)."""

DIAGONAL = 64
"""Keys of a chunk of the tile itself, in the backward: of its scores few are masked (chosen by measurement)."""


PADDED_BYTES = 128 * 1024
"""Of the scores of several tiles that are padded to be worked on together, at most: where a call costs more than what
it works on (chosen by measurement)."""


def causal_mask(xp: Namespace, length: int, dtype: str) -> Array:
    """What to add to the scores of a tile against itself [s, s]: 0 for a key at or before its query, else -inf."""
    return xp.triu(xp.full((length, length), -xp.inf, dtype=dtype), 1)  # [s, s]


@lru_cache
def strips(length: int) -> tuple[slice, ...]:
    """A tile's queries cut in strips of at most STRIP, the last as long as the others or a little shorter: a strip
    needs no key after its last query, so that less of a long tile is computed only to be masked."""
    step = math.ceil(length / math.ceil(length / STRIP))
    return tuple(slice(first, min(first + step, length)) for first in range(0, length, step))


def of_queries(x: Array, queries: slice, length: int) -> Array:
    """The rows of x [..., g·s, e] that belong to some of a tile's `length` queries, of each query head: a view
    [..., g, t, e]."""
    return x.reshape(*x.shape[:-2], -1, length, x.shape[-1])[..., queries, :]


def rows_of(x: Array, queries: slice, length: int) -> Array:
    """The same as rows [..., g·t, e]: x itself where these are all of its queries."""
    if queries.stop - queries.start == length:
        return x
    return of_queries(x, queries, length).reshape(*x.shape[:-2], -1, x.shape[-1])


def attend_forward(
    xp: Namespace, q: Array, keys_values: Array, visible: Sequence[int], mask: Array, out: tuple[Array, Array]
) -> None:
    """The attention of each tile to the keys that it sees: one softmax over all of them.

    q [p, B, K/G, g·s, e]; keys and values of the whole sequence [2, B, K/G, S, e], of which tile i sees the first
    visible[i]; mask [s, s]. Into `out` go the heads' output [p, B, K/G, g·s, e] and the log-sum-exp of each query's
    scores [p, B, K/G, g·s, 1].
    """
    heads, logsumexp = out
    length, group = mask.shape[0], q.shape[3] // mask.shape[0]
    scaled = q * q.shape[-1] ** -0.5
    total = xp.empty_like(logsumexp)
    for strip in strips(length):
        seen = [last - length + strip.stop for last in visible]
        of_strip = xp.concatenate([mask[strip, strip]] * group)  # [t, t] -> [g*t, t]
        for tiles in padded_together(q, seen):
            found = attend_strip(
                xp, [rows_of(scaled[tile], strip, length) for tile in tiles], keys_values,
                [seen[tile] for tile in tiles], of_strip)
            for whole, rows in zip((heads, logsumexp, total), found):
                write_rows(whole, tiles, strip, length, rows)
    heads /= total
    logsumexp += xp.log(total)


def attend_strip(
    xp: Namespace, q: list[Array], keys_values: Array, seen: list[int], mask: Array
) -> tuple[Array, Array, Array]:
    """One softmax for each of some tiles, over all keys that a strip of its queries sees: products and sums are of a
    tile's own keys; what goes by elements is done for all tiles at once, padded to the widest.

    q [B, K/G, g·t, e] of each tile, scaled; mask [g·t, t] -> the heads' output before its division [p, B, K/G, g·t, e],
    each row's largest score, and its sum of exp(score - largest) [p, B, K/G, g·t, 1]. (`einsum` sums short rows faster
    than `sum`.)
    """
    keys, values = keys_values[0].swapaxes(-1, -2), keys_values[1]  # -> [B, K/G, e, S], [B, K/G, S, e]
    probs = xp.empty((len(q), *q[0].shape[:-1], max(seen)), dtype=q[0].dtype)  # [p, B, K/G, g*t, n]
    if min(seen) < max(seen):
        probs[...] = -xp.inf  # where a tile sees less than the widest
    for rows, scores, last in zip(q, probs, seen):
        attention_scores(xp, rows, keys[..., :last], mask, out=scores[..., :last])
    largest = probs.max(axis=-1, keepdims=True)  # [p, B, K/G, g*t, n] -> [p, B, K/G, g*t, 1]
    probs -= largest
    xp.exp(probs, out=probs)
    heads = xp.empty((len(q), *q[0].shape), dtype=q[0].dtype)  # [p, B, K/G, g*t, e]
    total = xp.empty_like(largest)
    for found, sums, weights, last in zip(heads, total, probs, seen):
        sums[..., 0] = xp.einsum("bkqn->bkq", weights[..., :last])
        xp.matmul(weights[..., :last], values[:, :, :last], out=found)
    return heads, largest, total


def write_rows(x: Array, tiles: list[int], queries: slice, length: int, rows: Array) -> None:
    """Put rows [p, B, K/G, g·t, ...] in the place of some tiles' queries in x [p, B, K/G, g·s, ...]."""
    if queries.stop - queries.start == length:
        x[tiles] = rows
        return
    of_head = x.reshape(*x.shape[:3], -1, length, x.shape[-1])  # [p, B, K/G, g*s, ...] -> [p, B, K/G, g, s, ...]
    of_head[tiles, ..., queries, :] = rows.reshape(len(tiles), *of_head.shape[1:4], -1, x.shape[-1])


def attention_scores(xp: Namespace, q: Array, keys: Array, mask: Array, out: Array) -> None:
    """Masked scores of a strip's scaled queries [B, K/G, g·t, e] against all keys up to its last [B, K/G, e, n], into
    `out` [B, K/G, g·t, n].

    Only the last t columns, the strip against itself, need the mask [g·t, t]: all keys before the strip are visible.
    """
    xp.matmul(q, keys, out=out)
    out[..., -mask.shape[1] :] += mask


def padded_together(q: Array, seen: Sequence[int]) -> list[list[int]]:
    """The tiles of a stack q [p, B, K/G, g·s, e] in groups to be taken at a time, so that scores padded to the widest
    of a group have at most PADDED_BYTES. Tiles that see nearly as many keys are taken together: little is padded."""
    each = math.prod(q.shape[1:4]) * q.dtype.itemsize
    groups: list[list[int]] = []
    for tile in sorted(range(len(seen)), key=seen.__getitem__):
        if groups and each * seen[tile] * (len(groups[-1]) + 1) <= PADDED_BYTES:
            groups[-1].append(tile)
        else:
            groups.append([tile])
    return groups


def add_mask(scores: Array, mask: Array, length: int) -> None:
    """Add the mask [w, w] in place to scores [..., g·r, c] of `length` queries r of each head: to the first w against
    the last w keys."""
    width = mask.shape[0]
    by_head = scores.reshape(*scores.shape[:-2], -1, length, scores.shape[-1])  # [..., g*r, c] -> [..., g, r, c]
    by_head[..., :width, -width:] += mask


def with_column(xp: Namespace, x: Array, column: Array | float) -> Array:
    """x [..., n, e] with one more column."""
    wider = xp.empty((*x.shape[:-1], x.shape[-1] + 1), dtype=x.dtype)  # [..., e+1]
    wider[..., :-1] = x
    wider[..., -1:] = column
    return wider


def attend_backward(
    xp: Namespace, dheads: Array, q: Array, keys_values: Array, visible: Sequence[int], mask: Array, heads: Array,
    logsumexp: Array, blocks: int = 1
) -> tuple[Array, list[Array]]:
    """The softmax is recomputed from its log-sum-exp, so no [g·s, n] array is ever kept, nor made: the work goes by
    chunks of keys that fit the cache. The plain form, with p the softmax, and all of it at once:

        dv = pᵀ dheads,  dscores = p * (dheads vᵀ - rows of <dheads, heads>) / √e,  dq = dscores k,  dk = dscoresᵀ q

    What is subtracted from each row of a product is one more column of its left factor, and of its right one a column
    of ones: so it costs no pass over the result. A tile's keys before its own are met tile by tile, its own by all
    tiles of the stack at once: of those each sees as many.

    dheads [p, B, K/G, g·s, e] -> dq [p, B, K/G, g·s, e] and, for each tile, dk and dv [2, B, K/G, n, e]. B may be the
    sequences of several `blocks`: the chunks, and so the bits, are those of one.
    """
    length, scale = mask.shape[0], q.shape[-1] ** -0.5
    scaled = q * scale
    # A softmax passes on only what differs from the weighted mean of its gradient, which is <dheads, heads>.
    mean = xp.einsum("pbkqe,pbkqe->pbkq", dheads, heads)[..., None]  # [p, B, K/G, g*s, e] -> [p, B, K/G, g*s, 1]
    queries = with_column(xp, scaled, -logsumexp)  # [p, B, K/G, g*s, e] -> [p, B, K/G, g*s, e+1]
    centred = with_column(xp, dheads, -mean)  # [p, B, K/G, g*s, e] -> [p, B, K/G, g*s, e+1]
    wide = with_column(xp, keys_values, 1.0)  # [2, B, K/G, S, e] -> [2, B, K/G, S, e+1]
    dq = xp.zeros_like(q)
    dkeys_values = [xp.empty((*keys_values.shape[:3], seen, q.shape[-1]), dtype=q.dtype) for seen in visible]
    before = [seen - length for seen in visible]
    for tiles in padded_together(q, visible):
        each = [(queries[tile], centred[tile], scaled[tile], dheads[tile]) for tile in tiles]
        for first, widths in chunks_before(q, blocks, [before[tile] for tile in tiles]):
            before_backward(xp, each, wide, first, widths, out=[(dq[tile], dkeys_values[tile]) for tile in tiles])
    tiles = [seen // length - 1 for seen in visible]
    by_tile = wide.reshape(*wide.shape[:3], -1, length, wide.shape[-1])  # [2, B, K/G, S, e+1] -> [2, B, K/G, T, s, e+1]
    own = by_tile[:, :, :, tiles].transpose(0, 3, 1, 2, 4, 5)  # -> [2, p, B, K/G, s, e+1]
    down = xp.empty((*own.shape[:-1], q.shape[-1]), dtype=q.dtype)  # [2, p, B, K/G, s, e]
    for first in range(0, length, DIAGONAL):
        chunk, after = slice(first, min(first + DIAGONAL, length)), slice(first, length)
        rows = (rows_of(queries, after, length), rows_of(centred, after, length), rows_of(scaled, after, length),
                rows_of(dheads, after, length))
        found = own_backward(
            xp, rows, own[..., chunk, :], mask[chunk, chunk], length - first, out=down[..., chunk, :])
        dq_rows = of_queries(dq, after, length)
        dq_rows += found.reshape(dq_rows.shape)
    for tile, seen in enumerate(visible):
        dkeys_values[tile][:, :, :, seen - length :] = down[:, tile]
    dq *= scale
    return dq, dkeys_values


Rows: TypeAlias = tuple[Array, Array, Array, Array]
"""Of some queries, what their keys are multiplied with: the scaled queries, and the gradients of the heads' output,
each with a column for what is subtracted from their products [..., e+1]; and both without it [..., e]."""


def before_backward(
    xp: Namespace, rows: list[Rows], wide: Array, first: int, widths: list[int], out: list[tuple[Array, Array]]
) -> None:
    """What some tiles and a chunk of keys before them give each other: of the keys from `first` on, tile i sees
    widths[i]. Products are of a tile's own keys; what goes by elements is done for all tiles at once, padded.

    rows of all queries of each tile [B, K/G, g·s, ...]; wide: keys and values [2, B, K/G, S, e+1]. In `out`, of each
    tile, dq [B, K/G, g·s, e], before its scale, is added to, and the chunk's dk and dv [2, B, K/G, n, e] are written.
    """
    keys, values = wide.swapaxes(-1, -2)  # -> [B, K/G, e+1, S], [B, K/G, e+1, S]
    new = xp.empty if min(widths) == max(widths) else xp.zeros
    shape = len(rows), *rows[0][0].shape[:-1], max(widths)
    probs, dscores = new(shape, dtype=wide.dtype), new(shape, dtype=wide.dtype)  # -> [p, B, K/G, g*s, c], ...
    for (queries, centred, _, _), scores, slopes, width in zip(rows, probs, dscores, widths):
        if width:
            xp.matmul(queries, keys[..., first : first + width], out=scores[..., :width])
            xp.matmul(centred, values[..., first : first + width], out=slopes[..., :width])
    xp.exp(probs, out=probs)
    dscores *= probs
    plain = wide[0, ..., :-1]  # [2, B, K/G, S, e+1] -> [B, K/G, S, e]
    for (_, _, scaled, dheads), weights, slopes, width, (dq, found) in zip(rows, probs, dscores, widths, out):
        if width:
            dk, dv = found[:, :, :, first : first + width]  # -> [B, K/G, c, e], [B, K/G, c, e]
            xp.matmul(weights[..., :width].swapaxes(-1, -2), dheads, out=dv)
            xp.matmul(slopes[..., :width].swapaxes(-1, -2), scaled, out=dk)
            dq += slopes[..., :width] @ plain[:, :, first : first + width]


def chunks_before(q: Array, blocks: int, before: list[int]) -> list[tuple[int, list[int]]]:
    """The keys before some tiles in chunks (first, how many of them each tile sees): so many that their scores against
    all queries of a tile q [p, B, K/G, g·s, e], of one of the blocks, take about CHUNK_BYTES."""
    step = max(DIAGONAL, CHUNK_BYTES // (math.prod(q.shape[1:4]) // blocks * q.dtype.itemsize))
    return [(first, [min(step, max(0, count - first)) for count in before]) for first in range(0, max(before), step)]


def own_backward(xp: Namespace, rows: Rows, wide: Array, mask: Array, count: int, out: Array) -> Array:
    """What the last r = count queries of each head and a chunk of c keys of the same tile give each other, for all
    tiles: dq [p, B, K/G, g·r, e], before its scale, and, into `out` [2, p, B, K/G, c, e], the gradients of keys and
    values.

    rows [p, B, K/G, g·r, ...]; wide: keys and values [2, p, B, K/G, c, e+1]; mask [c, c].
    """
    queries, centred, scaled, dheads = rows
    keys, values = wide
    probs = queries @ keys.swapaxes(-1, -2)  # [p, B, K/G, g*r, e+1] -> [p, B, K/G, g*r, c]
    add_mask(probs, mask, count)
    xp.exp(probs, out=probs)
    xp.matmul(probs.swapaxes(-1, -2), dheads, out=out[1])
    dscores = centred @ values.swapaxes(-1, -2)  # [p, B, K/G, g*r, e+1] -> [p, B, K/G, g*r, c]
    dscores *= probs
    xp.matmul(dscores.swapaxes(-1, -2), scaled, out=out[0])
    return dscores @ keys[..., :-1]  # [p, B, K/G, g*r, c] -> [p, B, K/G, g*r, e]


def add_keys(left: Array, right: Array) -> Array:
    """Gradients of keys and values [2, B, K/G, n, e] of two tiles of queries, or of more: each of the first n keys of
    the sequence, so the shorter is added to the head of the longer, in place. The tree's operation for them."""
    if left.shape[3] < right.shape[3]:
        left, right = right, left
    left[:, :, :, : right.shape[3]] += right
    return left


def merge_heads(heads: Array, length: int) -> Array:
    """Put the heads side by side: [p, B, K/G, g·s, e] -> [p, B·s, H/G·e]."""
    count, batch, kv_heads, rows, head_dim = heads.shape
    by_head = heads.reshape(count, batch, kv_heads * rows // length, length, head_dim)  # -> [p, B, H/G, s, e]
    return by_head.transpose(0, 1, 3, 2, 4).reshape(count, batch * length, -1)  # [p, B, H/G, s, e] -> [p, B*s, H/G*e]


def out_forward(xp: Namespace, heads: Array, wo: Array, length: int) -> Array:
    """This block of heads' term of the attention's output: [p, B, K/G, g·s, e], wo [H/G·e, h] -> [p, B, s, h]."""
    merged = merge_heads(heads, length)  # [p, B, K/G, g*s, e] -> [p, B*s, H/G*e]
    y = merged @ wo  # [p, B*s, H/G*e] -> [p, B*s, h]
    return y.reshape(*heads.shape[:2], length, -1)  # [p, B*s, h] -> [p, B, s, h]


def out_backward(xp: Namespace, dy: Array, heads: Array, wo: Array) -> Array:
    """dy [p, B, s, h] -> dheads [p, B, K/G, g·s, e]."""
    count, batch, length, hidden = dy.shape
    dmerged = dy.reshape(count, batch * length, hidden) @ wo.T  # [p, B*s, h] -> [p, B*s, H/G*e]
    split = dmerged.reshape(count, batch, length, -1, heads.shape[-1])  # -> [p, B, s, H/G, e]
    return split.transpose(0, 1, 3, 2, 4).reshape(heads.shape)  # [p, B, s, H/G, e] -> [p, B, K/G, g*s, e]


def out_backward_weight(xp: Namespace, dy: Array, heads: Array, out: Array) -> None:
    """dy [p, B, s, h] -> dwo, written into `out` [p, H/G·e, h].

    Apart from `out_backward`, because a weight's gradient is written into its packed block together with wqkv's, which
    is known only when the gradients of keys and values have come back from every tile.
    """
    count, batch, length, hidden = dy.shape
    flat = dy.reshape(count, batch * length, hidden)  # [p, B, s, h] -> [p, B*s, h]
    xp.matmul(merge_heads(heads, length).swapaxes(-1, -2), flat, out=out)
