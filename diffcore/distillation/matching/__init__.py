"""Students that map noise to samples, compared with data and teachers by their distribution."""
