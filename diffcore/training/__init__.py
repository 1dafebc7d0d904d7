"""Training on accelerate: the same run whatever the ranks, the accumulation and the interruptions."""
