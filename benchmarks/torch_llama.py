"""The model of `tsp_ref` in PyTorch, eager: the process that `vs_torch.py` asks for one training step at a time.

The same weights to begin with, the same tokens, AdamW and clipping. It is written as one would write it for speed in a
few lines: fused projections, PyTorch's own RMSNorm, attention, cross-entropy and fused AdamW.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from common import json, np, random_text, serve
from torch import Tensor, nn

from tsp_ref.model.config import Config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import initial_parameters
from tsp_ref.reference.naive import assemble, frequencies_of, gains_of
from tsp_ref.training.data import TRAINING, Text, batch
from tsp_ref.training.optimizer import learning_rate


def matrix(*parts: Any) -> nn.Parameter:
    """Weights [in, out], side by side, as PyTorch keeps them: [out, in]."""
    return nn.Parameter(torch.from_numpy(np.ascontiguousarray(np.concatenate(parts, 1).T)))


def vector(*parts: Any) -> nn.Parameter:
    """Gains, or biases side by side."""
    return nn.Parameter(torch.from_numpy(np.concatenate(parts)))


class Layer(nn.Module):
    """One layer."""

    def __init__(self, config: Config, weights: dict[str, Any], gains: Any) -> None:
        super().__init__()
        self.config = config
        attention, mlp, *of_heads = gains_of(config, gains)
        self.gains = nn.ParameterList(vector(gain) for gain in (attention, mlp))
        self.gains_of_heads = nn.ParameterList(vector(gain) for gain in of_heads) if config.qk_norm else None
        self.wqkv = matrix(weights["wq"], weights["wk"], weights["wv"])
        self.bias = vector(*(weights[name] for name in ("bq", "bk", "bv"))) if config.qkv_bias else None
        self.wo = matrix(weights["wo"])
        self.gate_up = matrix(weights["gate"], weights["up"])
        self.down = matrix(weights["down"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        c = self.config
        query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        a = F.rms_norm(x, (c.hidden_size,), self.gains[0], c.norm_eps)
        q, k, v = (part.unflatten(-1, (-1, c.head_dim)).transpose(1, 2)  # [B, S, heads*e] -> [B, heads, S, e]
                   for part in F.linear(a, self.wqkv, self.bias).split((query, kv, kv), -1))
        if self.gains_of_heads is not None:
            q, k = (F.rms_norm(part, (c.head_dim,), gain, c.norm_eps)
                    for part, gain in zip((q, k), self.gains_of_heads))
        heads = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True,
                                               enable_gqa=c.group_size > 1)
        x = x + F.linear(heads.transpose(1, 2).flatten(2), self.wo)
        b = F.rms_norm(x, (c.hidden_size,), self.gains[1], c.norm_eps)
        gate, up = F.linear(b, self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split: [B, heads, S, e] by the angles [S, e/2]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Llama(nn.Module):
    """The whole model, from the weights that `tsp_ref` begins with."""

    def __init__(self, config: Config, weights: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        gains = weights["gains"]
        self.embedding = nn.Parameter(torch.from_numpy(weights["embedding"].copy()))
        self.layers = nn.ModuleList(Layer(config, layer, gains[2 * number : 2 * number + 2])
                                    for number, layer in enumerate(weights["layers"]))
        self.gain = vector(gains[-1, : config.hidden_size])
        self.head = self.embedding if config.tied_head else nn.Parameter(torch.from_numpy(weights["head"].copy()))
        frequencies = torch.from_numpy(frequencies_of(config))
        angles = torch.arange(config.seq_len, dtype=self.gain.dtype)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of a batch [B, S]."""
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        x = F.rms_norm(x, (self.config.hidden_size,), self.gain, self.config.norm_eps)
        return F.cross_entropy(F.linear(x, self.head).flatten(0, 1), targets.flatten())


class TorchTraining:
    """The training that `tsp_ref.training.loop` does, in PyTorch."""

    def __init__(self, config: Config, text: Text, device: str = "cpu") -> None:
        self.config, self.text, self.device = config, text, device
        self.model = Model(config, np)  # for its grid, by which batches are cut
        self.llama = Llama(config, assemble(config, initial_parameters(self.model))).to(device)
        parameters = list(self.llama.parameters())
        self.optimizer = torch.optim.AdamW(
            [{"params": [each for each in parameters if each.ndim > 1], "weight_decay": config.weight_decay},
             {"params": [each for each in parameters if each.ndim == 1], "weight_decay": 0.0}],
            betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
        self.steps_done = 0

    def step(self) -> tuple[float, float]:
        """Forward, backward, clipping, AdamW; the loss, and the gradients' norm before clipping."""
        tokens, targets = (torch.from_numpy(self.whole(part)).to(self.device)
                           for part in batch(self.model, self.text, TRAINING, self.steps_done))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps_done)
        self.optimizer.zero_grad()
        loss = self.llama(tokens, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.llama.parameters(), self.config.clip_norm or float("inf"))
        self.optimizer.step()
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.steps_done += 1
        return float(loss.detach()), float(norm)

    def whole(self, tiles: dict[int, Any]) -> Any:
        """[p, B, s] of all slots -> [B, S]."""
        order = np.argsort(self.model.grid.tiles_of(0))
        return np.concatenate(tiles[order], 1)


def main() -> None:
    """Serve until the parent hangs up. Arguments: the configuration as JSON, the number of threads, cpu or cuda (which
    ROCm's builds say, too), a socket's path."""
    config = Config(**json.loads(sys.argv[1]))
    torch.set_num_threads(int(sys.argv[2]))
    # Products in float32, and not in TensorFloat-32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    training = TorchTraining(config, random_text(config), sys.argv[3])

    def step() -> dict[str, Any]:
        begin = time.perf_counter()
        loss, norm = training.step()
        return {"seconds": time.perf_counter() - begin, "loss": loss, "norm": norm}

    serve(sys.argv[4], 0, {"step": step})


if __name__ == "__main__":
    main()
