"""Editing: inversion, edit-friendly noise maps, inpainting and interpolation."""
