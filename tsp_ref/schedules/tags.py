"""What a message is about: one tag for each purpose, so that no message can be taken for another's.

A forward's messages and a backward's share a tag: between two ranks messages of one tag arrive in the order in which
they were sent, and all ranks go through a step in the same order. Which of the two a message is, the ledger knows.
"""

from enum import IntEnum


class Tag(IntEnum):
    """The purpose of a message; the ledger counts by it."""

    EMBEDDING_WEIGHTS = 1
    ATTENTION_WEIGHTS = 2
    MLP_WEIGHTS = 3
    HEAD_WEIGHTS = 4

    # Sums over blocks, of a part's output or of its input's gradient, where the blocks are on several ranks.
    EMBEDDING_SUMS = 11
    ATTENTION_SUMS = 12
    MLP_SUMS = 13
    HEAD_SUMS = 14

    KEYS_VALUES = 21
    KEYS_VALUES_GRADIENTS = 22

    # Sums over tiles, where the tiles are on several ranks.
    EMBEDDING_GRADIENTS = 31
    ATTENTION_GRADIENTS = 32
    MLP_GRADIENTS = 33
    HEAD_GRADIENTS = 34
    GAIN_GRADIENTS = 35
    LOSS = 36

    GRADIENT_NORM = 41
    COLLECT = 51
