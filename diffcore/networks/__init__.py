"""Small networks for data that are not images: points, volumes and video."""

from diffcore.networks.perceptron import Perceptron
from diffcore.networks.two_times import TwoTimes
from diffcore.networks.unet3d import UNet3d

__all__ = ["Perceptron", "TwoTimes", "UNet3d"]
