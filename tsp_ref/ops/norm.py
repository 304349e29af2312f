"""RMSNorm (arXiv 1910.07467). Inner products of rows are `einsum`s, which make no array of the products."""

from __future__ import annotations

from ..arrays import Array, Namespace


def inverse_rms(xp: Namespace, x: Array, eps: float) -> Array:
    """The inverse root mean square of each token: x [B, s, h] -> [B, s, 1], in x's dtype."""
    squares = xp.einsum("bsh,bsh->bs", x, x)[..., None]  # [B, s, h] -> [B, s, 1]
    return 1.0 / xp.sqrt(squares / x.shape[-1] + eps)


def rmsnorm_forward(xp: Namespace, x: Array, gain: Array, eps: float) -> tuple[Array, Array]:
    """Scale each token to mean square one, then by the gain.

    x [B, s, h], gain [h] -> the result [B, s, h] and the inverse root mean squares [B, s, 1], in x's dtype.
    """
    inverse = inverse_rms(xp, x, eps)
    y = x * inverse
    y *= gain
    return y, inverse


def rmsnorm_backward(xp: Namespace, dy: Array, x: Array, gain: Array, inverse: Array) -> tuple[Array, Array]:
    """dy [B, s, h] -> dx [B, s, h] and dgain [h]; `inverse` is what the forward returned.

    The plain form: dx = (dunit - unit · mean(dunit · unit)) · inverse, with unit = x · inverse and dunit = dy · gain.
    """
    unit = x * inverse
    dgain = xp.einsum("bsh,bsh->h", dy, unit)  # [B, s, h] -> [h]
    dx = dy * gain
    # The scale depends on x too: that part of the gradient lies along x, and is what keeps the mean square at one.
    along = xp.einsum("bsh,bsh->bs", dx, unit)[..., None]  # [B, s, h] -> [B, s, 1]
    unit *= along / x.shape[-1]
    dx -= unit
    dx *= inverse
    return dx, dgain
