"""A textbook model on whole arrays: no grid, no tree, none of `ops`. The independent judge of the other models.

Everything is written for the eye: [S, S] scores, [B, S, V] logits, keys repeated for their query heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..model.config import Config
from ..model.parameters import Parameters, named_views

Weights = dict[str, Any]
"""embedding and head [V, h], gains [2L+1, h], layers: a list of {wq, wk, wv [h, ...], wo [..., h], gate, up, down},
with {bq, bk, bv [...]} if the model has biases; with norms of heads, the gains of queries and keys, [e] each, stand
after the h of an attention's norm, in rows of h + 2e."""


def assemble(config: Config, parameters: Parameters) -> Weights:
    """Whole matrices from one process's blocks: columns and biases side by side, rows (wo, down, tables) one below the
    other; without the rows of the vocabulary that are no token's."""
    layers: list[Weights] = [{} for _ in range(config.num_layers)]
    for name, tensor in parameters.tensors():
        if name.startswith("layers."):
            blocks = [named_views(config, name, block) for block in tensor]
            for field in blocks[0]:
                axis = 0 if field in ("wo", "down") else -1
                layers[int(name.split(".")[1])][field] = np.concatenate([views[field] for views in blocks], axis)
    size, width = config.vocab_size, config.hidden_size
    embedding = parameters.embedding.reshape(-1, width)[:size]
    head = None if parameters.head is None else parameters.head.reshape(-1, width)[:size]
    return {"embedding": embedding, "head": head, "gains": parameters.gains, "layers": layers}


def rms(x: Array, eps: float) -> Array:
    """Root of the mean square of each token, or of each of its heads, [..., 1]."""
    return np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def norm_backward(dy: Array, x: Array, gain: Array, eps: float) -> tuple[Array, Array]:
    """dx and dgain of x / rms(x) · gain, for x [B, ..., h] and gain [h], or heads of size e."""
    size = rms(x, eps)
    dunit = dy * gain
    dx = dunit / size - x * (dunit * x).mean(-1, keepdims=True) / size**3
    return dx, (dy * x / size).sum(tuple(range(x.ndim - 1)))


def frequencies_of(config: Config) -> Array:
    """What pair i of a head's entries turns by from one token to the next, [e/2]: theta^(-2i/e); with Llama 3's
    scaling, less for pairs of long wavelengths."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=config.dtype) / half)
    if config.rope_factor == 1:
        return frequencies
    low, high, length = config.rope_low_freq_factor, config.rope_high_freq_factor, config.rope_original_length
    for pair, frequency in enumerate(frequencies):
        turns = length * frequency / (2 * np.pi)
        if turns < low:
            frequencies[pair] = frequency / config.rope_factor
        elif turns < high:
            part = (turns - low) / (high - low)
            frequencies[pair] = (1 - part) * frequency / config.rope_factor + part * frequency
    return frequencies


def rotate(x: Array, frequencies: Array, direction: float = 1.0) -> Array:
    """Rotary embedding as complex numbers: entries i and i + e/2 are one number, turned by position · frequency."""
    half = x.shape[-1] // 2
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


def silu(x: Array) -> Array:
    """x · sigmoid(x)."""
    return x / (1 + np.exp(-x))


def heads_of(config: Config, w: Weights, name: str, a: Array) -> Array:
    """The heads of queries ("q"), keys or values before anything is done to them: a [B, S, h] -> [B, heads, S, e]."""
    projected = a @ w[f"w{name}"]
    if config.qkv_bias:
        projected = projected + w[f"b{name}"]
    return split(projected, config.head_dim)  # [B, S, ...] -> [B, ..., S, e]


def gains_of(config: Config, gains: Array) -> tuple[Array, Array, Array, Array]:
    """The gains of a layer [2, length of a row] as those of its two norms [h] and of its queries and keys [e]; ones,
    where heads are not normed."""
    h, e = config.hidden_size, config.head_dim
    if not config.qk_norm:
        return gains[0], gains[1], np.ones(e, gains.dtype), np.ones(e, gains.dtype)
    return gains[0, :h], gains[1, :h], gains[0, h : h + e], gains[0, h + e :]


def layer_forward(config: Config, w: Weights, gains: Array, x: Array) -> tuple[Array, Weights]:
    """One layer: x [B, S, h], its gains -> [B, S, h], and everything that was computed on the way, by name."""
    eps, frequencies, g = config.norm_eps, frequencies_of(config), config.group_size
    gain_attention, gain_mlp, gain_q, gain_k = gains_of(config, gains)
    a = x / rms(x, eps) * gain_attention
    plain_q, plain_k = heads_of(config, w, "q", a), heads_of(config, w, "k", a)  # -> [B, H, S, e], [B, K, S, e]
    q, k = plain_q, plain_k
    if config.qk_norm:
        q, k = q / rms(q, eps) * gain_q, k / rms(k, eps) * gain_k
    q = rotate(q, frequencies)
    k = rotate(k, frequencies).repeat(g, 1)  # [B, K, S, e] -> [B, H, S, e]
    v = heads_of(config, w, "v", a).repeat(g, 1)  # [B, S, h] -> [B, H, S, e]
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(np.array(config.head_dim, x.dtype))  # [B, H, S, e] -> [B, H, S, S]
    future = np.triu(np.ones(scores.shape[-2:], bool), 1)  # [S, S]
    p = softmax(np.where(future, -np.inf, scores))
    heads = join(p @ v)  # [B, H, S, S] -> [B, S, H*e]
    middle = x + heads @ w["wo"]
    b = middle / rms(middle, eps) * gain_mlp
    gate, up = b @ w["gate"], b @ w["up"]  # -> [B, S, f], [B, S, f]
    y = middle + (silu(gate) * up) @ w["down"]
    return y, dict(x=x, a=a, plain_q=plain_q, plain_k=plain_k, q=q, k=k, v=v, p=p, heads=heads, middle=middle, b=b,
                   gate=gate, up=up)


def layer_backward(
    config: Config, w: Weights, gains: Array, dy: Array, kept: Weights
) -> tuple[Array, Weights, Array]:
    """dy [B, S, h] -> dx [B, S, h], the gradients of the layer's matrices and biases by name, and that of its gains."""
    eps, frequencies, e, g = config.norm_eps, frequencies_of(config), config.head_dim, config.group_size
    gain_attention, gain_mlp, gain_q, gain_k = gains_of(config, gains)
    a, b, q, k, v, p, gate, up = (kept[name] for name in ("a", "b", "q", "k", "v", "p", "gate", "up"))
    sigmoid = 1 / (1 + np.exp(-gate))
    dgated = dy @ w["down"].T  # [B, S, h] -> [B, S, f]
    dup = dgated * gate * sigmoid
    dgate = dgated * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    db = dgate @ w["gate"].T + dup @ w["up"].T
    dmiddle, dgain_mlp = norm_backward(db, kept["middle"], gain_mlp, eps)
    dmiddle = dmiddle + dy
    dheads = split(dmiddle @ w["wo"].T, e)  # [B, S, h] -> [B, H, S, e]
    dv = p.swapaxes(-1, -2) @ dheads  # [B, H, S, S] -> [B, H, S, e]
    dp = dheads @ v.swapaxes(-1, -2)  # [B, H, S, e] -> [B, H, S, S]
    dscores = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(np.array(e, dy.dtype))
    dq = rotate(dscores @ k, frequencies, -1.0)  # [B, H, S, S] -> [B, H, S, e]
    dk = rotate(fold(dscores.swapaxes(-1, -2) @ q, g), frequencies, -1.0)  # [B, H, S, S] -> [B, K, S, e]
    dgains = np.zeros_like(gains)
    if config.qk_norm:
        dq, dgain_q = norm_backward(dq, kept["plain_q"], gain_q, eps)
        dk, dgain_k = norm_backward(dk, kept["plain_k"], gain_k, eps)
        dgains[0, config.hidden_size :] = np.concatenate([dgain_q, dgain_k])
    dq, dk, dv = join(dq), join(dk), join(fold(dv, g))  # -> [B, S, H*e], [B, S, K*e], [B, S, K*e]
    da = dq @ w["wq"].T + dk @ w["wk"].T + dv @ w["wv"].T
    dx, dgains[0, : config.hidden_size] = norm_backward(da, kept["x"], gain_attention, eps)
    dgains[1, : config.hidden_size] = dgain_mlp
    gradients = {
        "wq": product(a, dq), "wk": product(a, dk), "wv": product(a, dv), "wo": product(kept["heads"], dmiddle),
        "gate": product(b, dgate), "up": product(b, dup), "down": product(silu(gate) * up, dy),
    }
    if config.qkv_bias:
        gradients |= {"bq": dq.sum((0, 1)), "bk": dk.sum((0, 1)), "bv": dv.sum((0, 1))}
    return dx + dmiddle, gradients, dgains


def fold(dx: Array, copies: int) -> Array:
    """The gradient of heads that were repeated: the sum over their copies. [B, H, S, e] -> [B, K, S, e]."""
    batch, heads, length, size = dx.shape
    return dx.reshape(batch, heads // copies, copies, length, size).sum(2)


def product(x: Array, dy: Array) -> Array:
    """The gradient of w in x @ w: [B, S, i], [B, S, o] -> [i, o]. (Optimised, it is computed by BLAS.)"""
    return np.einsum("bsi,bso->io", x, dy, optimize=True)


def loss_and_gradients(config: Config, weights: Weights, tokens: Array, targets: Array) -> dict[str, Any]:
    """tokens, targets [B, S]. Returns loss, logits [B, S, V] and gradients, in the form of `weights`."""
    gains, embedding, h = weights["gains"], weights["embedding"], config.hidden_size
    head = embedding if weights["head"] is None else weights["head"]
    x, kept = embedding[tokens], []
    for layer, w in enumerate(weights["layers"]):
        x, computed = layer_forward(config, w, gains[2 * layer : 2 * layer + 2], x)
        kept.append(computed)
    last = x / rms(x, config.norm_eps) * gains[-1, :h]
    logits = last @ head.T  # [B, S, h] -> [B, S, V]
    right = np.arange(config.vocab_size) == targets[..., None]  # [B, S] -> [B, S, V]
    p = softmax(logits)
    largest = logits.max(-1)  # [B, S, V] -> [B, S]
    losses = largest + np.log(np.exp(logits - largest[..., None]).sum(-1)) - logits[right].reshape(targets.shape)

    dlogits = (p - right.astype(p.dtype)) / targets.size
    dhead: Array | None = product(dlogits, last)  # -> [V, h]
    dgains = np.zeros_like(gains)
    dlayers: list[Weights] = []
    dx, dgains[-1, :h] = norm_backward(dlogits @ head, x, gains[-1, :h], config.norm_eps)
    for layer in reversed(range(config.num_layers)):
        pair = slice(2 * layer, 2 * layer + 2)
        dx, dmatrices, dgains[pair] = layer_backward(config, weights["layers"][layer], gains[pair], dx, kept[layer])
        dlayers.insert(0, dmatrices)
    dembedding = np.zeros_like(embedding)
    np.add.at(dembedding, tokens, dx)
    if weights["head"] is None:
        dembedding, dhead = dembedding + dhead, None
    gradients = {"embedding": dembedding, "head": dhead, "gains": dgains, "layers": dlayers}
    return {"loss": float(losses.mean()), "logits": logits, "gradients": gradients}
