"""The maths of one tile: each operation a forward and its backward, on arrays of the namespace `xp` that it is given.

Nothing here knows a rank, a message or a sum over tiles and blocks. A backward takes its forward's arguments in the
same order, behind the gradient of the result. Gradients of weights are written into `out`, a view of the packed block.
"""
