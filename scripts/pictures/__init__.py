"""Pictures of the documentation, each in light and dark; `python scripts/gallery.py` draws them."""
