"""What a message is about: one tag for each purpose, so that no message can be taken for another's.

A forward's messages and a backward's share a tag: between two ranks messages of one tag arrive in the order in which
they were sent, and all ranks go through a step in the same order. Which of the two a message is, the ledger knows.
"""

from __future__ import annotations

from enum import IntEnum


class Tag(IntEnum):
    """The purpose of a message, and the sub-layer that it belongs to; the ledger counts by both. A message may be
    posted in another sub-layer: prefetched in the one before, or deferred to the one after."""

    sublayer: str

    def __new__(cls, number: int, sublayer: str) -> Tag:
        """A whole number, which is what MPI takes, that knows its sub-layer."""
        tag = int.__new__(cls, number)
        tag._value_ = number
        tag.sublayer = sublayer
        return tag

    EMBEDDING_WEIGHTS = 1, "embedding"
    ATTENTION_WEIGHTS = 2, "attention"
    MLP_WEIGHTS = 3, "mlp"
    HEAD_WEIGHTS = 4, "head"

    # Sums over blocks, of a sub-layer's output or of its input's gradient, where the blocks are on several ranks.
    EMBEDDING_SUMS = 11, "embedding"
    ATTENTION_SUMS = 12, "attention"
    MLP_SUMS = 13, "mlp"
    HEAD_SUMS = 14, "head"

    KEYS_VALUES = 21, "attention"
    KEYS_VALUES_GRADIENTS = 22, "attention"

    # Sums over tiles, where the tiles are on several ranks.
    EMBEDDING_GRADIENTS = 31, "embedding"
    ATTENTION_GRADIENTS = 32, "attention"
    MLP_GRADIENTS = 33, "mlp"
    HEAD_GRADIENTS = 34, "head"
    GAIN_GRADIENTS = 35, "gains"
    LOSS = 36, "loss"

    GRADIENT_NORM = 41, "optimizer"
    COLLECT = 51, ""
