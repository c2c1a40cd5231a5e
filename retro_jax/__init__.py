"""Retrieval-augmented pretraining of language models (RETRO, RETRO++, InstructRetro) in JAX."""

__version__ = "0.1.0"
