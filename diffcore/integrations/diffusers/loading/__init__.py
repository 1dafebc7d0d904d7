"""Loading: a diffusers pipeline's network, schedule, VAE and text encoders as parts of diffcore."""
