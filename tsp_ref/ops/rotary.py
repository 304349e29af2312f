"""Rotary position embedding (arXiv 2104.09864), in the half-split convention of Llama checkpoints: entry i of a head is
turned together with entry i + e/2.

The plain form, for the two halves of a head: y1 = x1 cos - x2 sin and y2 = x2 cos + x1 sin. It is computed as
x · [cos, cos] + [x2, x1] · [-sin, sin], in whole rows: halves of a row are short, and every row of an operation costs.
"""

from __future__ import annotations

from ..arrays import Array, Namespace
from .rope_scaling import RopeScaling, scaled_frequencies


def rotary_table(
    xp: Namespace, first: int, length: int, head_dim: int, theta: float, dtype: str, scaling: RopeScaling | None = None
) -> Array:
    """[cos, cos] and [-sin, sin] of the angles position · theta^(-2i/e), [2, s, e], from position `first` on; `scaling`
    slows down the slow of these frequencies."""
    positions = xp.arange(first, first + length, dtype=dtype)  # [s]
    exponents = xp.arange(0, head_dim, 2, dtype=dtype) / head_dim  # [e/2]
    frequencies = theta ** -exponents
    if scaling is not None:
        frequencies = scaled_frequencies(xp, frequencies, scaling)
    angles = positions[:, None] * frequencies[None, :]  # [s, e/2]
    cos, sin = xp.cos(angles), xp.sin(angles)  # -> [s, e/2], [s, e/2]
    table = xp.empty((2, length, head_dim), dtype=dtype)  # [2, s, e]
    half = head_dim // 2
    table[0, :, :half], table[0, :, half:] = cos, cos
    table[1, :, :half], table[1, :, half:] = -sin, sin
    return table


def halves_swapped(x: Array) -> Array:
    """[x1, x2] -> [x2, x1], as a view [..., s, 2, e/2] of x [..., s, e]."""
    return halves(x)[..., ::-1, :]


def cos_and_sin(table: Array) -> tuple[Array, Array]:
    """The two halves of tables [p, 2, s, e], for arrays [p, B, heads, s, e] and for such in halves."""
    return table[:, 0, None, None], halves(table[:, 1, None, None])


def halves(x: Array) -> Array:
    """[..., s, e] -> [..., s, 2, e/2]."""
    return x.reshape(*x.shape[:-1], 2, -1)


def rotary_forward(xp: Namespace, x: Array, table: Array, out: Array | None = None) -> Array:
    """Turn each pair of x [p, B, heads, s, e] by its position's angle, table [p, 2, s, e]; into `out`, if given."""
    cos, sin = cos_and_sin(table)
    x = xp.ascontiguousarray(x)  # it is read twice, and its rows may lie apart
    y = xp.multiply(x, cos, out=out)
    y += (halves_swapped(x) * sin).reshape(x.shape)
    return y


def rotary_backward(xp: Namespace, dy: Array, table: Array, out: Array | None = None) -> Array:
    """A rotation's gradient is the rotation back; written into `out`, if given, where a tile's other gradients lie."""
    cos, sin = cos_and_sin(table)
    dx = xp.multiply(dy, cos, out=out)
    dx -= (halves_swapped(dy) * sin).reshape(dy.shape)
    return dx
