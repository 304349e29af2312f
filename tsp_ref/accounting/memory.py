"""What a rank holds, counted from birth to death, by kind and by phase."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

from ..arrays import Array
from .phase import OUTSIDE, Phase

MODEL_STATE = ("weights", "gradients", "optimizer")
KINDS = (*MODEL_STATE, "activations", "working", "buffers")


class _Owner(weakref.ref[Any]):
    """An array that owns memory, which may be gone: its id, its bytes, and the kind that it is counted under."""

    __slots__ = ("kind", "number", "size")
    number: int
    size: int
    kind: str


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
        self.peak = dict.fromkeys(KINDS, 0)
        self.model_state_peak = 0
        self.total_peak = 0
        self.peaks: dict[Phase, dict[str, int]] = {}  # what was held, by kind, when a phase held most
        self._phase = OUTSIDE
        self._phase_peak = 0
        self._held = dict.fromkeys(KINDS, 0)
        self._total = 0
        self._alive: dict[int, _Owner] = {}  # by the id of the array that owns the memory
        # Arrays that have been freed, and are still to be taken out of the sums. Python calls the deque's own method
        # when it frees one, and no function of Python's: a Ctrl-C that comes while such a function runs would be
        # printed and lost. Peaks do not change by it, for they can only rise when something is added.
        self._freed: deque[_Owner] = deque()

    @property
    def held(self) -> dict[str, int]:
        """Bytes held now, by kind."""
        self._release_freed()
        return self._held

    @property
    def total(self) -> int:
        """Bytes held now, of all kinds."""
        self._release_freed()
        return self._total

    @property
    def phase(self) -> Phase:
        """The phase that a peak is entered under."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._release_freed()
        self._phase = phase
        self._phase_peak = sum(self.peaks.get(phase, {}).values())
        self._note_peak()

    def track(self, kind: str, array: Array) -> Array:
        """Count `array` under `kind`, whatever it was counted under before, and return it."""
        if kind not in KINDS:
            raise ValueError(f"memory kind {kind} is unknown: use one of {', '.join(KINDS)}")
        self._release_freed()
        array_that_owns = _owner(array)
        owner = self._alive.get(id(array_that_owns))
        if owner is None:
            owner = self._alive[id(array_that_owns)] = _Owner(array_that_owns, self._freed.append)
            owner.number, owner.size = id(array_that_owns), array_that_owns.nbytes
        else:
            self._add(owner.kind, -owner.size)
        owner.kind = kind
        self._add(kind, owner.size)
        return array

    def track_new(self, array: Array) -> None:
        """Count an array as working set, unless the memory that it lies in is counted already."""
        self._release_freed()
        if id(_owner(array)) not in self._alive:
            self.track("working", array)

    def _release_freed(self) -> None:
        while self._freed:
            owner = self._freed.popleft()
            del self._alive[owner.number]
            self._add(owner.kind, -owner.size)

    def _add(self, kind: str, size: int) -> None:
        self._held[kind] += size
        self._total += size
        if size > 0:
            self.peak[kind] = max(self.peak[kind], self._held[kind])
            if kind in MODEL_STATE:
                self.model_state_peak = max(self.model_state_peak, sum(self._held[state] for state in MODEL_STATE))
            self._note_peak()

    def _note_peak(self) -> None:
        self.total_peak = max(self.total_peak, self._total)
        if self._total > self._phase_peak:
            self._phase_peak = self._total
            self.peaks[self._phase] = dict(self._held)


def _owner(array: Array) -> Array:
    """The array whose memory this is a view of, or the array itself."""
    owner: Any = array
    while hasattr(owner.base, "dtype"):
        owner = owner.base
    return owner
