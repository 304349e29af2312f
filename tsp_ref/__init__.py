"""Tensor and sequence parallelism folded on one axis (TSP), in NumPy and MPI, bit for bit the single-process model.

The letters in shape comments, here and everywhere:

    B  sequences in a batch         H  query heads              G  weight blocks a matrix is cut in
    S  tokens in a sequence         K  key/value heads          T  token tiles a sequence is cut in
    s  tokens in a tile, S/T        e  size of a head           N  ranks
    h  hidden size                  g  query heads a key/value head serves, H/K
    f  feed-forward size            L  layers                   V  vocabulary size
    n  keys that a tile of queries sees: all tokens up to the tile's last
    c  keys of a chunk of them
    t  queries of a strip of a tile
    r  queries of a tile that see a chunk of keys
    m  blocks at hand: those of one owner
    p  tiles at hand: all of a rank's, in the order of their slots, or a stack of them; the first axis of every array

The words:

    TP, SP     tensor parallelism, which deals out weights, and sequence parallelism, which deals out tokens
    mesh       T x Σ ranks for TP+SP: T share the weights, Σ share the tokens (this T is not that of the tiles)
    axis       the ranks that weights, or tokens, are dealt to; under TSP both are the same ranks
    sub-layer  the attention or the MLP of a layer, with its norm and its residual
    block      1/G of a weight matrix: some heads, columns or rows; a sub-layer's matrices travel packed, as one array
    tile       s tokens of a sequence, numbered in the order of the text
    slot       a place in the order in which tiles are dealt to ranks: slot 0 holds tile 0, slot 1 the last tile, ...
    owner      the rank that holds a block's weights, gradients and moments, or a slot's activations; where several
               hold copies, the one that sums
    shard      all blocks of one owner, of one tensor
    stack      some of a rank's tiles that go through an operation at a time; how many is a matter of speed alone
    leaf       one tile's or one block's term of a sum; a node of the tree is the sum of some consecutive leaves
    phase      (sub-layer, forward or backward): what messages, memory and work are counted by
    partial    a sum of some leaves; a piece is one that waits, or travels, because the node beside it is elsewhere

Where to read, top to bottom: `config` (what a model is), `grid` (who owns what), `tree` (the one rule),
`ops` (the maths of a tile), `reference` (two single-process models), `comm` (checked messages),
`schedules` (the maths and the messages joined), `formulas` (what they must send, hold and compute), `training`, `cli`;
and for GPUs `backend` (which array library computes) and `comm.staging` (how its arrays travel).
"""

from .comm import launcher

# Before anything takes long.
launcher.leave_at_ctrl_c()

from .process import allocator, threads  # noqa: E402

__version__ = "0.1.0"

# Before anything here loads NumPy: a BLAS reads the number of its threads when it is loaded.
threads.pin()
allocator.keep_freed_memory()
