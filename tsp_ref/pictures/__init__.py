"""Pictures: of a step, drawn from what all ranks recorded, in the terminal, as an SVG or a trace; and of TSP itself."""
