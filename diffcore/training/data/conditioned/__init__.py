"""Data sets with named conditions: paired images, and conditions computed from x_0."""
