"""AdamW (arXiv 1711.05101) on the blocks that a rank owns, with warm-up, cosine and clipping.

Everything is elementwise, so no bit depends on N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..arrays import Array
from ..model.config import Config
from ..model.model import Model
from ..model.parameters import Parameters, bias_view, zero_parameters


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to its end at the last step. Steps count from 0.

    Where only the last step is after the warm-up, it is the end; where none is, the rate does not fall.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    falling = config.steps - 1 - config.warmup_steps  # steps, from the peak to the end
    progress = min(1.0, (step - config.warmup_steps) / falling) if falling > 0 else 1.0
    fall = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_rate + fall * (1.0 - config.final_rate))


def clip_factor(config: Config, norm: float) -> float:
    """What to scale all gradients by, so that their global norm is at most clip_norm."""
    return 1.0 if config.clip_norm == 0 or norm <= config.clip_norm else config.clip_norm / norm


PIECE = 32 * 1024
"""Numbers of a tensor that are updated at a time: so many of all six arrays fit the second-level cache of most
processors (chosen by measurement)."""


class AdamW:
    """Adam with decoupled weight decay: matrices are decayed, gains and biases are not."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.first = zero_parameters(model, "optimizer")
        self.second = zero_parameters(model, "optimizer")

    def update(self, weights: Parameters, gradients: Parameters, step: int, factor: float) -> None:
        """Change the weights in place by one step with `factor` times the gradients, which are left as they are."""
        config = self.model.config
        everything = [_pieces(config, part) for part in (weights, gradients, self.first, self.second)]
        for (weight, decay), (gradient, _), (first, _), (second, _) in zip(*everything):
            self._update_piece(weight, gradient, first, second, step, factor, config.weight_decay if decay else 0.0)

    def _update_piece(
        self, weight: Array, gradient: Array, first: Array, second: Array, step: int, factor: float, decay: float
    ) -> None:
        config, xp = self.model.config, self.model.xp
        rate = learning_rate(config, step)
        change = gradient * (factor * (1.0 - config.beta1))
        first *= config.beta1
        first += change
        xp.multiply(gradient, gradient, out=change)
        change *= factor * factor * (1.0 - config.beta2)
        second *= config.beta2
        second += change
        # weight -= rate · (m̂ / (sqrt(v̂) + eps) + decay · weight), with both moments' start from zero corrected:
        # m̂ = first / (1 - beta1^steps), v̂ = second / (1 - beta2^steps).
        root = math.sqrt(1.0 - config.beta2 ** (step + 1))
        xp.sqrt(second, out=change)
        change += config.adam_eps * root
        xp.divide(first, change, out=change)
        change *= rate * root / (1.0 - config.beta1 ** (step + 1))
        weight *= 1.0 - rate * decay
        weight -= change


def _pieces(config: Config, parameters: Parameters) -> Iterator[tuple[Array, bool]]:
    """All tensors, and the gains, in pieces that fit the cache, and whether a piece is decayed."""
    for name, tensor in parameters.tensors():
        biases = bias_view(config, tensor) if name.endswith("attention") else None
        if biases is None:
            yield from ((piece, True) for piece in _cut(tensor))
            continue
        for block, bias in zip(tensor, biases):
            yield from ((piece, True) for piece in _cut(block[: -bias.size]))
            yield from ((piece, False) for piece in _cut(bias))
    yield from ((piece, False) for piece in _cut(parameters.gains))


def _cut(tensor: Array) -> Iterator[Array]:
    flat = tensor.reshape(-1)  # whatever blocks it is made of: all is elementwise
    return (flat[first : first + PIECE] for first in range(0, flat.size, PIECE))
