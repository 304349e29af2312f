"""What every function of a reference or a schedule is given: the configuration, the grid, the namespace, the books."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ..accounting.memory import Memory
from ..accounting.phase import Phase
from ..accounting.work import Work
from ..arrays import Array, Namespace, Tiles
from ..backends.host import Backend, backend_of
from ..errors import UserError
from ..grid.grid import ALONE, Grid, Place
from ..ops.attention import causal_mask
from ..ops.rotary import rotary_table
from .config import Config

RECOMPUTE = ("none", "attention", "full")


class Model:
    """A model as one rank sees it, without its weights. A single process is alone on both axes.

    config     as given
    backend    the library that computes, as given or over the namespace that was given; if `counted`, NumPy whose
               arrays and products are all entered in the books
    xp         its namespace
    grid       from the rank's places on the axis of weights and on that of tokens, and the layout
    recompute  what the backward computes anew rather than find kept: "none", "attention" (everything between the
               input and the output of an attention part), "full" (everything but the layers' inputs)
    memory, work, phase  the books, and the phase that is entered in them
    mask       [s, s], the causal mask of a tile against itself
    rotary     slot -> [2, s, e], the angles of the positions in this rank's slots
    """

    def __init__(
        self, config: Config, library: Namespace | Backend, weight_axis: Place = ALONE, token_axis: Place = ALONE, *,
        layout: str = "zigzag", recompute: str = "none", counted: bool = False
    ) -> None:
        if recompute not in RECOMPUTE:
            raise UserError(f"--recompute {recompute} is unknown: use one of {', '.join(RECOMPUTE)}")
        self.config = config
        self.memory = Memory()
        self.work = Work()
        backend = backend_of(library)
        self.backend = backend.counted(self.memory, self.work) if counted else backend
        self.xp = self.backend.xp
        self.grid = Grid(config.blocks, config.tiles, config.tile_len, weight_axis, token_axis, layout)
        self.recompute = recompute
        self.coming: dict[int, Any] = {}  # by tag: what has set off to this rank for a part to come
        self.following: list[Callable[[], None]] = []  # what sets off next, once a part has posted its own messages
        self.leaving: deque[list[Any]] = deque()  # sends that nobody waits for yet
        self.put_off: list[Callable[[], Any]] = []  # what of earlier parts' backwards is still to be done
        self.mask: Array = causal_mask(self.xp, config.tile_len, config.dtype)
        self.rotary: Tiles = {
            slot: rotary_table(self.xp, self.grid.tokens(slot).start, config.tile_len, config.head_dim,
                               config.rope_theta, config.dtype)
            for slot in self.grid.slots
        }

    @property
    def phase(self) -> Phase:
        """The phase that the books are at."""
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
