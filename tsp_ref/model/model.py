"""What every function of a reference or a schedule is given: the configuration, the grid, the namespace, the
accounts."""

from __future__ import annotations

from ..accounting.memory import Memory
from ..accounting.phase import Phase
from ..accounting.work import Work
from ..arrays import Array, Namespace
from ..backends.host import Backend, backend_of
from ..errors import UserError
from ..grid.grid import ALONE, Grid, Place
from ..ops.attention import PADDED_BYTES, causal_mask
from ..ops.rotary import rotary_table
from .config import Config

RECOMPUTE = ("none", "attention", "full")

STACK_BYTES = 512 * 1024
"""Of the largest array of a stack of tiles, at most, where the number of tiles is not given: with the others it fits
the second-level cache of most processors (chosen by measurement)."""


class Model:
    """A model as one rank sees it, without its weights. A single process is alone on both axes.

    config     as given
    backend    the library that computes, as given or over the namespace that was given; if `counted`, NumPy whose
               arrays and products are all entered in the accounts
    xp         its namespace
    grid       from the rank's places on the axis of weights and on that of tokens, and the layout
    stacks     the rank's tiles, `stack` at a time (chosen by their size, if it is not given): a matter of speed alone
    head_groups  the rank's blocks, so many at a time as one may attend with that holds the whole sequence: likewise
    recompute  what the backward recomputes rather than find kept: "none", "attention" (everything between the input and
               the output of an attention sub-layer), "full" (everything but the layers' inputs)
    memory, work, phase  the accounts, and the phase that is entered in them
    mask       [s, s], the causal mask of a tile against itself
    rotary     [p, 2, s, e], the angles of the positions in this rank's tiles
    """

    def __init__(
        self, config: Config, library: Namespace | Backend, weight_axis: Place = ALONE, token_axis: Place = ALONE, *,
        layout: str = "zigzag", recompute: str = "none", counted: bool = False, stack: int | None = None
    ) -> None:
        if recompute not in RECOMPUTE:
            raise UserError(f"--recompute {recompute} is unknown: use one of {', '.join(RECOMPUTE)}")
        if stack is not None and stack < 1:
            raise UserError(f"--stack {stack} is not valid: use 1 or more tiles at a time, or leave it out")
        self.config = config
        self.memory = Memory()
        self.work = Work()
        backend = backend_of(library)
        self.backend = backend.counted(self.memory, self.work) if counted else backend
        self.xp = self.backend.xp
        self.grid = Grid(config.blocks, config.tiles, config.tile_len, weight_axis, token_axis, layout)
        self.stacks = self.grid.stacks(stack or tiles_at_a_time(config))
        self.head_groups = self._head_groups()
        self.recompute = recompute
        self.mask: Array = causal_mask(self.xp, config.tile_len, config.dtype)
        self.rotary: Array = self.xp.stack([
            rotary_table(self.xp, self.grid.tokens(slot).start, config.tile_len, config.head_dim, config.rope_theta,
                         config.dtype, config.rope_scaling) for slot in self.grid.slots])

    @property
    def phase(self) -> Phase:
        """The phase that the accounts are at."""
        return self.work.phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.work.phase = self.memory.phase = phase

    def empty(self, kind: str, *shape: int) -> Array:
        """A new array of the model's dtype, counted in this rank's memory as `kind`."""
        return self.memory.track(kind, self.xp.empty(shape, dtype=self.config.dtype))

    def number(self, array: Array) -> float:
        """The number in an array of one element, once it is computed."""
        return float(self.backend.to_host(array).item())

    def _head_groups(self) -> list[range]:
        """Few enough for a tile's scores to have at most PADDED_BYTES, or one."""
        config, blocks = self.config, self.grid.blocks
        rows = config.batch_size * config.kv_heads_per_block * config.group_size * config.tile_len
        most = max(1, PADDED_BYTES // (rows * config.seq_len * (8 if config.dtype == "float64" else 4)))
        return [blocks[first : first + most] for first in range(0, len(blocks), most)]


def tiles_at_a_time(config: Config) -> int:
    """How many tiles to take at a time: a power of two, so that their sums fill the tree's nodes, and so few that the
    largest array of a stack has at most STACK_BYTES. That is a tile's own, or the gradient of a block that it
    leaves."""
    hidden, width = config.hidden_size, 2 * config.ffn_size // config.blocks
    tile = config.batch_size * config.tile_len * max(hidden, width)
    gradient = hidden * 3 * config.ffn_size // config.blocks
    itemsize = 8 if config.dtype == "float64" else 4
    most = max(1, STACK_BYTES // (itemsize * max(tile, gradient)))
    return 1 << (min(most, config.tiles).bit_length() - 1)
