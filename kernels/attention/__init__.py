"""Softmax attention of queries to valid keys, or to what precedes them in their segment."""

from retro_jax.kernels.attention.api import attention as attention
from retro_jax.kernels.attention.masks import CausalMask as CausalMask
from retro_jax.kernels.attention.masks import KeyMask as KeyMask
from retro_jax.kernels.attention.masks import Mask as Mask
