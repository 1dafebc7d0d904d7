"""A learned encoding of x_0 in x, and the derivative in forward mode that its target needs."""
