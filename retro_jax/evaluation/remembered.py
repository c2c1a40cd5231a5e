"""Neighbours that were looked up before: the answers to a question share its chunks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retro_jax.generation.neighbours import Found, Retriever


class _One(NamedTuple):
    """The neighbours of one text: :class:`Found` without its first dim."""

    tokens_KR: np.ndarray
    mask_KR: np.ndarray
    ids_K: np.ndarray
    distances_K: np.ndarray


class RememberingRetriever:
    """Asks another retriever for each text once.

    Args:
        retriever: is asked.
        chunks: of so many texts, those that were asked for last, the neighbours are kept.
    """

    def __init__(self, retriever: Retriever, chunks: int = 2**14) -> None:
        self._retriever, self._room = retriever, chunks
        self._known: OrderedDict[bytes, _One] = OrderedDict()

    def find(self, queries: Sequence[np.ndarray]) -> Found:
        """See :class:`retro_jax.generation.neighbours.Retriever`; at least one query."""
        keys = [np.ascontiguousarray(query, np.int32).tobytes() for query in queries]
        new = {key: query for key, query in zip(keys, queries, strict=True) if key not in self._known}
        if new:
            found = self._retriever.find(list(new.values()))
            self._known.update(zip(new, (_One(*one) for one in zip(*found, strict=True)), strict=True))
        for key in keys:
            self._known.move_to_end(key)
        together = [self._known[key] for key in keys]
        while len(self._known) > self._room:
            self._known.popitem(last=False)
        return Found(*(np.stack(arrays) for arrays in zip(*together, strict=True)))
