"""SwiGLU, the gated feed-forward part, for one block of its columns: y = (silu(x gate) * (x up)) down.

Source: arXiv 2002.05202.
"""

from __future__ import annotations

from ..arrays import Array, Namespace


def sigmoid(xp: Namespace, x: Array) -> Array:
    """1 / (1 + exp(-x)), written with tanh, which does not overflow."""
    return 0.5 * xp.tanh(0.5 * x) + 0.5


def swiglu_forward(xp: Namespace, x: Array, gate_up: Array, down: Array) -> tuple[Array, Array]:
    """x [B, s, h], gate and up side by side [h, 2f/G], down [f/G, h] -> y [B, s, h] and x gate_up [B·s, 2f/G], kept."""
    batch, length, hidden = x.shape
    projected = x.reshape(batch * length, hidden) @ gate_up  # [B*s, h] -> [B*s, 2*f/G]
    width = down.shape[0]
    gate, up = projected[:, :width], projected[:, width:]  # -> [B*s, f/G], [B*s, f/G]
    y = (gate * sigmoid(xp, gate) * up) @ down  # [B*s, f/G] -> [B*s, h]
    return y.reshape(batch, length, hidden), projected


def swiglu_backward(
    xp: Namespace, dy: Array, x: Array, gate_up: Array, down: Array, projected: Array, out: tuple[Array, Array]
) -> Array:
    """dy [B, s, h] -> dx [B, s, h]; the gradients of gate_up and down are written into `out`."""
    batch, length, hidden = x.shape
    width = down.shape[0]
    gate, up = projected[:, :width], projected[:, width:]  # -> [B*s, f/G], [B*s, f/G]
    slope = sigmoid(xp, gate)
    silu = gate * slope
    flat = dy.reshape(batch * length, hidden)  # [B, s, h] -> [B*s, h]
    xp.matmul((silu * up).T, flat, out=out[1])
    dhidden = flat @ down.T  # [B*s, h] -> [B*s, f/G]
    dprojected = xp.empty(projected.shape, dtype=projected.dtype)  # [B*s, 2*f/G]
    # The derivative of z·sigmoid(z) is sigmoid(z) + z·sigmoid(z)·(1 - sigmoid(z)).
    dprojected[:, :width] = dhidden * up * (slope + silu * (1.0 - slope))
    dprojected[:, width:] = dhidden * silu
    xp.matmul(x.reshape(batch * length, hidden).T, dprojected, out=out[0])
    dx = dprojected @ gate_up.T  # [B*s, 2*f/G] -> [B*s, h]
    return dx.reshape(batch, length, hidden)
