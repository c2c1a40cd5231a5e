"""A tokenizer of numbered words, and a retriever that finds random neighbours which depend on the text alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro_jax.config import ChunkConfig
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.generation.neighbours import Found

VOCAB, END = 60, 59


class Words(Tokenizer):
    """Token i is the word " i"; ``END`` ends a document. The model's table is larger than this vocabulary."""

    def __init__(self) -> None:
        self.vocab_size, self.bos_id, self.eod_id = VOCAB, None, END

    def encode_batch(self, texts: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        return [np.array([int(word) for word in text.split()], np.int32) for text in texts]

    def decode_batch(self, ids: Sequence[np.ndarray]) -> list[str]:
        return ["".join(f" {token}" for token in row) for row in self._drop_specials(ids)]

    def token_bytes(self) -> np.ndarray:
        raise NotImplementedError

    def token(self, number: int) -> str:
        return f" {number}"


class RandomNeighbours:
    """Some neighbours are short and some are missing; ``asked`` keeps the texts that were looked for."""

    def __init__(self, chunks: ChunkConfig) -> None:
        self.chunks, self.asked = chunks, []

    def find(self, queries: Sequence[np.ndarray]) -> Found:
        self.asked += [query.tolist() for query in queries]
        return Found(*(np.stack(parts) for parts in zip(*map(self.find_one, queries), strict=True)))

    def find_one(self, query: np.ndarray) -> Found:
        random = np.random.default_rng(np.asarray(query).tolist())
        K, R = self.chunks.num_neighbours, self.chunks.retrieved_len
        lengths_K = random.integers(R // 2, R + 1, K) * (random.random(K) < 0.8)
        mask_KR = np.arange(R) < lengths_K[:, None]
        ids_K = np.where(lengths_K > 0, random.integers(0, 1000, K), -1)
        distances_K = np.where(lengths_K > 0, np.sort(random.random(K)), np.inf).astype(np.float32)
        return Found(random.integers(0, VOCAB, (K, R)).astype(np.int32) * mask_KR, mask_KR, ids_K, distances_K)


def text(random: np.random.Generator, length: int) -> str:
    return " ".join(map(str, random.integers(0, END, length)))
