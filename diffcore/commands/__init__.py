"""The sub-commands of `diffcore`, one module each, imported when named."""
