"""Grouped-query causal attention for one block of heads and one tile of queries.

The g query heads that share a key/value head are stacked as g·s rows under it, so keys are never repeated and each
product is one matrix multiplication per key/value head. Sources: grouped queries, arXiv 2305.13245; a backward that
needs only the log-sum-exp of the scores, FlashAttention, arXiv 2205.14135.
"""

from __future__ import annotations

import math

from ..arrays import Array, Namespace
from .rotary import rotary_backward, rotary_forward

STRIP = 128
"""Queries of a strip in the forward, at most: more scores do not fit the cache, fewer make the matrix products slower
(chosen by measurement)."""

CHUNK_BYTES = 512 * 1024
"""Of a chunk of scores in the backward: with its gradient it fits the second-level cache of most processors (chosen by
measurement)."""

DIAGONAL = 64
"""Keys of a chunk of the tile itself, in the backward: of its scores few are masked (chosen by measurement)."""


def qkv_forward(
    xp: Namespace, x: Array, wqkv: Array, rotary: Array, group_size: int
) -> tuple[Array, Array, Array]:
    """Project a tile to the queries, keys and values of one block of heads, turned by their positions.

    x [B, s, h], wqkv [h, (H+2K)/G·e], rotary [2, s, e] -> q [B, K/G, g·s, e], k and v [B, K/G, s, e].
    """
    batch, length, _ = x.shape
    head_dim = rotary.shape[-1]
    kv_heads = wqkv.shape[1] // (group_size + 2) // head_dim
    qkv = x.reshape(batch * length, -1) @ wqkv  # [B*s, h] -> [B*s, (H+2*K)/G*e]
    heads = qkv.reshape(batch, length, -1, head_dim).transpose(0, 2, 1, 3)  # -> [B, (H+2*K)/G, s, e]
    queries = group_size * kv_heads
    q = rotary_forward(xp, heads[:, :queries], rotary)  # -> [B, H/G, s, e]
    k = rotary_forward(xp, heads[:, queries : queries + kv_heads], rotary)  # -> [B, K/G, s, e]
    v = heads[:, queries + kv_heads :]  # -> [B, K/G, s, e]
    grouped = q.reshape(batch, kv_heads, -1, head_dim)  # [B, H/G, s, e] -> [B, K/G, g*s, e]
    return grouped, k, v


def qkv_backward(
    xp: Namespace, dq: Array, dk: Array, dv: Array, x: Array, wqkv: Array, rotary: Array, out: Array
) -> Array:
    """dq [B, K/G, g·s, e], dk and dv [B, K/G, s, e] -> dx [B, s, h]; dwqkv is written into `out`."""
    batch, length, hidden = x.shape
    head_dim, kv_heads = dq.shape[-1], dk.shape[1]
    dqkv = xp.empty((batch * length, wqkv.shape[1]), dtype=x.dtype)  # [B*s, (H+2*K)/G*e]
    dheads = dqkv.reshape(batch, length, -1, head_dim).transpose(0, 2, 1, 3)  # -> [B, (H+2*K)/G, s, e]
    queries = dheads.shape[1] - 2 * kv_heads
    rotary_backward(xp, dq.reshape(batch, queries, length, head_dim), rotary, out=dheads[:, :queries])
    rotary_backward(xp, dk, rotary, out=dheads[:, queries : queries + kv_heads])
    dheads[:, queries + kv_heads :] = dv
    xp.matmul(x.reshape(batch * length, hidden).T, dqkv, out=out)
    dx = dqkv @ wqkv.T  # [B*s, (H+2*K)/G*e] -> [B*s, h]
    return dx.reshape(batch, length, hidden)


def causal_mask(xp: Namespace, length: int, dtype: str) -> Array:
    """What to add to the scores of a tile against itself [s, s]: 0 for a key at or before its query, else -inf."""
    return xp.triu(xp.full((length, length), -xp.inf, dtype=dtype), 1)  # [s, s]


def strips(length: int) -> list[slice]:
    """A tile's queries cut in equal strips of at most STRIP: a strip needs no key after its last query, so that less of
    a long tile is computed only to be masked."""
    step = max(size for size in range(1, min(length, STRIP) + 1) if length % size == 0)
    return [slice(first, first + step) for first in range(0, length, step)]


def of_queries(x: Array, queries: slice, length: int) -> Array:
    """The rows of x [B, K/G, g·s, ...] that belong to some of a tile's queries, of each query head: a view
    [B, K/G, g, t, ...]."""
    batch, kv_heads, _, width = x.shape
    return x.reshape(batch, kv_heads, -1, length, width)[:, :, :, queries]


def attend_forward(xp: Namespace, q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """The attention of a tile, strip by strip.

    q [B, K/G, g·s, e], k and v [B, K/G, n, e], mask [s, s] -> the heads' output [B, K/G, g·s, e] and the
    log-sum-exp of each query's scores [B, K/G, g·s, 1].
    """
    length, (batch, kv_heads, rows, head_dim) = mask.shape[0], q.shape
    heads = xp.empty_like(q)
    logsumexp = xp.empty((batch, kv_heads, rows, 1), dtype=q.dtype)  # [B, K/G, g*s, 1]
    for strip in strips(length):
        seen = k.shape[2] - length + strip.stop
        part = of_queries(q, strip, length)  # -> [B, K/G, g, t, e]
        found, logsum = attend_strip(
            xp, part.reshape(batch, kv_heads, -1, head_dim), k[:, :, :seen], v[:, :, :seen], mask[strip, strip])
        of_queries(heads, strip, length)[...] = found.reshape(part.shape)
        of_queries(logsumexp, strip, length)[...] = logsum.reshape(*part.shape[:-1], 1)
    return heads, logsumexp


def attention_scores(xp: Namespace, q: Array, k: Array, mask: Array) -> Array:
    """Scaled, masked scores of a strip's queries against all keys up to its last: [B, K/G, g·t, n].

    Only the last t columns, the strip against itself, need the mask: all keys before the strip are visible.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)  # [B, K/G, g*t, e] -> [B, K/G, g*t, n]
    add_mask(scores, mask, mask.shape[0])
    return scores


def add_mask(scores: Array, mask: Array, length: int) -> None:
    """Add the mask [w, w] in place to scores of `length` queries of each head: to the first w against the last w keys.
    """
    batch, kv_heads, rows, _ = scores.shape
    width = mask.shape[0]
    scores.reshape(batch, kv_heads, rows // length, length, -1)[..., :width, -width:] += mask


def with_column(xp: Namespace, x: Array, column: Array | float) -> Array:
    """x [B, K/G, n, e], or as many rows of queries, with one more column."""
    wider = xp.empty((*x.shape[:-1], x.shape[-1] + 1), dtype=x.dtype)  # [B, K/G, n, e+1]
    wider[..., :-1] = x
    wider[..., -1:] = column
    return wider


def attend_strip(xp: Namespace, q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """One softmax over all keys that a strip sees. (`einsum` sums short rows faster than `sum`.)

    q [B, K/G, g·t, e], k and v [B, K/G, n, e], mask [t, t] -> the heads' output [B, K/G, g·t, e] and the
    log-sum-exp of each query's scores [B, K/G, g·t, 1].
    """
    probs = attention_scores(xp, q, k, mask)
    largest = xp.max(probs, axis=-1, keepdims=True)  # [B, K/G, g*t, n] -> [B, K/G, g*t, 1]
    probs -= largest
    xp.exp(probs, out=probs)
    total = xp.einsum("bkqn->bkq", probs)[..., None]  # [B, K/G, g*t, n] -> [B, K/G, g*t, 1]
    heads = probs @ v  # [B, K/G, g*t, n] -> [B, K/G, g*t, e]
    heads /= total
    return heads, largest + xp.log(total)


def attend_backward(
    xp: Namespace, dheads: Array, q: Array, k: Array, v: Array, mask: Array, heads: Array, logsumexp: Array
) -> tuple[Array, Array]:
    """The softmax is recomputed from its log-sum-exp, so no [g·s, n] array is ever kept, nor made: the work goes by
    chunks of keys that fit the cache. The plain form, with p the softmax, and all of it at once:

        dv = pᵀ dheads,  dscores = p * (dheads vᵀ - rows of <dheads, heads>) / √e,  dq = dscores k,  dk = dscoresᵀ q

    What is subtracted from each row of a product is one more column of its left factor, and of its right one a column
    of ones: so it costs no pass over the result.

    dheads [B, K/G, g·s, e] -> dq [B, K/G, g·s, e] and, stacked, dk and dv [2, B, K/G, n, e].
    """
    length, scale = mask.shape[0], q.shape[-1] ** -0.5
    scaled = q * scale
    # A softmax passes on only what differs from the weighted mean of its gradient, which is <dheads, heads>.
    mean = xp.einsum("bkqe,bkqe->bkq", dheads, heads)[..., None]  # [B, K/G, g*s, e] -> [B, K/G, g*s, 1]
    queries = with_column(xp, scaled, -logsumexp)  # [B, K/G, g*s, e] -> [B, K/G, g*s, e+1]
    centred = with_column(xp, dheads, -mean)  # [B, K/G, g*s, e] -> [B, K/G, g*s, e+1]
    keys, values = with_column(xp, k, 1.0), with_column(xp, v, 1.0)  # -> [B, K/G, n, e+1], [B, K/G, n, e+1]
    dkv = xp.empty((2, *k.shape), dtype=k.dtype)  # [2, B, K/G, n, e]
    dq = xp.zeros_like(q)
    for chunk, first in key_chunks(q, k.shape[2], length):
        rows = [rows_from(x, first, length) for x in (scaled, dheads, queries, centred)]
        scaled_rows, dheads_rows, queries_rows, centred_rows = rows
        probs = queries_rows @ keys[:, :, chunk].swapaxes(-1, -2)  # -> [B, K/G, g*r, c]
        if chunk.start >= k.shape[2] - length:
            width = chunk.stop - chunk.start
            add_mask(probs, mask[:width, :width], length - first)
        xp.exp(probs, out=probs)
        xp.matmul(probs.swapaxes(-1, -2), dheads_rows, out=dkv[1][:, :, chunk])
        dscores = centred_rows @ values[:, :, chunk].swapaxes(-1, -2)  # -> [B, K/G, g*r, c]
        dscores *= probs
        xp.matmul(dscores.swapaxes(-1, -2), scaled_rows, out=dkv[0][:, :, chunk])
        dq_rows = of_queries(dq, slice(first, length), length)
        dq_rows += (dscores @ k[:, :, chunk]).reshape(dq_rows.shape)
    dq *= scale
    return dq, dkv


def key_chunks(q: Array, count: int, length: int) -> list[tuple[slice, int]]:
    """The keys 0..count-1 in chunks, each with the first of a tile's queries q [B, K/G, g·s, e] that sees its keys.

    Before the tile, which is the last `length` keys: so many that their scores take about CHUNK_BYTES, seen by all.
    The tile itself: DIAGONAL keys at a time, because no query before a chunk's first key sees any of it.
    """
    before = count - length
    step = max(DIAGONAL, CHUNK_BYTES // (math.prod(q.shape[:3]) * q.dtype.itemsize))
    earlier = [(slice(first, min(first + step, before)), 0) for first in range(0, before, step)]
    return earlier + [(slice(before + first, before + min(first + DIAGONAL, length)), first)
                      for first in range(0, length, DIAGONAL)]


def rows_from(x: Array, first: int, length: int) -> Array:
    """The rows of x [B, K/G, g·s, ...] that belong to the queries from `first` on, of each query head."""
    if first == 0:
        return x
    rows = of_queries(x, slice(first, length), length)
    return rows.reshape(*x.shape[:2], -1, x.shape[-1])


def merge_heads(xp: Namespace, heads: Array, length: int) -> Array:
    """Put the heads side by side: [B, K/G, g·s, e] -> [B·s, H/G·e]."""
    batch, kv_heads, rows, head_dim = heads.shape
    split = heads.reshape(batch, kv_heads * rows // length, length, head_dim)  # -> [B, H/G, s, e]
    return split.transpose(0, 2, 1, 3).reshape(batch * length, -1)  # [B, H/G, s, e] -> [B*s, H/G*e]


def out_forward(xp: Namespace, heads: Array, wo: Array, length: int) -> Array:
    """This block of heads' part of the attention's output: [B, K/G, g·s, e], wo [H/G·e, h] -> [B, s, h]."""
    merged = merge_heads(xp, heads, length)  # [B, K/G, g*s, e] -> [B*s, H/G*e]
    y = merged @ wo  # [B*s, H/G*e] -> [B*s, h]
    return y.reshape(heads.shape[0], length, -1)


def out_backward(xp: Namespace, dy: Array, heads: Array, wo: Array, length: int) -> Array:
    """dy [B, s, h] -> dheads [B, K/G, g·s, e]."""
    batch, kv_heads, _, head_dim = heads.shape
    dheads = dy.reshape(batch * length, -1) @ wo.T  # [B*s, h] -> [B*s, H/G*e]
    split = dheads.reshape(batch, length, -1, head_dim).transpose(0, 2, 1, 3)  # -> [B, H/G, s, e]
    return split.reshape(batch, kv_heads, -1, head_dim)


def out_backward_weight(xp: Namespace, dy: Array, heads: Array, out: Array) -> None:
    """dy [B, s, h] -> dwo, written into `out` [H/G·e, h].

    Apart from `out_backward`, because a weight's gradient is written into its packed block together with wqkv's, which
    is known only when the gradients of keys and values have come back from every tile.
    """
    batch, length, hidden = dy.shape
    xp.matmul(merge_heads(xp, heads, length).T, dy.reshape(batch * length, hidden), out=out)
