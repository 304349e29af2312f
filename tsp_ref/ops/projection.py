"""The queries, keys and values of one block of heads: a product, if asked a bias and a norm of each head, and the turn
by positions.

The bias is that of Qwen2 (arXiv 2407.10671), the norm that of Qwen3 (arXiv 2505.09388): an RMSNorm of each head of the
queries and of the keys, before they are turned, with a gain for all heads of the queries and one for those of the keys.
"""

from __future__ import annotations

from typing import NamedTuple

from ..arrays import Array, Namespace
from .norm import rmsnorm_backward, rmsnorm_forward
from .rotary import rotary_backward, rotary_forward


class HeadNorm(NamedTuple):
    """The norm of each head: the gains of queries and of keys [2, e], and what is added to the mean square."""

    gains: Array
    eps: float


def qkv_forward(
    xp: Namespace, x: Array, wqkv: Array, rotary: Array, out: tuple[Array, Array], bias: Array | None = None,
    norm: HeadNorm | None = None
) -> None:
    """Project tiles to the queries, keys and values of one block of heads, turned by their positions.

    x [p, B, s, h], wqkv [h, (H+2K)/G·e], rotary [p, 2, s, e], bias [(H+2K)/G·e]; into `out` go the queries
    [p, B, K/G, g·s, e] and the keys and values [p, 2, B, K/G, s, e].
    """
    q, keys_values = out
    count, batch, kv_heads, _, head_dim = q.shape
    length = x.shape[2]
    heads = projected_heads(x, wqkv, bias, head_dim)  # [p, B, s, h] -> [p, B, (H+2*K)/G, s, e]
    queries = heads.shape[2] - 2 * kv_heads
    of_queries, of_keys = heads[:, :, :queries], heads[:, :, queries : queries + kv_heads]
    if norm is not None:
        of_queries = norm_heads_forward(xp, of_queries, norm.gains[0], norm.eps)
        of_keys = norm_heads_forward(xp, of_keys, norm.gains[1], norm.eps)
    by_head = q.reshape(count, batch, queries, length, head_dim)  # [p, B, K/G, g*s, e] -> [p, B, H/G, s, e]
    rotary_forward(xp, of_queries, rotary, out=by_head)
    rotary_forward(xp, of_keys, rotary, out=keys_values[:, 0])
    keys_values[:, 1] = heads[:, :, queries + kv_heads :]


def qkv_backward(
    xp: Namespace, dq: Array, dkeys_values: Array, x: Array, wqkv: Array, rotary: Array, out: Array,
    bias: tuple[Array, Array] | None = None, norm: tuple[HeadNorm, Array] | None = None
) -> Array:
    """dq [p, B, K/G, g·s, e] and dkeys_values [p, 2, B, K/G, s, e] -> dx [p, B, s, h]; dwqkv is written into `out`
    [p, h, (H+2K)/G·e].

    A bias and a norm come with where their gradients are written: dbias [p, (H+2K)/G·e], dgains [p, 2, e].
    """
    count, batch, length, hidden = x.shape
    head_dim, kv_heads = dq.shape[-1], dkeys_values.shape[3]
    dqkv = xp.empty((count, batch * length, wqkv.shape[1]), dtype=x.dtype)  # [p, B*s, (H+2*K)/G*e]
    split = dqkv.reshape(count, batch, length, -1, head_dim)  # -> [p, B, s, (H+2*K)/G, e]
    dheads = split.transpose(0, 1, 3, 2, 4)  # -> [p, B, (H+2*K)/G, s, e]
    queries = dheads.shape[2] - 2 * kv_heads
    by_head = dq.reshape(count, batch, queries, length, head_dim)  # [p, B, K/G, g*s, e] -> [p, B, H/G, s, e]
    rotary_backward(xp, by_head, rotary, out=dheads[:, :, :queries])
    rotary_backward(xp, dkeys_values[:, 0], rotary, out=dheads[:, :, queries : queries + kv_heads])
    dheads[:, :, queries + kv_heads :] = dkeys_values[:, 1]
    if norm is not None:
        # As they were before the norm, queries and keys are computed again rather than kept.
        width = (queries + kv_heads) * head_dim
        bias_of_both = None if bias is None else bias[0][:width]
        heads = projected_heads(
            x, wqkv[:, :width], bias_of_both, head_dim)  # [p, B, s, h] -> [p, B, (H+K)/G, s, e]
        for number, part in enumerate((slice(queries), slice(queries, queries + kv_heads))):
            norm_heads_backward(xp, dheads[:, :, part], heads[:, :, part], norm[0], number, out=norm[1])
    if bias is not None:
        xp.sum(dqkv, axis=1, out=bias[1])
    flat = x.reshape(count, batch * length, hidden)  # [p, B, s, h] -> [p, B*s, h]
    xp.matmul(flat.swapaxes(-1, -2), dqkv, out=out)
    dx = dqkv @ wqkv.T  # [p, B*s, (H+2*K)/G*e] -> [p, B*s, h]
    return dx.reshape(x.shape)  # [p, B*s, h] -> [p, B, s, h]


def projected_heads(x: Array, weights: Array, bias: Array | None, head_dim: int) -> Array:
    """x [p, B, s, h], weights of some heads side by side [h, heads·e], bias [heads·e] -> [p, B, heads, s, e], a view of
    the product."""
    count, batch, length, hidden = x.shape
    product = x.reshape(count, batch * length, hidden) @ weights  # [p, B*s, h] -> [p, B*s, ...]
    if bias is not None:
        product += bias
    split = product.reshape(count, batch, length, -1, head_dim)  # [p, B*s, ...] -> [p, B, s, ..., e]
    return split.transpose(0, 1, 3, 2, 4)  # [p, B, s, ..., e] -> [p, B, ..., s, e]


def norm_heads_forward(xp: Namespace, x: Array, gain: Array, eps: float) -> Array:
    """Each head scaled to mean square one, then by the gain [e]: x [p, B, heads, s, e], of that shape too."""
    rows = x.reshape(*x.shape[:2], -1, x.shape[-1])  # [p, B, ..., s, e] -> [p, B, ..., e]
    return rmsnorm_forward(xp, rows, gain, eps).reshape(x.shape)  # [p, B, ..., e] -> [p, B, ..., s, e]


def norm_heads_backward(
    xp: Namespace, dy: Array, x: Array, norm: HeadNorm, number: int, out: Array
) -> None:
    """The gradient of the norm of queries (number 0) or keys (1), in the place of dy [p, B, heads, s, e]; that of its
    gain, the sum over a tile's heads and tokens, goes into its row of `out` [p, 2, e]."""
    rows = dy.reshape(*dy.shape[:2], -1, dy.shape[-1])  # [p, B, ..., s, e] -> [p, B, ..., e]
    dx, out[:, number] = rmsnorm_backward(xp, rows, x.reshape(rows.shape), norm.gains[number], norm.eps)
    dy[...] = dx.reshape(dy.shape)  # [p, B, ..., e] -> [p, B, ..., s, e]
