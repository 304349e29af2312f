"""Two models in one process: `naive`, a textbook one without a grid, and `single`, the bits that schedules owe."""
