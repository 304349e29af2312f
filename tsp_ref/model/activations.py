"""What a forward keeps for its backward. The first axis of every array is that of the tiles that the rank holds, p of
them in the order of their slots; blocks are those that it computes with: its own, or all G where weights travel or are
replicated."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..arrays import Array


@dataclass
class Heads:
    """What m consecutive blocks of heads keep of this rank's tiles."""

    blocks: range
    keys_values: Array  # [p, 2, m, B, K/G, s, e]
    q: Array  # [p, m, B, K/G, g*s, e]
    heads: Array  # [p, m, B, K/G, g*s, e]
    logsumexp: Array  # [p, m, B, K/G, g*s, 1]

    def of_blocks(self, blocks: range) -> Heads:
        """Those of some of the blocks, as views."""
        part = slice(blocks.start - self.blocks.start, blocks.stop - self.blocks.start)
        return Heads(blocks, self.keys_values[:, :, part], self.q[:, part], self.heads[:, part],
                     self.logsumexp[:, part])


@dataclass
class AttentionSaved:
    """One attention sub-layer. The softmax itself is not kept: the backward recomputes it from the log-sum-exp."""

    x: Array  # [p, B, s, h], the layer's input
    keys_values: dict[int, Array] = field(default_factory=dict)  # block -> [p, 2, B, K/G, s, e], of this rank's tiles
    q: dict[int, Array] = field(default_factory=dict)  # block -> [p, B, K/G, g*s, e]
    heads: dict[int, Array] = field(default_factory=dict)  # block -> [p, B, K/G, g*s, e]
    logsumexp: dict[int, Array] = field(default_factory=dict)  # block -> [p, B, K/G, g*s, 1]
    together: Heads | None = None  # the same of all blocks, where one rank attends with several at a time

    def keep_input_only(self) -> None:
        """Let go of all that can be recomputed from the layer's input."""
        self.together = None
        for kept in (self.keys_values, self.q, self.heads, self.logsumexp):
            kept.clear()

    def of_blocks(self, blocks: range) -> Heads:
        """What is kept of some consecutive blocks; of several only where they are kept together."""
        if self.together is not None:
            return self.together.of_blocks(blocks)
        block = blocks.start
        return Heads(blocks, self.keys_values[block][:, :, None], self.q[block][:, None], self.heads[block][:, None],
                     self.logsumexp[block][:, None])


@dataclass
class MlpSaved:
    """One MLP sub-layer."""

    x: Array  # [p, B, s, h], the attention's output; none while it is to be recomputed
    projected: dict[int, Array] = field(default_factory=dict)  # block -> [p, B*s, 2f/G], gate and up

    def keep_nothing(self) -> None:
        """Let go of everything: all of it can be recomputed from the layer's input."""
        self.x = None  # type: ignore[assignment]
        self.projected.clear()


@dataclass
class HeadSaved:
    """The last norm, the head and the loss."""

    x: Array  # [p, B, s, h], the last layer's output
    logsumexp: Array  # [p, B*s], over the whole vocabulary


@dataclass
class Saved:
    """A whole forward: a batch, and what is kept of each layer and of the head."""

    tokens: Array  # [p, B, s]
    targets: Array  # [p, B, s]
    attention: list[AttentionSaved]
    mlp: list[MlpSaved]
    head: HeadSaved
