"""Low-rank adapters: files in the formats of diffusers, kohya and ComfyUI; merge and extract."""
