"""What the pictures share: sub-layers with their letters and colours, and the marks of a time axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..comm.timeline import Lane, Span


@dataclass(frozen=True)
class Look:
    """How a sub-layer is shown: its letter, and its colours in a terminal and on paper."""

    name: str
    letter: str
    terminal: str
    paper: str


OTHER = Look("other", "-", "bright_black", "#9aa0a6")
LOOKS = {
    "embedding": Look("embedding", "E", "cyan", "#17a2b8"),
    "attention": Look("attention", "A", "blue", "#3b6fd4"),
    "mlp": Look("mlp", "M", "green", "#3a9d5d"),
    "head": Look("head", "H", "yellow", "#d99a1c"),
    "loss": Look("loss", "L", "white", "#7a5c3e"),
    "gains": Look("gains", "G", "white", "#b0742f"),
    "optimizer": Look("optimizer", "O", "magenta", "#9556b8"),
}


def look_of(span: Span) -> Look:
    """How what a span computed is shown."""
    return LOOKS.get(span.sublayer, OTHER)


def letter_of(span: Span) -> str:
    """The sub-layer's letter: a capital in the forward, a small one in the backward."""
    letter = look_of(span).letter
    return letter.lower() if span.direction == "backward" else letter


def looks_in(lanes: list[Lane]) -> list[Look]:
    """The looks that a legend has to explain."""
    shown = {look_of(span) for lane in lanes for span in lane.spans if span.what == "compute"}
    return [look for look in [*LOOKS.values(), OTHER] if look in shown]


def end_of(lanes: list[Lane]) -> float:
    """When the last rank is through."""
    return max(lane.spans[-1].end for lane in lanes)


def ticks(length: float, most: int) -> list[float]:
    """From 0 to `length` round numbers, all as far apart, no more than `most` and one."""
    rough = length / most
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough)
    return [number * step for number in range(int(length / step) + 1)]
