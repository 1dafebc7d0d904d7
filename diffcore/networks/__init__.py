"""Small networks for points, volumes and video, and learned noise levels around any network."""

from diffcore.networks.guidance_embedding import GuidanceEmbedding
from diffcore.networks.learned_levels import LearnedLevelsNetwork
from diffcore.networks.perceptron import Perceptron
from diffcore.networks.two_times import TwoTimes
from diffcore.networks.unet3d import UNet3d

__all__ = ["GuidanceEmbedding", "LearnedLevelsNetwork", "Perceptron", "TwoTimes", "UNet3d"]
