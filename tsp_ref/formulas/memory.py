"""What a rank must hold between layers: model state and kept activations, exactly, for any N, mesh and layout."""

from __future__ import annotations

import numpy as np

from ..grid.grid import Grid
from ..model.config import Config
from .messages import Sizes


def alone(config: Config) -> Grid:
    """The grid of a single process."""
    return Grid(config.blocks, config.tiles, config.tile_len)


def itemsize(config: Config) -> int:
    """Bytes of an element."""
    return np.dtype(config.dtype).itemsize


def gain_bytes(config: Config) -> int:
    """The part of the model state that every rank holds whole: the gains of the norms, with gradients and moments."""
    return 4 * Sizes(config).gains * itemsize(config)


def model_state_bytes(config: Config, grid: Grid | None = None) -> int:
    """Weights, gradients and both moments: of this rank's blocks, and of all gains. Without a grid, of one process.

    Of what is dealt out by blocks a rank holds 1/N under TP, TSP and FSDP+SP, everything under SP, 1/T on a mesh.
    """
    sizes = Sizes(config)
    tables = 1 if config.tied_head else 2
    block = config.num_layers * (sizes.attention + sizes.mlp) + tables * sizes.table
    return 4 * len((grid or alone(config)).blocks) * block * itemsize(config) + gain_bytes(config)


def activation_bytes(config: Config, grid: Grid | None = None, recompute: str = "none", folded: bool = False) -> int:
    """What the forward of a whole batch keeps for its backward on this rank. Without a grid, in one process.

    For each of its tokens and layers the input of the attention (h) and, unless `full`, of the MLP (h); for the
    head its input (h) and a log-sum-exp (1). For each of its tokens, layers and blocks that it computes with, unless
    they are recomputed: queries and the heads' output (2·H·e/G), keys and values (2·K·e/G), a log-sum-exp for each
    head (H/G); gate and up (2·f/G), unless `full`.

    folded: under TSP and FSDP+SP a rank computes with all blocks, not only with its own. So these two and SP keep
    1/N of what one process keeps. TP keeps 1/N of what lies in blocks, but the inputs of all tokens: with `full`,
    when nothing else is kept, that is all of it; on a mesh, 1/Σ.
    """
    grid = grid or alone(config)
    tokens = config.batch_size * config.tile_len * len(grid.slots)
    blocks = config.blocks if folded else len(grid.blocks)
    inputs = config.num_layers * config.hidden_size * (1 if recompute == "full" else 2) + config.hidden_size + 1
    attention = (2 * (config.num_heads + config.num_kv_heads) * config.head_dim + config.num_heads) // config.blocks
    mlp = 2 * config.ffn_size // config.blocks
    in_blocks = {"none": attention + mlp, "attention": mlp, "full": 0}[recompute]
    return tokens * (inputs + config.num_layers * blocks * in_blocks) * itemsize(config)
