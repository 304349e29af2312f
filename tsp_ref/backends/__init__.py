"""The array library that computes: NumPy, or CuPy on a GPU."""
