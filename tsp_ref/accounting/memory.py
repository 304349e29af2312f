"""What a rank holds, counted from birth to death, by kind and by phase."""

from __future__ import annotations

import weakref
from typing import Any

from ..arrays import Array
from .phase import OUTSIDE, Phase

MODEL_STATE = ("weights", "gradients", "optimizer")
KINDS = (*MODEL_STATE, "activations", "working", "buffers")


class Memory:
    """Bytes held now and at the peak, by kind.

    weights, gradients, optimizer  the model state
    activations                    what a forward keeps for its backward
    working                        everything else that a computation makes: scores, normalised tiles, sums that wait
    buffers                        what a message is received into, or packed in

    An array is counted from `track` until Python frees it, so a peak is that of the arrays that really lived at once.
    What is counted is the array that owns the memory, once, however many views there are. Arrays that nobody tracks are
    not counted, unless the namespace that makes them counts them all as working set (`counted.py`).
    """

    def __init__(self) -> None:
        self.held = dict.fromkeys(KINDS, 0)
        self.peak = dict.fromkeys(KINDS, 0)
        self.model_state_peak = 0
        self.total = 0
        self.total_peak = 0
        self.peaks: dict[Phase, dict[str, int]] = {}  # what was held, by kind, when a phase held most
        self._phase = OUTSIDE
        self._phase_peak = 0
        self._alive: dict[int, tuple[weakref.ref[Any], str]] = {}  # by the id of the array that owns the memory

    @property
    def phase(self) -> Phase:
        """The phase that a peak is entered under."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase
        self._phase_peak = sum(self.peaks.get(phase, {}).values())
        self._note_peak()

    def track(self, kind: str, array: Array) -> Array:
        """Count `array` under `kind`, whatever it was counted under before, and return it."""
        if kind not in KINDS:
            raise ValueError(f"memory kind {kind} is unknown: use one of {', '.join(KINDS)}")
        owner = _owner(array)
        known = self._alive.get(id(owner))
        if known:
            self._add(known[1], -owner.nbytes)
        else:
            number, size = id(owner), owner.nbytes
            reference = weakref.ref(owner, lambda _: self._release(number, size))
        self._alive[id(owner)] = (known[0] if known else reference, kind)
        self._add(kind, owner.nbytes)
        return array

    def track_new(self, array: Array) -> None:
        """Count an array as working set, unless the memory that it lies in is counted already."""
        if id(_owner(array)) not in self._alive:
            self.track("working", array)

    def _release(self, number: int, size: int) -> None:
        _, kind = self._alive.pop(number)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self.held[kind] += size
        self.total += size
        if size > 0:
            self.peak[kind] = max(self.peak[kind], self.held[kind])
            if kind in MODEL_STATE:
                self.model_state_peak = max(self.model_state_peak, sum(self.held[state] for state in MODEL_STATE))
            self._note_peak()

    def _note_peak(self) -> None:
        self.total_peak = max(self.total_peak, self.total)
        if self.total > self._phase_peak:
            self._phase_peak = self.total
            self.peaks[self._phase] = dict(self.held)


def _owner(array: Array) -> Array:
    """The array whose memory this is a view of, or the array itself."""
    owner: Any = array
    while hasattr(owner.base, "dtype"):
        owner = owner.base
    return owner
