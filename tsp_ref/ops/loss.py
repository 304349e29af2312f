"""The head and the cross-entropy for one block of the vocabulary; the logits of all V tokens never exist at once.

A block's logits are summed up in three numbers for each token: their largest, the sum of exp(logit - largest), and the
target's logit (0 if the target is in another block). Two such triples merge into the triple of both blocks, as in
online softmax (arXiv 1805.02867).
"""

from __future__ import annotations

from ..arrays import Array, Namespace
from .embedding import one_hot


def logits_forward(xp: Namespace, x: Array, table: Array, targets: Array, first: int) -> Array:
    """x [p, B, s, h], table [V/G, h], targets [p, B, s] -> the triple (largest, sum, target's logit), [p, 3, B·s]."""
    flat = x.reshape(len(x), -1, x.shape[-1])  # [p, B, s, h] -> [p, B*s, h]
    logits = flat @ table.T  # [p, B*s, h] -> [p, B*s, V/G]
    hot = one_hot(xp, targets, first, table.shape[0], x.dtype)
    triple = xp.empty((len(x), 3, logits.shape[1]), dtype=x.dtype)  # [p, 3, B*s]
    triple[:, 2] = xp.sum(logits * hot, axis=-1)
    triple[:, 0] = xp.max(logits, axis=-1)
    logits -= triple[:, 0, :, None]
    triple[:, 1] = xp.sum(xp.exp(logits, out=logits), axis=-1)
    return triple


def logits_backward(
    xp: Namespace, scale: float, x: Array, table: Array, targets: Array, first: int, logsumexp: Array, out: Array
) -> Array:
    """dx [p, B, s, h] for a loss of `scale` per token; dtable is written into `out` [p, V/G, h]. The logits are
    recomputed; logsumexp [p, B·s] is over the whole vocabulary."""
    flat = x.reshape(len(x), -1, x.shape[-1])  # [p, B, s, h] -> [p, B*s, h]
    dlogits = flat @ table.T  # [p, B*s, h] -> [p, B*s, V/G]
    dlogits -= logsumexp[..., None]
    xp.exp(dlogits, out=dlogits)
    dlogits -= one_hot(xp, targets, first, table.shape[0], x.dtype)
    dlogits *= scale
    xp.matmul(dlogits.swapaxes(-1, -2), flat, out=out)
    dx = dlogits @ table  # [p, B*s, V/G] -> [p, B*s, h]
    return dx.reshape(x.shape)  # [p, B*s, h] -> [p, B, s, h]


def merge_triples(xp: Namespace, left: Array, right: Array) -> Array:
    """The triple [p, 3, B·s] of two blocks together: the tree's operation for the head."""
    merged = xp.empty(left.shape, dtype=left.dtype)
    largest = xp.maximum(left[:, 0], right[:, 0])
    merged[:, 0] = largest
    merged[:, 1] = left[:, 1] * xp.exp(left[:, 0] - largest) + right[:, 1] * xp.exp(right[:, 0] - largest)
    merged[:, 2] = left[:, 2] + right[:, 2]
    return merged


def token_losses(xp: Namespace, triple: Array) -> tuple[Array, Array]:
    """The cross-entropy of each token and the log-sum-exp of its logits, both [p, B·s], from the triple of all blocks.
    """
    logsumexp = triple[:, 0] + xp.log(triple[:, 1])
    return logsumexp - triple[:, 2], logsumexp
