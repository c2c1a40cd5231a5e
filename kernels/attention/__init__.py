"""Softmax attention under an arbitrary mask."""

from retro_jax.kernels.attention.api import attention as attention
