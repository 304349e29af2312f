"""Pictures of a step, drawn from what all ranks recorded: in the terminal, as an SVG, as a trace."""
