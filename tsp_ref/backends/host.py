"""The array library that computes: a namespace, and the only ways between its memory and the host's.

Here that of NumPy, where both are one. Arrays cross only by `to_host` and `from_host`; the small agreements between
ranks (`comm/control.py`) are arrays of the host's from the start and never cross.
"""

from __future__ import annotations

import numpy as np

from ..accounting.counted import CountedNumpy
from ..accounting.memory import Memory
from ..accounting.work import Work
from ..arrays import Array, Namespace


class Backend:
    """An array library in the host's memory: NumPy, or a namespace that makes NumPy's arrays."""

    name = "numpy"

    def __init__(self, xp: Namespace = np) -> None:
        self.xp = xp

    def to_host(self, array: Array) -> Array:
        """The same numbers as an array of NumPy's, once all that computes them is done. To be read only."""
        return array

    def from_host(self, array: Array) -> Array:
        """The same numbers as an array of this library's; the host's may be changed at once."""
        made: Array = self.xp.asarray(array)
        return made

    def synchronise(self) -> None:
        """Wait until everything is done that was launched: with NumPy, at once."""

    def describe(self) -> str:
        """What computes, in a line."""
        return f"NumPy {np.__version__} on the CPU"

    def peak_bytes(self) -> int | None:
        """What the device's pool of memory has taken at most, bytes; None where there is no such pool."""
        return None

    def counted(self, memory: Memory, work: Work) -> Backend:
        """The same library, whose arrays and products all enter themselves in these accounts; a `UserError` where it
        cannot."""
        return Backend(CountedNumpy(memory, work))


HOST = Backend()
"""NumPy."""


def backend_of(library: Namespace | Backend) -> Backend:
    """A backend as it is; for a namespace of NumPy's kind, the one over it."""
    return library if isinstance(library, Backend) else Backend(library)
