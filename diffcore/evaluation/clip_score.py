"""The CLIP score: how well images fit their prompts."""

import torch
from torch import Tensor

__all__ = ["clip_score"]


def clip_score(images: Tensor, texts: Tensor) -> float:
    """The mean of 100 max(cos(image, text), 0) over pairs of CLIP embeddings.

    It lies between 0 and 100. Higher is better. It uses no reference, and its expectation does not
    depend on the number of pairs. Hessel et al. 2021, arXiv:2104.08718, with the weight 100 of
    common use in place of 2.5.

    Args:
        images: (N, d) embeddings of images.
        texts: (N, d) embeddings of their prompts.

    Returns:
        The score.

    Raises:
        ValueError: the shapes differ, or there are no pairs.
    """
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise ValueError(
            f"embeddings are {tuple(images.shape)} and {tuple(texts.shape)}, expected one text for "
            "each image, of equal size"
        )
    cosine = torch.cosine_similarity(images.double(), texts.double(), dim=1)
    return float(100 * cosine.clamp(min=0).mean())
