"""What a forward keeps for its backward. Slots are those that the rank owns; blocks are all G of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arrays import Array, Tiles


@dataclass
class AttentionSaved:
    """One attention part. The softmax itself is not kept: the backward recomputes it from the log-sum-exp."""

    x: Tiles  # slot -> [B, s, h], the layer's input
    keys_values: dict[int, Array] = field(default_factory=dict)  # in the form that the schedule keeps and sends them
    tile_keys_values: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [2, B, K/G, s, e]
    q: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [B, K/G, g*s, e]
    heads: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [B, K/G, g*s, e]
    logsumexp: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [B, K/G, g*s, 1]


@dataclass
class MlpSaved:
    """One MLP part."""

    x: Tiles  # slot -> [B, s, h], the attention's output
    projected: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [B*s, 2f/G], gate and up


@dataclass
class HeadSaved:
    """The last norm, the head and the loss."""

    x: Tiles  # slot -> [B, s, h], the last layer's output
    logsumexp: Tiles = field(default_factory=dict)  # slot -> [B*s], over the whole vocabulary


@dataclass
class Saved:
    """A whole forward."""

    tokens: Tiles  # slot -> [B, s]
    targets: Tiles  # slot -> [B, s]
    attention: list[AttentionSaved]
    mlp: list[MlpSaved]
    head: HeadSaved
