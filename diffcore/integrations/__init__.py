"""Integrations: one sub-package for each library that diffcore plugs into."""
