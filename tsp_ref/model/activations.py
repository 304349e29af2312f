"""What a forward keeps for its backward. Slots are those that the rank holds; blocks are those that it computes with:
its own, or all G where weights travel or are replicated."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..arrays import Array, Tiles


@dataclass
class AttentionSaved:
    """One attention part. The softmax itself is not kept: the backward recomputes it from the log-sum-exp."""

    x: Tiles  # slot -> [B, s, h], the layer's input
    keys_values: dict[int, Array] = field(default_factory=dict)  # in the form that the schedule keeps and sends them
    tile_keys_values: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [2, B, K/G, s, e]
    q: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [B, K/G, g*s, e]
    heads: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [B, K/G, g*s, e]
    logsumexp: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [B, K/G, g*s, 1]

    def keep_input_only(self) -> None:
        """Let go of all that can be computed anew from the layer's input."""
        for kept in (self.keys_values, self.tile_keys_values, self.q, self.heads, self.logsumexp):
            kept.clear()


@dataclass
class MlpSaved:
    """One MLP part."""

    x: Tiles  # slot -> [B, s, h], the attention's output
    projected: dict[tuple[int, int], Array] = field(default_factory=dict)  # (block, slot) -> [B*s, 2f/G], gate and up

    def keep_nothing(self) -> None:
        """Let go of everything: all of it can be computed anew from the layer's input."""
        self.x = {}
        self.projected.clear()


@dataclass
class HeadSaved:
    """The last norm, the head and the loss."""

    x: Tiles  # slot -> [B, s, h], the last layer's output
    logsumexp: Tiles = field(default_factory=dict)  # slot -> [B*s], over the whole vocabulary


@dataclass
class Saved:
    """A whole forward: a batch, and what is kept of each layer and of the head."""

    tokens: Tiles  # slot -> [B, s]
    targets: Tiles  # slot -> [B, s]
    attention: list[AttentionSaved] = field(default_factory=list)
    mlp: list[MlpSaved] = field(default_factory=list)
    head: HeadSaved = field(default_factory=lambda: HeadSaved({}))
