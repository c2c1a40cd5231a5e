"""Which split a document belongs to: a hash decides, so that it depends on nothing but the document."""

from __future__ import annotations

import hashlib

from retro_jax.config import CorpusConfig, Split


def split_of(key: bytes, config: CorpusConfig) -> Split:
    """The split of the document with this key (its text's UTF-8 bytes, its group's, or its tokens').

    The hash is read as a fraction of 1: the lowest ``test_fraction`` is test, the highest ``valid_fraction`` valid, so that
    changing one leaves the other's documents where they are.
    """
    fraction = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
    if fraction < config.test_fraction:
        return "test"
    if fraction >= 1.0 - config.valid_fraction:
        return "valid"
    return "train"


def split_of_text(text: str, group: str, config: CorpusConfig) -> Split:
    """:func:`split_of` by the text or the group, as ``config.split_by`` says."""
    return split_of((text if config.split_by == "text" else group).encode(), config)
