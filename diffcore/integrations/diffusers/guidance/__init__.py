"""Guidance rules inside diffusers pipelines: `attach` and the guider of Modular Diffusers."""
