"""Data sets, captions, caches, and the order in which a run reads them."""
