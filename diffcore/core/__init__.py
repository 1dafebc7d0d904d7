"""The core: predictions, keyed noise, the process record, denoisers and exact oracles."""
