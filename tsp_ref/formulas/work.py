"""What a rank must compute: the floating-point operations of its matrix products in a step, exactly."""

from __future__ import annotations

from ..grid.grid import Grid
from ..model.config import Config
from ..ops import attention as tile


def step_flops(config: Config, grid: Grid, recompute: str = "none", folded: bool = False) -> dict[tuple[str, str], int]:
    """FLOPs by (sub-layer, direction). folded: TSP and FSDP+SP, where a rank computes with all blocks, not only
    with its own.

    A product of a token with a matrix of E elements costs 2·E forward and 4·E backward (for the token's gradient and
    for the matrix's). Attention multiplies each query with the n keys that its tile sees, masked ones of its own tile
    included: scores and values, 2 products of 2·e·n forward; backward the scores again and four more, of which two have
    one column more than e. (A tile of several strips of queries is spared what the later strips' keys would cost the
    earlier. The backward takes a tile's own keys d at a time and is spared s·(s-d)/2.) The embedding
    forward is a lookup, its backward a product with a one-hot matrix; the head's backward recomputes the logits. Where
    heads are normed, the backward computes queries and keys again.
    """
    at_hand = range(config.blocks) if folded else grid.blocks
    blocks, vocabulary = len(at_hand), sum(map(config.tokens_in_block, at_hand))
    tokens = config.batch_size * config.tile_len * len(grid.slots)
    layers, hidden = config.num_layers, config.hidden_size
    key = config.kv_heads_per_block * config.head_dim
    query = config.group_size * key
    qkv, out, mlp = hidden * (query + 2 * key), query * hidden, 3 * hidden * config.ffn_size // config.blocks
    all_pairs = config.batch_size * config.tile_len * sum(map(grid.visible, grid.slots))
    spared = sum((strip.stop - strip.start) * (config.tile_len - strip.stop) for strip in tile.strips(config.tile_len))
    pairs = all_pairs - tokens // config.tile_len * spared
    firsts = range(0, config.tile_len, tile.DIAGONAL)
    spared = sum(first * min(tile.DIAGONAL, config.tile_len - first) for first in firsts)
    backward_pairs = all_pairs - tokens // config.tile_len * spared
    table = config.rows_per_block * hidden
    again = hidden * (query + key) if config.qk_norm else 0
    attention, swiglu = tokens * (qkv + out) + 2 * pairs * query, tokens * mlp
    forward = {"attention": 2 * layers * blocks * attention, "mlp": 2 * layers * blocks * swiglu}
    flops = {
        ("attention", "forward"): forward["attention"],
        ("mlp", "forward"): forward["mlp"],
        ("head", "forward"): 2 * tokens * vocabulary * hidden,
        ("head", "backward"): 6 * tokens * vocabulary * hidden,
        ("mlp", "backward"): 2 * forward["mlp"],
        ("attention", "backward"): 2 * layers * blocks * (
            2 * tokens * (qkv + out) + tokens * again + (5 * query + 2 * query // config.head_dim) * backward_pairs),
        ("embedding", "backward"): 2 * blocks * tokens * table,
    }
    for sublayer in {"none": (), "attention": ("attention",), "full": ("attention", "mlp")}[recompute]:
        flops[sublayer, "backward"] += forward[sublayer]
    return flops
