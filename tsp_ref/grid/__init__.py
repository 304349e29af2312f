"""The grid of blocks and tiles, who owns what of it, and the one rule by which everything on it is summed."""
