"""The learning rate, and the noise levels of the training steps."""
