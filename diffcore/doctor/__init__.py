"""What can be known before a training run: faults of its data, settings, network and process."""
