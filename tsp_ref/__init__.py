"""Tensor and sequence parallelism folded on one axis (TSP), in NumPy and MPI, bit for bit the single-process model.

The letters in shape comments, here and everywhere:

    B  sequences in a batch         H  query heads              G  weight blocks a matrix is cut in
    S  tokens in a sequence         K  key/value heads          T  token tiles a sequence is cut in
    s  tokens in a tile, S/T        e  size of a head           N  ranks
    h  hidden size                  g  query heads a key/value head serves, H/K
    f  feed-forward size            L  layers                   V  vocabulary size
    n  keys that a tile of queries sees: all tokens up to the tile's last

Where to read, top to bottom: `config` (what a model is), `grid` (who owns what), `tree` (the one rule),
`ops` (the maths of a tile), `reference` (two single-process models), `comm` (checked messages),
`schedules` (the maths and the messages joined), `training`, `cli`.
"""

from . import threads

__version__ = "0.1.0"

# Before anything here loads NumPy: a BLAS reads the number of its threads when it is loaded.
threads.pin()
