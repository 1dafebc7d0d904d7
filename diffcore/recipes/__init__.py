"""Recipes: complete, commented runs, used by name (`diffcore train digits`)."""
