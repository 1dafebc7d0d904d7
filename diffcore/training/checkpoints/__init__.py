"""Checkpoints of a run, how it resumes from them, and what it writes beside them."""
