"""Small networks for points, volumes and video, and learned parts of a process around any network:
noise levels, and an encoder of x_0.
"""

from diffcore.networks.guidance_embedding import GuidanceEmbedding
from diffcore.networks.learned_levels import LearnedLevelsNetwork
from diffcore.networks.mean_encoder import MeanEncoderNetwork
from diffcore.networks.noise_embedding import NoiseEmbedding
from diffcore.networks.perceptron import Perceptron
from diffcore.networks.two_times import TwoTimes
from diffcore.networks.unet3d import UNet3d

__all__ = [
    "GuidanceEmbedding",
    "LearnedLevelsNetwork",
    "MeanEncoderNetwork",
    "NoiseEmbedding",
    "Perceptron",
    "TwoTimes",
    "UNet3d",
]
