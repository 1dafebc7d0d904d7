"""Loading: the parts of a diffusers pipeline (network, schedule, VAE, prompts) in diffcore."""
