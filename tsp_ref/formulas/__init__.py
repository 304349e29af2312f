"""What a step must send, hold and compute, from the sizes alone: closed formulas that the accounts must agree with."""
