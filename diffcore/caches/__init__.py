"""Caches: features of a network that are reused at neighbouring noise levels of one integration."""

from diffcore.caches.base import Cache
from diffcore.caches.cached_denoiser import CachedDenoiser, cached, describe_reuse
from diffcore.caches.deep_cache import DeepCache
from diffcore.caches.diffusers_cache import DiffusersCache
from diffcore.caches.first_block import FirstBlockCache

__all__ = [
    "Cache",
    "CachedDenoiser",
    "DeepCache",
    "DiffusersCache",
    "FirstBlockCache",
    "cached",
    "describe_reuse",
]
