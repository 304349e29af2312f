"""What a rank holds: model state, kept activations and message buffers, counted from birth to death.

Arrays that live only within an operation or a part (scores, normalised tiles, sums that wait) are not counted yet.
"""

from __future__ import annotations

import weakref
from typing import Any

from .arrays import Array

MODEL_STATE = ("weights", "gradients", "optimizer")
KINDS = (*MODEL_STATE, "activations", "buffers")


class Memory:
    """Bytes held now and at the peak, by kind: weights, gradients, optimizer, activations, buffers.

    An array is counted from `track` until Python frees it, so a peak is that of the arrays that really lived at once.
    Views are not tracked: the array that owns the memory is.
    """

    def __init__(self) -> None:
        self.held = dict.fromkeys(KINDS, 0)
        self.peak = dict.fromkeys(KINDS, 0)
        self.model_state_peak = 0
        self.total_peak = 0
        # Keyed by id: a weak reference hashes as its array would, and arrays do not hash.
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def track(self, kind: str, array: Array) -> Array:
        """Count `array` under `kind` for as long as it lives, and return it."""
        if kind not in KINDS:
            raise ValueError(f"memory kind {kind} is unknown: use one of {', '.join(KINDS)}")
        reference = weakref.ref(array, self._release)
        self._alive[id(reference)] = (reference, kind, array.nbytes)
        self.held[kind] += array.nbytes
        self.peak[kind] = max(self.peak[kind], self.held[kind])
        self.model_state_peak = max(self.model_state_peak, sum(self.held[state] for state in MODEL_STATE))
        self.total_peak = max(self.total_peak, sum(self.held.values()))
        return array

    def _release(self, reference: weakref.ref[Any]) -> None:
        _, kind, size = self._alive.pop(id(reference))
        self.held[kind] -= size
