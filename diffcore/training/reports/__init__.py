"""What a run reports: metrics, previews, losses on held-out data."""
