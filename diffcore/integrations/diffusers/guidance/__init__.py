"""Guidance rules of diffcore in diffusers pipelines: `attach`, and a guider."""
