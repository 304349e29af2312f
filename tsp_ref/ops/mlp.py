"""SwiGLU, the gated feed-forward part, for one block of its columns: y = (silu(x gate) * (x up)) down.

Source: arXiv 2002.05202.
"""

from __future__ import annotations

from ..arrays import Array, Namespace


def sigmoid(xp: Namespace, x: Array) -> Array:
    """1 / (1 + exp(-x)), written with tanh, which does not overflow: (tanh(x/2) + 1) / 2."""
    y = 0.5 * x
    xp.tanh(y, out=y)
    y *= 0.5
    y += 0.5
    return y


def swiglu_forward(xp: Namespace, x: Array, gate_up: Array, down: Array) -> tuple[Array, Array]:
    """x [B, s, h], gate and up side by side [h, 2f/G], down [f/G, h] -> y [B, s, h] and x gate_up [B·s, 2f/G], kept."""
    batch, length, hidden = x.shape
    projected = x.reshape(batch * length, hidden) @ gate_up  # [B*s, h] -> [B*s, 2*f/G]
    width = down.shape[0]
    gate, up = projected[:, :width], projected[:, width:]  # -> [B*s, f/G], [B*s, f/G]
    gated = sigmoid(xp, gate)
    gated *= gate
    gated *= up
    y = gated @ down  # [B*s, f/G] -> [B*s, h]
    return y.reshape(batch, length, hidden), projected


def swiglu_backward(
    xp: Namespace, dy: Array, x: Array, gate_up: Array, down: Array, projected: Array, out: tuple[Array, Array]
) -> Array:
    """dy [B, s, h] -> dx [B, s, h]; the gradients of gate_up and down are written into `out`."""
    batch, length, hidden = x.shape
    flat = dy.reshape(batch * length, hidden)  # [B, s, h] -> [B*s, h]
    dgated = flat @ down.T  # [B*s, h] -> [B*s, f/G]
    gated, dprojected = gate_backward(xp, dgated, projected)
    xp.matmul(gated.T, flat, out=out[1])
    xp.matmul(x.reshape(batch * length, hidden).T, dprojected, out=out[0])
    dx = dprojected @ gate_up.T  # [B*s, 2*f/G] -> [B*s, h]
    return dx.reshape(batch, length, hidden)


def gate_backward(xp: Namespace, dgated: Array, projected: Array) -> tuple[Array, Array]:
    """dgated [B·s, f/G] -> silu(gate) * up [B·s, f/G], computed anew, and the gradients of gate and up [B·s, 2f/G].

    The plain form of what is done in place here: silu = gate · slope, with slope = sigmoid(gate), and its derivative is
    slope + silu · (1 - slope) = slope · (1 + gate - silu).
    """
    width = dgated.shape[1]
    gate, up = projected[:, :width], projected[:, width:]  # -> [B*s, f/G], [B*s, f/G]
    dprojected = xp.empty_like(projected)
    slope = sigmoid(xp, gate)
    silu = gate * slope
    xp.multiply(dgated, silu, out=dprojected[:, width:])
    # Halves of rows are slow to work on: they are read and written as seldom as can be.
    dgate = gate - silu
    dgate += 1.0
    dgate *= slope
    dgate *= up
    xp.multiply(dgate, dgated, out=dprojected[:, :width])
    silu *= up
    return silu, dprojected
