"""The weights as a rank holds them: whole blocks, each one flat array that travels as it lies, and how they begin.

A block of a layer's attention is {wq, wk, wv, wo} of H/G query heads and K/G key/value heads, and their biases
{bq, bk, bv}, if the model has any; a block of its MLP is {gate, up, down} of f/G columns; a block of the embedding or
of the head is V/G rows, rounded up: rows of no token, at the end of the last block, are zeros and stay so. The small
gains of the norms are replicated. Gradients and optimizer moments have the same form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from .config import Config
from .model import Model


@dataclass
class Parameters:
    """What one rank holds; m is the number of its blocks."""

    embedding: Array  # [m, V/G, h]
    attention: list[Array]  # for each layer [m, size of a packed block]
    mlp: list[Array]  # for each layer [m, size of a packed block]
    head: Array | None  # [m, V/G, h], or None where the head is the embedding
    gains: Array  # [2L+1, h]: attention and MLP norm of each layer, then the last norm; see `gain_width`

    @property
    def head_table(self) -> Array:
        """The head's rows [m, V/G, h], wherever they are kept."""
        return self.embedding if self.head is None else self.head

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Every array that is dealt out by blocks, named, in the canonical order."""
        yield "embedding", self.embedding
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp)):
            yield f"layers.{layer}.attention", attention
            yield f"layers.{layer}.mlp", mlp
        if self.head is not None:
            yield "head", self.head


def attention_shapes(config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of wqkv, which is wq, wk and wv side by side, and of wo, in one block."""
    query = config.num_heads // config.blocks * config.head_dim
    key = config.kv_heads_per_block * config.head_dim
    return (config.hidden_size, query + 2 * key), (query, config.hidden_size)


def attention_size(config: Config) -> int:
    """The entries of one packed block of heads: wqkv, wo, and the bias of what wqkv gives, if there is one."""
    (hidden, width), (query, _) = attention_shapes(config)
    return hidden * width + query * hidden + (width if config.qkv_bias else 0)


def mlp_size(config: Config) -> int:
    """The entries of one packed block of the MLP."""
    return sum(rows * columns for rows, columns in mlp_shapes(config))


def gain_width(config: Config) -> int:
    """The length of a row of gains: h. Where heads are normed, h + 2e: the rows of attention norms end with the gains
    of queries and keys, and what is there in the other rows is not used, has no gradient, and stays 1."""
    return config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)


def mlp_shapes(config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of gate and up side by side, and of down, in one block."""
    width = config.ffn_size // config.blocks
    return (config.hidden_size, 2 * width), (width, config.hidden_size)


def attention_views(config: Config, block: Array) -> tuple[Array, Array]:
    """wqkv [h, (H+2K)/G·e] and wo [H/G·e, h] as views of a packed block, or [p, ...] of p of them."""
    return _views(block, *attention_shapes(config))


def mlp_views(config: Config, block: Array) -> tuple[Array, Array]:
    """gate_up [h, 2f/G] and down [f/G, h] as views of a packed block, or [p, ...] of p of them."""
    return _views(block, *mlp_shapes(config))


def bias_view(config: Config, block: Array) -> Array | None:
    """The biases of queries, keys and values side by side [(H+2K)/G·e], as a view of a packed block of heads, or
    [p, ...] of p of them; None where the model has none."""
    return block[..., -attention_shapes(config)[0][1] :] if config.qkv_bias else None


def _views(block: Array, first: tuple[int, int], second: tuple[int, int]) -> tuple[Array, Array]:
    cut, stack = first[0] * first[1], block.shape[:-1]
    end = cut + second[0] * second[1]
    return block[..., :cut].reshape(*stack, *first), block[..., cut:end].reshape(*stack, *second)


def named_views(config: Config, name: str, block: Array) -> dict[str, Array]:
    """The matrices and biases of one block of the tensor called `name`, under the field's names."""
    if name.endswith("attention"):
        wqkv, wo = attention_views(config, block)
        query = wo.shape[0]
        key = config.kv_heads_per_block * config.head_dim
        parts = {"q": slice(query), "k": slice(query, query + key), "v": slice(query + key, None)}
        bias = bias_view(config, block)
        biases = {} if bias is None else {f"b{part}": bias[columns] for part, columns in parts.items()}
        return {**{f"w{part}": wqkv[:, columns] for part, columns in parts.items()}, "wo": wo, **biases}
    if name.endswith("mlp"):
        gate_up, down = mlp_views(config, block)
        width = down.shape[0]
        return {"gate": gate_up[:, :width], "up": gate_up[:, width:], "down": down}
    return {"table": block}


def zero_parameters(model: Model, kind: str) -> Parameters:
    """Zeros in the form of this rank's parameters, counted in its memory as `kind`."""
    config, count = model.config, len(model.grid.blocks)
    table = (count, config.rows_per_block, config.hidden_size)

    def zeros(*shape: int) -> Array:
        return model.memory.track(kind, model.xp.zeros(shape, dtype=config.dtype))

    return Parameters(
        embedding=zeros(*table),
        attention=[zeros(count, attention_size(config)) for _ in range(config.num_layers)],
        mlp=[zeros(count, mlp_size(config)) for _ in range(config.num_layers)],
        head=None if config.tied_head else zeros(*table),
        gains=zeros(2 * config.num_layers + 1, gain_width(config)),
    )


def initial_parameters(model: Model) -> Parameters:
    """This rank's blocks of the initial weights: each drawn from a generator keyed by (seed, tensor, block).

    Standard deviation 0.02, and 0.02 / sqrt(2L) for the matrices that write into the residual stream, as in GPT-2;
    biases, and rows of the vocabulary that are no token's, are zeros. Nothing depends on the rank, and no rank ever
    draws a block that it does not own.
    """
    config = model.config
    parameters = zero_parameters(model, "weights")
    parameters.gains[...] = 1.0
    for number, (name, tensor) in enumerate(parameters.tensors()):
        for array, block in zip(tensor, model.grid.blocks):
            generator = np.random.default_rng([config.seed, number, block])
            drawn = generator.standard_normal(array.shape, dtype=np.dtype(config.dtype).type)
            array[...] = model.backend.from_host(0.02 * drawn)
            for field, matrix in named_views(config, name, array).items():
                if field in ("wo", "down"):
                    matrix *= (2 * config.num_layers) ** -0.5
                elif field == "table":
                    matrix[config.tokens_in_block(block) :] = 0.0
                elif field in ("bq", "bk", "bv"):
                    matrix[...] = 0.0
    return parameters
