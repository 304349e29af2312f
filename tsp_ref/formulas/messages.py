"""What every rank sends in a step, by sub-layer, direction and purpose: exactly, for any N, mesh and layout.

The unit is an element of the model's dtype. Let N be the ranks of an axis, c_r the blocks of its rank r and k_r its
slots, and let a rank's pieces be the maximal subtrees that its leaves fill (`tree.cover`): one where N is a power of
two that divides G and T and slots are dealt in zigzag order, a few elsewhere. Then rank r sends, of

    a ring of blocks of E elements          G - c_{r+1} messages of E: all blocks but its right neighbour's own
    a broadcast of its own blocks           (N - 1)·c_r messages of E
    an all-gather of a tensor's blocks      N - 1 messages of c_r·E
    an all-gather of a block's keys/values  N - 1 messages of k_r·E, with E = 2·B·(K/G)·s·e for a tile
    a reduce to the blocks' owners          pieces·(blocks of others) messages of E
    an all-gather of the totals             (N - 1)·c_r messages of E
    an all-reduce of n tiles                exchange: pieces·(n - n_r) messages of E, where n_r are the tiles that it
                                            sums; gather: (N - 1)·n_r messages of E
    an all-reduce of a small sum            (N - 1)·pieces messages of E

Where everything divides evenly, a layer's totals are those of `closed_layer`. (Source: ours, from the schedules.)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from ..grid.grid import Grid, Place, share
from ..grid.tree import cover
from ..model.config import Config
from ..model.parameters import attention_size, gain_width, mlp_size
from ..schedules.tags import Tag


@dataclass(frozen=True)
class Traffic:
    """Messages, and the elements in them."""

    messages: int = 0
    elements: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.messages + other.messages, self.elements + other.elements)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.messages * times, self.elements * times)


Step: TypeAlias = "dict[tuple[str, str, Tag], Traffic]"
"""(sub-layer, direction, purpose) -> what is sent in one training step."""


def messages_of(count: int, size: int) -> Traffic:
    """So many messages of one size."""
    return Traffic(count, count * size)


class Sizes:
    """Elements in what travels: a block of a tensor, a tile or what is summed of it for the loss, keys and values."""

    def __init__(self, config: Config) -> None:
        self.attention = attention_size(config)  # 2·(H+K)·e·h/G, which is (2 + 2/g)·h²/G where e = h/H
        self.mlp = mlp_size(config)  # 3·h·f/G
        self.table = config.rows_per_block * config.hidden_size  # V·h/G
        self.tile = config.batch_size * config.tile_len * config.hidden_size  # B·s·h
        self.head_gains = 2 * config.head_dim if config.qk_norm else 0
        self.triple = 3 * config.batch_size * config.tile_len  # 3·B·s
        self.keys_values = 2 * config.batch_size * config.kv_heads_per_block * config.tile_len * config.head_dim
        self.gains = (2 * config.num_layers + 1) * gain_width(config)
        self.tensors = 2 * config.num_layers + (1 if config.tied_head else 2)


class Axes:
    """The collectives above, as the rank of a grid takes part in them."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.all_slots = tuple(range(grid.num_tiles))
        self.slot_pieces = len(cover(self.all_slots, grid.slots))
        self.block_pieces = len(cover(tuple(range(grid.num_blocks)), tuple(grid.blocks)))

    def ring(self, size: int) -> Traffic:
        """Blocks of `size` elements go round the weight axis."""
        rank, ranks = self.grid.weight_axis.rank, self.grid.weight_axis.size
        return messages_of(self.grid.num_blocks - len(self.grid.blocks_of((rank + 1) % ranks)), size)

    def broadcast(self, size: int) -> Traffic:
        """This rank's blocks go to all others of the weight axis."""
        return messages_of((self.grid.weight_axis.size - 1) * len(self.grid.blocks), size)

    def all_gather(self, size: int) -> Traffic:
        """All of this rank's blocks go to all others, in one message to each."""
        return messages_of(self.grid.weight_axis.size - 1, len(self.grid.blocks) * size)

    def gather_keys_values(self, size: int, blocks: int) -> Traffic:
        """Keys and values of this rank's slots go to all others of the token axis, block by block."""
        return messages_of((self.grid.token_axis.size - 1) * blocks, len(self.grid.slots) * size)

    def scatter_keys_values(self, size: int, blocks: int) -> Traffic:
        """Gradients of others' keys and values go to them, for each block one message to each that this rank has some
        for.

        Where all divides evenly, the rank at place r of N sends one piece for each tile of a peer that its queries
        see: for all tiles of the text's first half, and for those of the second half if its own are later, as are those
        of lower ranks: (B·S·h/g)·(2·(N - 1) - r)/N elements, on average 3/4 of what the keys and values were.
        """
        grid = self.grid
        reach = [max(grid.visible(slot) for slot in range(index << level, (index + 1) << level) if slot in grid.slots)
                 for level, index in cover(self.all_slots, grid.slots)]  # of each piece, how many keys
        pieces = [
            sum(keys >= grid.visible(slot) for slot in grid.slots_of(peer) for keys in reach)
            for peer in range(grid.token_axis.size) if peer != grid.token_axis.rank
        ]
        return Traffic(sum(map(bool, pieces)) * blocks, sum(pieces) * blocks * size)

    def reduce(self, size: int, total: int, own: int) -> Traffic:
        """Of `total` blocks' gradients, all but the `own` that this rank sums are sent to who sums them, in pieces."""
        return messages_of((total - own) * self.slot_pieces, size)

    def gather_totals(self, size: int, own: int) -> Traffic:
        """The totals of the `own` blocks that this rank sums go to all others of the token axis."""
        return messages_of((self.grid.token_axis.size - 1) * own, size)

    def all_reduce_tiles(self, size: int) -> Traffic:
        """An array of each slot at hand, summed over the weight axis: exchange and gather."""
        rank, ranks = self.grid.weight_axis.rank, self.grid.weight_axis.size
        tiles = len(self.grid.slots)
        summed = len(range(rank, tiles, ranks))
        exchange = messages_of((tiles - summed) * self.block_pieces, size)
        return exchange + messages_of((ranks - 1) * summed, size) if ranks > 1 else Traffic()

    def all_reduce_over_slots(self, size: int) -> Traffic:
        """A small sum over tiles."""
        return messages_of((self.grid.token_axis.size - 1) * self.slot_pieces, size)

    def all_reduce_over_blocks(self, size: int) -> Traffic:
        """A small sum over blocks."""
        return messages_of((self.grid.weight_axis.size - 1) * self.block_pieces, size)


def fsdp_step(config: Config, grid: Grid) -> Step:
    """FSDP+SP: as TSP, but all weights of a sub-layer are gathered in one message from each rank."""
    sizes, axes = Sizes(config), Axes(grid)
    gathered = {Tag.EMBEDDING_WEIGHTS: axes.all_gather(sizes.table), Tag.HEAD_WEIGHTS: axes.all_gather(sizes.table),
                Tag.ATTENTION_WEIGHTS: axes.all_gather(sizes.attention) * config.num_layers,
                Tag.MLP_WEIGHTS: axes.all_gather(sizes.mlp) * config.num_layers}
    return {key: gathered.get(key[-1], traffic) for key, traffic in tsp_step(config, grid).items()}


def tsp_step(config: Config, grid: Grid) -> Step:
    """TSP: weights travel forward and again backward, keys and values likewise, gradients to their owners."""
    sizes, axes, layers = Sizes(config), Axes(grid), config.num_layers
    blocks, own = config.blocks, len(grid.blocks)
    keys_values = axes.gather_keys_values(sizes.keys_values, blocks)
    return {
        ("embedding", "forward", Tag.EMBEDDING_WEIGHTS): axes.ring(sizes.table),
        ("attention", "forward", Tag.ATTENTION_WEIGHTS): axes.broadcast(sizes.attention) * layers,
        ("attention", "forward", Tag.KEYS_VALUES): keys_values * layers,
        ("mlp", "forward", Tag.MLP_WEIGHTS): axes.ring(sizes.mlp) * layers,
        ("head", "forward", Tag.HEAD_WEIGHTS): axes.ring(sizes.table),
        ("loss", "forward", Tag.LOSS): axes.all_reduce_over_slots(1),
        ("head", "backward", Tag.HEAD_WEIGHTS): axes.ring(sizes.table),
        ("head", "backward", Tag.HEAD_GRADIENTS): axes.reduce(sizes.table, blocks, own),
        ("mlp", "backward", Tag.MLP_WEIGHTS): axes.ring(sizes.mlp) * layers,
        ("mlp", "backward", Tag.MLP_GRADIENTS): axes.reduce(sizes.mlp, blocks, own) * layers,
        ("attention", "backward", Tag.ATTENTION_WEIGHTS): axes.broadcast(sizes.attention) * layers,
        ("attention", "backward", Tag.KEYS_VALUES): keys_values * layers,
        ("attention", "backward", Tag.KEYS_VALUES_GRADIENTS):
            axes.scatter_keys_values(sizes.keys_values, blocks) * layers,
        ("attention", "backward", Tag.ATTENTION_GRADIENTS): axes.reduce(sizes.attention, blocks, own) * layers,
        ("embedding", "backward", Tag.EMBEDDING_GRADIENTS): axes.reduce(sizes.table, blocks, own),
        ("gains", "backward", Tag.GAIN_GRADIENTS): axes.all_reduce_over_slots(sizes.gains),
        ("optimizer", "backward", Tag.GRADIENT_NORM): axes.all_reduce_over_blocks(sizes.tensors),
    }


def mesh_step(config: Config, grid: Grid) -> Step:
    """TP+SP, and so TP, whose axis of tokens has one rank, and SP, whose axis of weights has one: sums of tiles over
    the axis of weights; keys, values and gradients over that of tokens, for each block at hand."""
    sizes, axes, layers = Sizes(config), Axes(grid), config.num_layers
    blocks = len(grid.blocks)
    own = len(share(blocks, grid.token_axis.rank, grid.token_axis.size))
    sums, keys_values = axes.all_reduce_tiles(sizes.tile), axes.gather_keys_values(sizes.keys_values, blocks)

    def gradients(size: int) -> Traffic:
        return axes.reduce(size, blocks, own) + axes.gather_totals(size, own)

    return {
        ("embedding", "forward", Tag.EMBEDDING_SUMS): sums,
        ("attention", "forward", Tag.KEYS_VALUES): keys_values * layers,
        ("attention", "forward", Tag.ATTENTION_SUMS): sums * layers,
        ("mlp", "forward", Tag.MLP_SUMS): sums * layers,
        ("head", "forward", Tag.HEAD_SUMS): axes.all_reduce_tiles(sizes.triple),
        ("loss", "forward", Tag.LOSS): axes.all_reduce_over_slots(1),
        ("head", "backward", Tag.HEAD_GRADIENTS): gradients(sizes.table),
        ("head", "backward", Tag.HEAD_SUMS): sums,
        ("mlp", "backward", Tag.MLP_GRADIENTS): gradients(sizes.mlp) * layers,
        ("mlp", "backward", Tag.MLP_SUMS): sums * layers,
        ("attention", "backward", Tag.KEYS_VALUES): keys_values * layers,
        ("attention", "backward", Tag.KEYS_VALUES_GRADIENTS):
            axes.scatter_keys_values(sizes.keys_values, blocks) * layers,
        ("attention", "backward", Tag.ATTENTION_GRADIENTS): gradients(sizes.attention) * layers,
        ("attention", "backward", Tag.ATTENTION_SUMS): axes.all_reduce_tiles(sizes.tile + sizes.head_gains) * layers,
        ("embedding", "backward", Tag.EMBEDDING_GRADIENTS): gradients(sizes.table),
        ("gains", "backward", Tag.GAIN_GRADIENTS): axes.all_reduce_over_slots(sizes.gains),
        ("optimizer", "backward", Tag.GRADIENT_NORM): axes.all_reduce_over_blocks(sizes.tensors),
    }


def step_messages(schedule: str, config: Config, grid: Grid, recompute: str = "none") -> Step:
    """What the rank whose grid this is sends in one training step under a schedule; zeros are left out.

    What is recomputed travels once more, in the backward of its sub-layer: attention, and for `full` the MLP too.
    """
    plain = {"tsp": tsp_step, "fsdp+sp": fsdp_step}.get(schedule, mesh_step)(config, grid)
    again = {"none": (), "attention": ("attention",), "full": ("attention", "mlp")}[recompute]
    step: defaultdict[tuple[str, str, Tag], Traffic] = defaultdict(Traffic, plain)
    for (sublayer, direction, purpose), traffic in plain.items():
        if direction == "forward" and sublayer in again:
            step[sublayer, "backward", purpose] += traffic
    return {key: traffic for key, traffic in step.items() if traffic.messages}


def closed_layer(schedule: str, direction: str, config: Config, weights: Place, tokens: Place) -> Fraction:
    """Elements that a rank sends in one layer where everything divides evenly: the axes' sizes are powers of two, their
    product divides G, and the tokens' divides T/2; zigzag layout, no recomputation. With N ranks on an axis, g = H/K,
    F = f/h and W = (2 + 2/g + 3·F)·h², the weights of a layer:

    forward   TP   4·B·S·h·(N-1)/N                       two all-reduces, an exchange and a gather of B·S·h each
              SP   2·B·S·h/g·(N-1)/N                     keys and values
              TSP  (2·B·S·h/g + W)·(N-1)/N               keys and values, and the weights; FSDP+SP as TSP
              TP+SP on T x Σ  4·B·S·h/Σ·(T-1)/T + 2·B·S·h/(g·T)·(Σ-1)/Σ
    backward  TP   the same two all-reduces
              SP   keys and values again, their gradients D, and an all-reduce of W: 2·W·(N-1)/N
              TSP  keys and values and the weights again, D, and the gradients of W once: W·(N-1)/N
              TP+SP  TP's of 1/Σ of the tokens, and SP's of 1/T of the heads and the weights

    where D = (B·S·h/g)·(2·(N-1) - r)/N for the rank at place r. TSP sends less than TP forward if B·S > W/(4 - 2/g)/h,
    which is B·S > 8·h for g = 1 and F = 4. (Source: ours; the paper is reported to name the same crossover.)

    Where heads have a size of their own, read K·e for h/g; W has the biases, if any; where heads are normed, the
    attention's all-reduce in the backward has 2·e more for each tile, beside its B·s·h.
    """
    tokens_h = config.batch_size * config.seq_len * config.hidden_size
    weights_of_layer = Fraction(config.blocks * (Sizes(config).attention + Sizes(config).mlp))
    keys_values = Fraction(2 * config.num_tokens * config.num_kv_heads * config.head_dim)

    def others(axis: Place) -> Fraction:
        return Fraction(axis.size - 1, axis.size)

    scattered = keys_values * Fraction(2 * (tokens.size - 1) - tokens.rank, 2 * tokens.size)
    if tokens.size == 1:
        scattered = Fraction(0)
    if schedule in ("tsp", "fsdp+sp"):
        travelling = (keys_values + weights_of_layer) * others(tokens)
        return travelling if direction == "forward" else travelling + scattered + weights_of_layer * others(tokens)
    sums = Fraction(4 * tokens_h, tokens.size) * others(weights)
    exchanged = keys_values / weights.size * others(tokens)
    if direction == "forward":
        return sums + exchanged
    sums += Fraction(2 * config.tiles * Sizes(config).head_gains, tokens.size) * others(weights)
    return sums + exchanged + scattered / weights.size + 2 * weights_of_layer / weights.size * others(tokens)
