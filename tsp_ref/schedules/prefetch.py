"""What TSP and FSDP+SP post before it is needed: the first messages of the next sub-layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from ..comm.communicator import Communicator
from ..model.activations import Saved
from ..model.model import Model
from ..model.parameters import Parameters
from .all_gather import AllGather
from .keys_values import GatherKeysValues
from .ring import Broadcast, Ring
from .tags import Tag

Prefetch: TypeAlias = Callable[[], None]
"""Posts the first messages of the next sub-layer, unless they are posted: a `post` of what that one will wait for."""


def nothing() -> None:
    """Where no sub-layer follows, or the next needs no weights."""


class BringsWeights(Protocol):
    """What brings a sub-layer's weights: a `Ring`, a `Broadcast`, an `AllGather`."""

    def post(self) -> None:
        """Post its first messages, unless they are posted."""


ForAttention = TypeVar("ForAttention", bound=BringsWeights)
ForMlp = TypeVar("ForMlp", bound=BringsWeights)


class LayerMessages(NamedTuple, Generic[ForAttention, ForMlp]):
    """What a layer's backward receives of weights, keys and values. The first messages of each are posted by the
    sub-layer before; the first two are used only if what they are for is recomputed."""

    attention_recomputed: ForAttention
    mlp_recomputed: ForMlp
    mlp: ForMlp
    keys_values: GatherKeysValues
    attention: ForAttention

    def post_first(self, recompute: str) -> Prefetch:
        """The post of what the layer's backward begins with."""
        return self.mlp.post if recompute == "none" else self.attention_recomputed.post

    def post_attention(self) -> None:
        """Post what attention's backward begins with."""
        self.keys_values.post()
        self.attention.post()


def messages_of_layer(
    comm: Communicator, model: Model, weights: Parameters, saved: Saved, layer: int
) -> LayerMessages[Broadcast, Ring]:
    """The messages of a layer's backward under TSP, none of them posted yet."""
    attention, mlp = weights.attention[layer], weights.mlp[layer]
    broadcast = Broadcast(comm, model, attention, Tag.ATTENTION_WEIGHTS)
    return LayerMessages(
        attention_recomputed=Broadcast(comm, model, attention, Tag.ATTENTION_WEIGHTS),
        mlp_recomputed=Ring(comm, model, mlp, Tag.MLP_WEIGHTS),
        mlp=Ring(comm, model, mlp, Tag.MLP_WEIGHTS),
        keys_values=GatherKeysValues(  # which recomputation will fill again, in the same dictionary
            comm, model, saved.attention[layer].keys_values, [block for _, block in broadcast.order]),
        attention=broadcast)


def gathers_of_layer(
    comm: Communicator, model: Model, weights: Parameters, saved: Saved, layer: int
) -> LayerMessages[AllGather, AllGather]:
    """The messages of a layer's backward under FSDP+SP, none of them posted yet; keys and values are of all heads at
    once."""
    attention, mlp, blocks = weights.attention[layer], weights.mlp[layer], range(model.config.blocks)
    return LayerMessages(
        attention_recomputed=AllGather(comm, model, attention, Tag.ATTENTION_WEIGHTS),
        mlp_recomputed=AllGather(comm, model, mlp, Tag.MLP_WEIGHTS),
        mlp=AllGather(comm, model, mlp, Tag.MLP_WEIGHTS),
        keys_values=GatherKeysValues(comm, model, saved.attention[layer].keys_values, list(blocks), ahead=len(blocks)),
        attention=AllGather(comm, model, attention, Tag.ATTENTION_WEIGHTS))
