"""DiffcoreScheduler: our samplers, grids and schedules as a diffusers scheduler."""
