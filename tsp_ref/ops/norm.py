"""RMSNorm (arXiv 1910.07467). Inner products of rows are `einsum`s, which make no array of the products.

A row is a token, of h entries, or one of its heads, of e: then read [p, B, heads·s, e] for [p, B, s, h].
"""

from __future__ import annotations

from ..arrays import Array, Namespace


def inverse_rms(xp: Namespace, x: Array, eps: float) -> Array:
    """The inverse root mean square of each token: x [p, B, s, h] -> [p, B, s, 1], in x's dtype."""
    squares = xp.einsum("pbsh,pbsh->pbs", x, x)[..., None]  # [p, B, ...] -> [p, B, ..., 1]
    return 1.0 / xp.sqrt(squares / x.shape[-1] + eps)


def rmsnorm_forward(xp: Namespace, x: Array, gain: Array, eps: float, out: Array | None = None) -> Array:
    """Scale each token to mean square one, then by the gain: x [p, B, s, h], gain [h] -> [p, B, s, h]."""
    y = xp.multiply(x, inverse_rms(xp, x, eps), out=out)
    y *= gain
    return y


def rmsnorm_backward(
    xp: Namespace, dy: Array, x: Array, gain: Array, eps: float, out: Array | None = None
) -> tuple[Array, Array]:
    """dy [p, B, s, h] -> dx [p, B, s, h], into `out` if given, and dgain [p, h].

    The plain form: dx = (dunit - unit · mean(dunit · unit)) · inverse, with unit = x · inverse and dunit = dy · gain.
    """
    inverse = inverse_rms(xp, x, eps)
    unit = x * inverse
    dgain = xp.einsum("pbsh,pbsh->ph", dy, unit)  # [p, B, ...] -> [p, ...]
    dx = xp.multiply(dy, gain, out=out)
    # The scale depends on x too: that part of the gradient lies along x, and is what keeps the mean square at one.
    along = xp.einsum("pbsh,pbsh->pbs", dx, unit)[..., None]  # [p, B, ...] -> [p, B, ..., 1]
    unit *= along / x.shape[-1]
    dx -= unit
    dx *= inverse
    return dx, dgain
