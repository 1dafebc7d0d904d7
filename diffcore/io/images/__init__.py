"""Image files: their bytes and pixels, and what is known of them without keeping the pixels."""
