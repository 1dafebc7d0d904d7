"""The web service of `diffcore serve`: messages, formats of results, and the application."""
