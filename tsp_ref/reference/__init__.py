"""Two single-process models: `naive`, a textbook one without a grid, and `single`, the bits that every schedule owes."""
