"""Loading: the network, schedule, VAE and text encoders of a diffusers pipeline as parts of diffcore."""
