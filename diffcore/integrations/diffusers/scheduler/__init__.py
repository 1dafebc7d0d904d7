"""DiffcoreScheduler: the samplers, grids and schedules of diffcore as a diffusers scheduler."""
