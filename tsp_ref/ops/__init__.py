"""The maths of one tile: each operation a forward and its backward, on arrays of the namespace `xp` that it is given.

Nothing here knows a rank, a message or a sum over tiles and blocks. A backward takes the gradient of the result, then
those of its forward's arguments that it needs, in order, then what the forward left for it. It returns the gradient of
its input; a matrix's gradient is written into `out`, where it will travel from; a gain's is returned.
"""
