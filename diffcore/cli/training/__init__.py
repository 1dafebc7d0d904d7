"""The settings of commands that train: recipes, and what is completed for a model family."""
