"""What a rank computes: the floating-point operations of its matrix products, counted as they are executed."""

from __future__ import annotations

import math

from .phase import OUTSIDE, Phase


class Work:
    """FLOPs of matrix products, by phase: 2·m·n·k for [m, k] times [k, n]. Elementwise work is not counted."""

    def __init__(self) -> None:
        self.phase = OUTSIDE
        self.flops: dict[Phase, int] = {}

    def product(self, left: tuple[int, ...], right: tuple[int, ...]) -> None:
        """Count one product of arrays of these shapes, [..., m, k] and [..., k, n] with the same leading sizes."""
        self.flops[self.phase] = self.flops.get(self.phase, 0) + 2 * math.prod(left) * right[-1]

    @property
    def total(self) -> int:
        """FLOPs of all phases."""
        return sum(self.flops.values())
