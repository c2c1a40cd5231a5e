"""Chunked cross-attention: a chunk's last token and the next C - 1 tokens read that chunk's neighbours."""

from retro_jax.kernels.chunked_cross_attention.api import chunked_cross_attention as chunked_cross_attention
