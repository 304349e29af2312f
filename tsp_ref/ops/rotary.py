"""Rotary position embedding (arXiv 2104.09864), in the half-split convention of Llama checkpoints: entry i of a head is
turned together with entry i + e/2."""

from __future__ import annotations

from ..arrays import Array, Namespace


def rotary_table(xp: Namespace, first: int, length: int, head_dim: int, theta: float, dtype: str) -> Array:
    """Cosines and sines of the angles position · theta^(-2i/e): [2, s, e/2] for the positions from `first` on."""
    positions = xp.arange(first, first + length, dtype=dtype)  # [s]
    exponents = xp.arange(0, head_dim, 2, dtype=dtype) / head_dim  # [e/2]
    angles = positions[:, None] * (theta ** -exponents)[None, :]  # [s, e/2]
    return xp.stack([xp.cos(angles), xp.sin(angles)])  # [2, s, e/2]


def rotary_forward(xp: Namespace, x: Array, table: Array) -> Array:
    """Turn each pair of x [..., s, e] by its position's angle."""
    cos, sin = table[0], table[1]
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    y = xp.empty(x.shape, dtype=x.dtype)
    y[..., :half] = first * cos - second * sin
    y[..., half:] = second * cos + first * sin
    return y


def rotary_backward(xp: Namespace, dy: Array, table: Array, out: Array) -> None:
    """A rotation's gradient is the rotation back; written into `out`, where the other gradients of a tile lie."""
    cos, sin = table[0], table[1]
    half = dy.shape[-1] // 2
    first, second = dy[..., :half], dy[..., half:]
    out[..., :half] = first * cos + second * sin
    out[..., half:] = second * cos - first * sin
