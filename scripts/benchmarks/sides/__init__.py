"""The other sides of comparisons: bare PyTorch, diffusers, and other libraries."""
