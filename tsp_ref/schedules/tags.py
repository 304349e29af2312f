"""What a message is about: one tag for each purpose, so that no message can be taken for another's."""

from enum import IntEnum


class Tag(IntEnum):
    """The purpose of a message; the ledger counts by it."""

    EMBEDDING_WEIGHTS = 1
    ATTENTION_WEIGHTS = 2
    KEYS_VALUES = 3
    MLP_WEIGHTS = 4
    HEAD_WEIGHTS = 5
    LOSS = 6

    HEAD_WEIGHTS_BACKWARD = 11
    HEAD_GRADIENTS = 12
    MLP_WEIGHTS_BACKWARD = 13
    MLP_GRADIENTS = 14
    ATTENTION_WEIGHTS_BACKWARD = 15
    KEYS_VALUES_BACKWARD = 16
    KEYS_VALUES_GRADIENTS = 17
    ATTENTION_GRADIENTS = 18
    EMBEDDING_GRADIENTS = 19
    GAIN_GRADIENTS = 20

    GRADIENT_NORM = 31
    COLLECT = 41
