"""Llama 3's scaling of the rotary embedding, by which a model reads texts longer than those that it was trained on.

A pair of a head's entries that turns often within the original length tells near tokens apart and stays as it is; one
that turns less than about once would meet angles that it has never seen, and turns `factor` times slower; those between
are blended. Source: Llama 3.1 (arXiv 2407.21783), and the parameters of its checkpoints' `rope_scaling`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..arrays import Array, Namespace


class RopeScaling(NamedTuple):
    """The parameters, under the names of the checkpoints: turns within the original length are slow up to
    `low_freq_factor`, and fast from `high_freq_factor` on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


def scaled_frequencies(xp: Namespace, frequencies: Array, scaling: RopeScaling) -> Array:
    """Radians a token, scaled: [e/2] -> [e/2]."""
    turns = frequencies * (scaling.original_length / (2.0 * math.pi))
    fast = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    fast = xp.clip(fast, 0.0, 1.0)
    return frequencies * (fast + (1.0 - fast) / scaling.factor)
