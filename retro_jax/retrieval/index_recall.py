"""How much of what is nearest an index finds, and the search parameters that make it find enough."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from retro_jax.retrieval.dense_index import DenseIndex
from retro_jax.retrieval.exact_index import ExactIndex

RECALL_QUERIES, RECALL_AT, RECALL_WANTED = 512, 20, 0.95
# Search parameters are doubled; candidates beyond these cost more than another index would.
MOST_EF_SEARCH, MOST_CANDIDATES = 4096, 32


@dataclass(frozen=True)
class RecallSample:
    """Random chunks of the database as queries, and the exact distance of the last of the nearest other chunks.

    A chunk that is found counts if it is as near as that one: of many copies of a chunk it does not matter which are found.
    Rounding counts for nothing, as both distances are computed from the vectors in one way; a chunk is not its own neighbour.
    """

    ids_Q: np.ndarray
    queries_QD: np.ndarray
    last_Q: np.ndarray
    at: int

    @classmethod
    def of(cls, exact: ExactIndex, seed: int) -> RecallSample:
        """Search ``RECALL_QUERIES`` chunks exactly."""
        chunks = exact.num_chunks
        ids_Q = np.random.default_rng(seed).choice(chunks, min(RECALL_QUERIES, chunks), replace=False, shuffle=False)
        ids_Q.sort()
        queries_QD, at = np.array(exact.vectors.vectors_ND[ids_Q]), min(RECALL_AT, chunks - 1)
        asked_Q = queries_QD.any(axis=1)  # a vector of zeros has no neighbours
        sample = cls(ids_Q[asked_Q], queries_QD[asked_Q], np.zeros(0), at)
        return replace(sample, last_Q=sample._others(exact)[:, -1:].max(axis=1, initial=-np.inf))

    def recall(self, index: DenseIndex | ExactIndex) -> float:
        """Mean share of the ``at`` nearest other chunks that the index finds; 1 where there are none."""
        if not self.at or not len(self.ids_Q):
            return 1.0
        return float((self._others(index) <= self.last_Q[:, None]).mean())

    def _others(self, index: DenseIndex | ExactIndex) -> np.ndarray:
        """Distances [Q, at] of what an index finds nearest, without the chunk itself."""
        ids_QW, distances_QW = index.search(self.queries_QD, self.at + 1)
        distances_QW[ids_QW == self.ids_Q[:, None]] = np.inf
        return np.sort(distances_QW, axis=1)[:, : self.at]


def enough_recall(index: DenseIndex, sample: RecallSample) -> tuple[DenseIndex, float]:
    """The index with search parameters that give ``RECALL_WANTED``, and its recall on the sample.

    As long as it finds less, the parameter is doubled that helps most: how much of the index is looked at, or how many candidates
    are compared by their vectors, where the index has codes in their place. Where nothing helps any more it is returned as it is.
    """
    recall = sample.recall(index)
    while recall < RECALL_WANTED:
        tried = [(sample.recall(candidate), -place, candidate) for place, candidate in enumerate(_wider(index))]
        best, _, candidate = max(tried, default=(0.0, 0, index))
        if best <= recall:
            break
        index, recall = candidate, best
    return index, recall


def _wider(index: DenseIndex) -> list[DenseIndex]:
    """The index with each of its search parameters doubled, as far as there is more."""
    given = dict(part.split("=") for part in index.parameters.split(",") if part)
    wider = []
    for name, most in (("nprobe", index.num_lists), ("efSearch", MOST_EF_SEARCH)):
        if name in given and int(given[name]) < most:
            doubled = {**given, name: str(min(most, 2 * int(given[name])))}
            wider.append(replace(index, parameters=",".join(f"{key}={value}" for key, value in doubled.items())))
    if index.candidates < MOST_CANDIDATES:
        wider.append(replace(index, candidates=2 * index.candidates))
    return wider
