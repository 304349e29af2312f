"""The embedding of tokens by one block of the vocabulary."""

from __future__ import annotations

from ..arrays import Array, Namespace


def embed_forward(xp: Namespace, tokens: Array, table: Array, first: int) -> Array:
    """The rows of the tokens that this block holds, and zeros for all other tokens.

    tokens [p, B, s], table [V/G, h] with the rows of the tokens from `first` on -> [p, B, s, h]. Each token is in one
    block, so the sum over blocks is exact.
    """
    rows = table.shape[0]
    row = tokens - first
    inside = (row >= 0) & (row < rows)
    found = table[xp.clip(row, 0, rows - 1)]  # [V/G, h] -> [p, B, s, h]
    return xp.where(inside[..., None], found, 0.0)


def embed_backward(xp: Namespace, dy: Array, tokens: Array, first: int, out: Array) -> None:
    """dy [p, B, s, h] is added up by token, into `out` [p, V/G, h].

    As a product with a one-hot matrix, because its order of summation is fixed: a scatter-add's is not, on a GPU.
    """
    hot = one_hot(xp, tokens, first, out.shape[1], dy.dtype)
    rows = dy.reshape(*hot.shape[:2], -1)  # [p, B, s, h] -> [p, B*s, h]
    xp.matmul(hot.swapaxes(-1, -2), rows, out=out)


def one_hot(xp: Namespace, tokens: Array, first: int, rows: int, dtype: object) -> Array:
    """[p, B, s] -> [p, B·s, V/G], a one where a token is the column's; a row of zeros for a token of another block."""
    columns = xp.arange(first, first + rows, dtype=tokens.dtype)  # [V/G]
    return (tokens.reshape(len(tokens), -1, 1) == columns).astype(dtype)  # [p, B, s] -> [p, B*s, V/G]
