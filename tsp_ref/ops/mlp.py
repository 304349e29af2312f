"""SwiGLU, the gated feed-forward maths, for one block of its columns: y = (silu(x gate) * (x up)) down.

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


def swiglu_forward(xp: Namespace, x: Array, gate_up: Array, down: Array, out: Array) -> Array:
    """x [p, B, s, h], gate and up side by side [h, 2f/G], down [f/G, h] -> y [p, B, s, h]; x gate_up, which the
    backward needs, is written into `out` [p, B·s, 2f/G]."""
    flat = x.reshape(len(x), -1, x.shape[-1])  # [p, B, s, h] -> [p, B*s, h]
    projected = xp.matmul(flat, gate_up, out=out)  # [p, B*s, h] -> [p, B*s, 2*f/G]
    width = down.shape[0]
    gate, up = projected[..., :width], projected[..., width:]  # -> [p, B*s, f/G], [p, B*s, f/G]
    gated = sigmoid(xp, gate)
    gated *= gate
    gated *= up
    y = gated @ down  # [p, B*s, f/G] -> [p, B*s, h]
    return y.reshape(x.shape)  # [p, B*s, h] -> [p, B, s, h]


def swiglu_backward(
    xp: Namespace, dy: Array, x: Array, gate_up: Array, down: Array, projected: Array, out: tuple[Array, Array]
) -> Array:
    """dy [p, B, s, h] -> dx [p, B, s, h]; the gradients of gate_up [p, h, 2f/G] and down [p, f/G, h] are written into
    `out`."""
    flat = dy.reshape(len(dy), -1, dy.shape[-1])  # [p, B, s, h] -> [p, B*s, h]
    dgated = flat @ down.T  # [p, B*s, h] -> [p, B*s, f/G]
    gated, dprojected = gate_backward(xp, dgated, projected)
    xp.matmul(gated.swapaxes(-1, -2), flat, out=out[1])
    xp.matmul(x.reshape(flat.shape).swapaxes(-1, -2), dprojected, out=out[0])
    dx = dprojected @ gate_up.T  # [p, B*s, 2*f/G] -> [p, B*s, h]
    return dx.reshape(dy.shape)  # [p, B*s, h] -> [p, B, s, h]


def gate_backward(xp: Namespace, dgated: Array, projected: Array) -> tuple[Array, Array]:
    """dgated [p, B·s, f/G] -> silu(gate) * up [p, B·s, f/G], recomputed, and the gradients of gate and up
    [p, B·s, 2f/G].

    The plain form of what is done in place here: silu = gate · slope, with slope = sigmoid(gate), and its derivative is
    slope + silu · (1 - slope) = slope · (1 + gate - silu).
    """
    width = dgated.shape[-1]
    gate, up = projected[..., :width], projected[..., width:]  # -> [p, B*s, f/G], [p, B*s, f/G]
    dprojected = xp.empty_like(projected)
    slope = sigmoid(xp, gate)
    silu = gate * slope
    xp.multiply(dgated, silu, out=dprojected[..., width:])
    # Halves of rows are slow to work on: they are read and written as seldom as can be.
    dgate = gate - silu
    dgate += 1.0
    dgate *= slope
    dgate *= up
    xp.multiply(dgate, dgated, out=dprojected[..., :width])
    silu *= up
    return silu, dprojected
