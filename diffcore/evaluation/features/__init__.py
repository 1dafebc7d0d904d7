"""Features of images, in which distances between sets of images are measured."""
