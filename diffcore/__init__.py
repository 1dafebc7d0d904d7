"""diffcore: diffusion-model training and sampling whose numbers are right."""

__version__ = "0.1.0"
