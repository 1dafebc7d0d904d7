"""What `diffcore evaluate` and `diffcore features` share."""
