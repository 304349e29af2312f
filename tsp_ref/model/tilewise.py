"""What a rank does to its own tiles and blocks without any message: the same in the reference and in every schedule."""

from __future__ import annotations

from ..arrays import Array, Tiles
from ..grid.tree import Tree
from ..ops.norm import inverse_rms, rmsnorm_backward, rmsnorm_forward
from .activations import Saved
from .model import Model
from .parameters import Parameters


def normalise(model: Model, x: Tiles, gain: Array) -> Tiles:
    """RMSNorm of every tile; the backward computes it anew rather than keep it."""
    return {slot: rmsnorm_forward(model.xp, x[slot], gain, model.config.norm_eps)[0] for slot in model.grid.slots}


def normalise_backward(model: Model, dy: Tiles, x: Tiles, gain: Array, dgain: Tiles, row: int) -> Tiles:
    """dx; each tile's gradient of the gain goes into row `row` of the tile's dgain [2L+1, h]."""
    dx: Tiles = {}
    for slot in model.grid.slots:
        inverse = inverse_rms(model.xp, x[slot], model.config.norm_eps)
        dx[slot], dgain[slot][row] = rmsnorm_backward(model.xp, dy[slot], x[slot], gain, inverse)
    return dx


def add_residual(model: Model, x: Tiles, part: Tiles) -> Tiles:
    """x plus a part's output, a new array for each tile."""
    return {slot: model.memory.track("activations", x[slot] + part[slot]) for slot in model.grid.slots}


def totals(trees: dict[int, Tree[Array]]) -> Tiles:
    """The finished sum of every slot."""
    return {slot: tree.total for slot, tree in trees.items()}


def squares(model: Model, gradients: Parameters, position: int) -> Array:
    """The sum of squares of each tensor's block at `position` among those that this rank holds: [number of tensors]."""
    blocks = [tensor[position].reshape(-1) for _, tensor in gradients.tensors()]
    return model.xp.stack([model.xp.vdot(block, block) for block in blocks])


def forget(model: Model, saved: Saved) -> None:
    """Drop, of the layer that was kept last, what the backward will compute anew."""
    if model.recompute != "none":
        saved.attention[-1].keep_input_only()
    if model.recompute == "full":
        saved.mlp[-1].keep_nothing()
