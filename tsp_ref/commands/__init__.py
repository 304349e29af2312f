"""What the command line runs: `train`, `verify`, and the tables that they end with."""
