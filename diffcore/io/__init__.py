"""Files: weights with a hash, atomic writes, and specs (plain data to components and back)."""
