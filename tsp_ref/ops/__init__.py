"""The maths of tiles: each operation a forward and its backward, on arrays of the namespace `xp` that it is given.

Every operation takes a stack of p tiles, which is the first axis of its arrays, and does to each what it would do to
one alone: a product of a stack is one product for each of its matrices, of a tile's own shape, and all else goes by
elements or along the last axis. So no bit depends on how many tiles are taken at a time; speed does.

Nothing here knows a rank, a message or a sum over tiles and blocks. A backward takes the gradient of the result, then
those of its forward's arguments that it needs, in order, then what the forward left for it. It returns the gradient of
its input; a matrix's gradient, one for each tile, is written into `out`, where it will be summed from. A forward writes
what its backward needs into `out`.
"""
