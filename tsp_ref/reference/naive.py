"""A textbook model on whole arrays: no grid, no tree, none of `ops`. The independent judge of the other models.

Everything is written for the eye: [S, S] scores, [B, S, V] logits, keys repeated for their query heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..config import Config
from ..parameters import Parameters, named_views

Weights = dict[str, Any]
"""embedding and head [V, h], gains [2L+1, h], layers: a list of {wq, wk, wv [h, ...], wo [..., h], gate, up, down}."""


def assemble(config: Config, parameters: Parameters) -> Weights:
    """Whole matrices from one process's blocks: columns side by side, rows (wo, down, tables) one below the other."""
    layers: list[Weights] = [{} for _ in range(config.num_layers)]
    for name, tensor in parameters.tensors():
        if name.startswith("layers."):
            blocks = [named_views(config, name, block) for block in tensor]
            for field in blocks[0]:
                axis = 0 if field in ("wo", "down") else 1
                layers[int(name.split(".")[1])][field] = np.concatenate([views[field] for views in blocks], axis)
    embedding = parameters.embedding.reshape(config.vocab_size, -1)
    head = None if parameters.head is None else parameters.head.reshape(config.vocab_size, -1)
    return {"embedding": embedding, "head": head, "gains": parameters.gains, "layers": layers}


def rms(x: Array, eps: float) -> Array:
    """Root of the mean square of each token, [..., 1]."""
    return np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def norm_backward(dy: Array, x: Array, gain: Array, eps: float) -> tuple[Array, Array]:
    """dx and dgain of x / rms(x) · gain."""
    size = rms(x, eps)
    dunit = dy * gain
    dx = dunit / size - x * (dunit * x).mean(-1, keepdims=True) / size**3
    return dx, (dy * x / size).sum((0, 1))


def rotate(x: Array, theta: float, direction: float = 1.0) -> Array:
    """Rotary embedding as complex numbers: entries i and i + e/2 are one number, turned by position · theta^(-2i/e)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half, dtype=x.dtype) / half)
    angles = direction * np.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequencies
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def split(x: Array, head_dim: int) -> Array:
    """[B, S, heads·e] -> [B, heads, S, e]."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def join(x: Array) -> Array:
    """[B, heads, S, e] -> [B, S, heads·e]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def softmax(x: Array) -> Array:
    """Along the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def loss_and_gradients(config: Config, weights: Weights, tokens: Array, targets: Array) -> dict[str, Any]:
    """tokens, targets [B, S]. Returns loss, logits [B, S, V] and gradients, in the form of `weights`."""
    eps, theta, e, g = config.norm_eps, config.rope_theta, config.head_dim, config.group_size
    gains, embedding = weights["gains"], weights["embedding"]
    head = embedding if weights["head"] is None else weights["head"]
    hidden_from_future = np.triu(np.ones((tokens.shape[1],) * 2, bool), 1)

    x = embedding[tokens]
    kept = []
    for layer, w in enumerate(weights["layers"]):
        a = x / rms(x, eps) * gains[2 * layer]
        q, k, v = split(a @ w["wq"], e), split(a @ w["wk"], e), split(a @ w["wv"], e)
        q, k = rotate(q, theta), rotate(k, theta)
        k, v = k.repeat(g, 1), v.repeat(g, 1)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(np.array(e, x.dtype))
        p = softmax(np.where(hidden_from_future, -np.inf, scores))
        heads = join(p @ v)
        middle = x + heads @ w["wo"]
        b = middle / rms(middle, eps) * gains[2 * layer + 1]
        gate, up = b @ w["gate"], b @ w["up"]
        gated = gate / (1 + np.exp(-gate)) * up
        kept.append((x, a, q, k, v, p, heads, middle, b, gate, up, gated))
        x = middle + gated @ w["down"]
    last = x / rms(x, eps) * gains[-1]
    logits = last @ head.T
    p = softmax(logits)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    largest = logits.max(-1)
    loss = np.mean(largest + np.log(np.exp(logits - largest[..., None]).sum(-1)) - picked)

    dlogits = p / targets.size
    np.put_along_axis(dlogits, targets[..., None],
                      np.take_along_axis(dlogits, targets[..., None], -1) - dlogits.dtype.type(1 / targets.size), -1)
    dhead = np.einsum("bsv,bsh->vh", dlogits, last)
    dgains = np.empty_like(gains)
    dx, dgains[-1] = norm_backward(dlogits @ head, x, gains[-1], eps)
    dlayers: list[Weights] = [{} for _ in kept]
    for layer in reversed(range(len(kept))):
        w, d = weights["layers"][layer], dlayers[layer]
        x, a, q, k, v, p, heads, middle, b, gate, up, gated = kept[layer]
        d["down"] = np.einsum("bsf,bsh->fh", gated, dx)
        dgated = dx @ w["down"].T
        sig = 1 / (1 + np.exp(-gate))
        dup = dgated * gate * sig
        dgate = dgated * up * (sig + gate * sig * (1 - sig))
        d["gate"], d["up"] = np.einsum("bsh,bsf->hf", b, dgate), np.einsum("bsh,bsf->hf", b, dup)
        dmiddle, dgains[2 * layer + 1] = norm_backward(
            dgate @ w["gate"].T + dup @ w["up"].T, middle, gains[2 * layer + 1], eps)
        dmiddle = dmiddle + dx
        d["wo"] = np.einsum("bsa,bsh->ah", heads, dmiddle)
        dheads = split(dmiddle @ w["wo"].T, e)
        dv = p.swapaxes(-1, -2) @ dheads
        dp = dheads @ v.swapaxes(-1, -2)
        dscores = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(np.array(e, x.dtype))
        dq, dk = rotate(dscores @ k, theta, -1.0), dscores.swapaxes(-1, -2) @ q
        # Every key/value head was repeated g times: its gradient is the sum over its copies.
        batch, _, length, _ = dk.shape
        dk, dv = dk.reshape(batch, -1, g, length, e).sum(2), dv.reshape(batch, -1, g, length, e).sum(2)
        dq, dk, dv = join(dq), join(rotate(dk, theta, -1.0)), join(dv)
        d["wq"], d["wk"], d["wv"] = (np.einsum("bsh,bsa->ha", a, grad) for grad in (dq, dk, dv))
        da = dq @ w["wq"].T + dk @ w["wk"].T + dv @ w["wv"].T
        dx, dgains[2 * layer] = norm_backward(da, x, gains[2 * layer], eps)
        dx = dx + dmiddle
    dembedding = np.zeros_like(embedding)
    np.add.at(dembedding, tokens, dx)
    if weights["head"] is None:
        dembedding, dhead = dembedding + dhead, None
    gradients = {"embedding": dembedding, "head": dhead, "gains": dgains, "layers": dlayers}
    return {"loss": float(loss), "logits": logits, "gradients": gradients}
