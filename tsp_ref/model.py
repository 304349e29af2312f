"""What every function of a reference or a schedule is given: the configuration, the grid, the namespace, the memory."""

from __future__ import annotations

from .arrays import Array, Namespace, Tiles
from .config import Config
from .grid import Grid
from .memory import Memory
from .ops.attention import causal_mask
from .ops.rotary import rotary_table


class Model:
    """A model as one rank sees it, without its weights. A single process is rank 0 of 1.

    config, grid, xp, memory  as given
    mask                      [s, s], the causal mask of a tile against itself
    rotary                    slot -> [2, s, e/2], the angles of the positions in this rank's slots
    """

    def __init__(self, config: Config, xp: Namespace, rank: int = 0, size: int = 1) -> None:
        config.require_ranks(size)
        self.config = config
        self.xp = xp
        self.grid = Grid(config.blocks, config.tiles, config.tile_len, rank, size)
        self.memory = Memory()
        self.mask: Array = causal_mask(xp, config.tile_len, config.dtype)
        self.rotary: Tiles = {
            slot: rotary_table(xp, self.grid.tokens(slot).start, config.tile_len, config.head_dim,
                               config.rope_theta, config.dtype)
            for slot in self.grid.slots
        }

    def empty(self, kind: str, *shape: int) -> Array:
        """A new array of the model's dtype, counted in this rank's memory as `kind`."""
        return self.memory.track(kind, self.xp.empty(shape, dtype=self.config.dtype))
