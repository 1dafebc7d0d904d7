"""Training objectives: the loss, its weight over noise levels, couplings, and the sampling of
levels.
"""
