"""What crosses from one sub-layer of TSP to the next: the first messages of the following one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from ..comm.communicator import Communicator
from ..model.activations import Saved
from ..model.model import Model
from ..model.parameters import Parameters
from .keys_values import GatherKeysValues
from .ring import Broadcast, Ring
from .tags import Tag

First: TypeAlias = Sequence["Ring | Broadcast | GatherKeysValues"]
"""What the following sub-layer waits for first, in the order in which it does."""


def start(following: First) -> None:
    """Post the first messages of the following sub-layer, unless they are posted."""
    for messages in following:
        messages.start()


class LayerMessages(NamedTuple):
    """What a layer's backward receives, in the order of its sub-layers. None of it is posted before it is started; the
    first two only if what they are for is recomputed."""

    heads_again: Broadcast
    ring_again: Ring
    ring: Ring
    keys_values: GatherKeysValues
    heads: Broadcast

    def first(self, recompute: str) -> First:
        """What the layer's backward begins with."""
        return [self.heads_again] if recompute == "full" else [self.ring]


def messages_of_layer(
    comm: Communicator, model: Model, weights: Parameters, saved: Saved, layer: int
) -> LayerMessages:
    """The messages of a layer's backward."""
    attention, mlp = weights.attention[layer], weights.mlp[layer]
    heads = Broadcast(comm, model, attention, Tag.ATTENTION_WEIGHTS)
    kept, order = saved.attention[layer].keys_values, [block for _, block in heads.order]
    return LayerMessages(
        Broadcast(comm, model, attention, Tag.ATTENTION_WEIGHTS), Ring(comm, model, mlp, Tag.MLP_WEIGHTS),
        Ring(comm, model, mlp, Tag.MLP_WEIGHTS), GatherKeysValues(comm, model, kept, order), heads)
