"""The distance of samplers to the accurately solved flow of a network with guidance."""
