"""Exact look-up of token runs in all training text, so that no retriever decides which leakage is seen.

The text is cut into shards of consecutive chunks. A shard holds its tokens, the suffixes of its documents in lexicographic
order of their first tokens (a suffix array cut to the chunk length), and a Bloom filter of all windows of eight tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_jax.artefact import Artefact, build_artefact, open_artefact
from retro_jax.blocks import LOCAL, concatenate_blocks, run_blocks
from retro_jax.config import ExecutorConfig
from retro_jax.corpus.chunk_table import ChunkTable

NGRAMS = "ngrams"
# The shortest run that is looked up.
RUN = 8
# Building a shard takes about 100 bytes of memory a token.
SHARD_TOKENS = 2**22
FILTER_BITS_PER_WINDOW = 16
ROWS_AT_ONCE = 8192
# Stored tokens are ids + FIRST_TOKEN; below them what ends a document, and what ends a query: the two never match.
DOCUMENT_END, QUERY_END, FIRST_TOKEN = 0, 1, 2


@dataclass(frozen=True)
class _Shard:
    tokens: np.ndarray
    order: np.ndarray
    bits: np.ndarray


class NgramLookup:
    """The training text, made to be searched for runs of tokens."""

    def __init__(self, artefact: Artefact) -> None:
        self._longest: int = artefact.settings["longest"]
        names = ("tokens", "order", "bits")
        self._shards = [_Shard(*(artefact.array(f"{i}.{name}") for name in names)) for i in range(artefact.summary["shards"])]

    def longest_run(self, tokens_NC: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
        """The longest run of each row's tokens that stands in a training document.

        Args:
            tokens_NC: int32, at most as wide as the chunks of the table that it was built from.
            lengths_N: how many tokens of each row count.

        Returns:
            int32 [N]; 0 where no run of eight tokens is found.

        Raises:
            ValueError: the rows are wider.
        """
        if tokens_NC.shape[1] > self._longest:
            raise ValueError(
                f"rows of {tokens_NC.shape[1]} tokens are longer than {self._longest}, the chunk length of the look-up"
            )
        runs_N = np.zeros(len(tokens_NC), np.int32)
        for start in range(0, len(tokens_NC) if tokens_NC.shape[1] >= RUN else 0, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            inside_NC = np.arange(tokens_NC.shape[1]) < np.asarray(lengths_N)[rows, None]
            queries_NC = np.where(inside_NC, tokens_NC[rows] + FIRST_TOKEN, QUERY_END).astype(np.int32)
            hashes_NW = _window_hashes(queries_NC)
            for shard in self._shards:
                candidates_NW = _maybe_there(shard.bits, hashes_NW) & inside_NC[:, RUN - 1 :]
                _raise_runs(shard, queries_NC, candidates_NW, runs_N[rows])
        return runs_N


def build_ngrams(data_dir: Path, table: ChunkTable, *, workers: int = 1, executor: ExecutorConfig = LOCAL) -> NgramLookup:
    """Build ``<data_dir>/ngrams`` from the train split's chunks, or open it. Memory does not grow with the corpus."""
    chunks = open_artefact(Path(data_dir) / "chunks", "chunks")

    def make(folder: Path) -> Mapping:
        shards = shards_of(table)
        run_blocks(
            folder,
            build_shard,
            ((table, start, stop) for start, stop in shards),
            workers=min(workers, max(1, len(shards))),
            description="8-token look-up",
            total=len(shards),
            executor=executor,
            describe=lambda task: task[0].describe(*task[1:]),
        )
        for shard in range(len(shards)):
            for name in ("tokens", "order", "bits"):
                concatenate_blocks(folder, 1, name, folder / f"{shard}.{name}.npy", first=shard)
        windows = sum(len(np.load(folder / f"{shard}.order.npy", mmap_mode="r")) for shard in range(len(shards)))
        return {"shards": len(shards), "windows": windows}

    settings = {"run": RUN, "longest": table.chunk_len, "shard_tokens": SHARD_TOKENS}
    artefact = build_artefact(
        Path(data_dir) / NGRAMS, kind=NGRAMS, settings=settings, inputs={"chunks": chunks.fingerprint}, make=make
    )
    return NgramLookup(artefact)


def shards_of(table: ChunkTable) -> list[tuple[int, int]]:
    """The first chunk of each shard, and the one after its last."""
    step = max(1, SHARD_TOKENS // table.chunk_len)
    return [(start, min(start + step, table.num_chunks)) for start in range(0, table.num_chunks, step)]


def build_shard(table: ChunkTable, start: int, stop: int) -> dict[str, np.ndarray]:
    """Suffixes that start in chunks ``start`` to ``stop``; the text goes on a chunk further, so that none is cut short."""
    tokens, own = _shard_tokens(table, start, stop)
    ends = np.flatnonzero(tokens == DOCUMENT_END)
    room = ends[np.searchsorted(ends, np.arange(len(tokens)))] - np.arange(len(tokens))
    starts = np.flatnonzero(room >= RUN).astype(np.int32)
    # The windows of the next chunk are in the filter too: a run that starts in this shard may go on there.
    hashes = _window_hashes(tokens[None])[0][starts]
    bits = np.zeros(max(64, 2 ** int(np.ceil(np.log2(len(starts) * FILTER_BITS_PER_WINDOW + 1)))) // 8, np.uint8)
    for place in _places(bits, hashes):
        np.bitwise_or.at(bits, place >> 3, np.uint8(1) << (place & 7).astype(np.uint8))
    return {"tokens": tokens, "order": _suffix_order(tokens, starts[starts < own], table.chunk_len), "bits": bits}


def _shard_tokens(table: ChunkTable, start: int, stop: int) -> tuple[np.ndarray, int]:
    """The documents' tokens one after another, each ended; and how many of them belong to the shard's own chunks."""
    C = table.chunk_len
    tokens_NC, lengths_N = table.gather(np.arange(start, stop), C)
    last_N = np.asarray(table.remaining_N[start:stop]) <= C
    flat_NE = np.full((stop - start, C + 1), DOCUMENT_END, np.int32)
    flat_NE[:, :C] = tokens_NC + FIRST_TOKEN
    place_E = np.arange(C + 1)
    own = flat_NE[(place_E < lengths_N[:, None]) | ((place_E == C) & last_N[:, None])]
    beyond_C, beyond_length = (array[0] for array in table.gather(np.array([stop - 1]), 2 * C))
    beyond = beyond_C[C : max(C, beyond_length)] + FIRST_TOKEN
    return np.concatenate([own, beyond, np.full(2 * C + RUN, DOCUMENT_END, np.int32)]).astype(np.int32), len(own)


def _suffix_order(tokens: np.ndarray, starts: np.ndarray, longest: int) -> np.ndarray:
    """``starts`` sorted by the ``longest`` tokens that follow each: by packed keys of a few tokens, then those that are tied by
    the next few."""
    bits = int(tokens.max(initial=FIRST_TOKEN)).bit_length()
    width = min(RUN, 64 // bits)
    packed = np.zeros(len(tokens) - width + 1, np.uint64)
    for i in range(width):
        packed = (packed << np.uint64(bits)) | tokens[i : len(packed) + i].astype(np.uint64)
    order = starts.copy()
    tied, group = np.arange(len(starts)), np.zeros(len(starts), np.int32)
    for depth in range(0, longest, width):
        keys = packed[np.minimum(order[tied] + depth, len(packed) - 1)]
        by_key = np.argsort(keys, kind="stable") if depth == 0 else np.lexsort((keys, group))
        order[tied] = order[tied][by_key]
        keys = keys[by_key]
        first = np.ones(len(tied) + 1, bool)
        first[1:-1] = (group[1:] != group[:-1]) | (keys[1:] != keys[:-1])
        still = ~(first[:-1] & first[1:])
        tied, group = tied[still], np.cumsum(first[:-1], dtype=np.int32)[still]
        if len(tied) == 0:
            break
    return order


def _raise_runs(shard: _Shard, queries_NC: np.ndarray, candidates_NW: np.ndarray, runs_N: np.ndarray) -> None:
    """Raise ``runs_N`` to the longest runs of the shard. No run is longer than the windows that may be there one after another
    allow, so the most promising window of each row is looked up first, and the others only where they could be longer."""
    bounds_NW = candidates_NW.astype(np.int32)
    for w in range(bounds_NW.shape[1] - 2, -1, -1):
        bounds_NW[:, w] = (bounds_NW[:, w + 1] + 1) * candidates_NW[:, w]
    bounds_NW += (RUN - 1) * candidates_NW
    rows = np.arange(len(runs_N))
    while True:
        windows = bounds_NW[rows].argmax(axis=1)
        promising = bounds_NW[rows, windows] > runs_N[rows]
        rows, windows = rows[promising], windows[promising]
        if len(rows) == 0:
            return
        bounds_NW[rows, windows] = 0
        found = _common_prefix(shard, _suffixes(queries_NC, rows, windows))
        runs_N[rows] = np.maximum(runs_N[rows], np.where(found >= RUN, found, 0))


def _suffixes(queries_NC: np.ndarray, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    C = queries_NC.shape[1]
    padded_N2C = np.concatenate([queries_NC[rows], np.full((len(rows), C), QUERY_END, np.int32)], axis=1)
    return np.take_along_axis(padded_N2C, starts[:, None] + np.arange(C), axis=1)


def _common_prefix(shard: _Shard, suffixes_MC: np.ndarray) -> np.ndarray:
    """The longest prefix of each query that stands in the shard: shared with one of the two suffixes between which the query
    sorts."""
    low, high = np.zeros(len(suffixes_MC), np.int64), np.full(len(suffixes_MC), len(shard.order))
    best = np.zeros(len(suffixes_MC), np.int32)
    while True:
        open_M = np.flatnonzero(low < high)
        if len(open_M) == 0:
            return best
        middle = (low[open_M] + high[open_M]) // 2
        shared, smaller = _compare(shard, middle, suffixes_MC[open_M])
        best[open_M] = np.maximum(best[open_M], shared)
        low[open_M] = np.where(smaller, middle + 1, low[open_M])
        high[open_M] = np.where(smaller, high[open_M], middle)


def _compare(shard: _Shard, places: np.ndarray, suffixes_MC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many first tokens the suffixes at these places share with the queries, and whether they sort before them."""
    windows = np.lib.stride_tricks.sliding_window_view(shard.tokens, suffixes_MC.shape[1])
    stored_MC = windows[shard.order[places]]
    differs_MC = stored_MC != suffixes_MC
    shared = np.where(differs_MC.any(axis=1), differs_MC.argmax(axis=1), suffixes_MC.shape[1])
    at = np.minimum(shared, suffixes_MC.shape[1] - 1)[:, None]
    smaller = (np.take_along_axis(stored_MC, at, 1) < np.take_along_axis(suffixes_MC, at, 1))[:, 0]
    return shared.astype(np.int32), smaller


def _window_hashes(tokens_NC: np.ndarray) -> np.ndarray:
    """uint64 [N, C - 7], one for every window of eight tokens."""
    windows = tokens_NC.shape[1] - RUN + 1
    hashes_NW = np.zeros((len(tokens_NC), windows), np.uint64)
    for i in range(RUN):
        hashes_NW = hashes_NW * np.uint64(0x9E3779B97F4A7C15) + tokens_NC[:, i : i + windows].astype(np.uint64)
        hashes_NW ^= hashes_NW >> np.uint64(29)
    return hashes_NW


def _places(bits: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two bit numbers of the filter for each hash."""
    mask = np.uint64(len(bits) * 8 - 1)
    return (hashes & mask).astype(np.int64), ((hashes >> np.uint64(32)) & mask).astype(np.int64)


def _maybe_there(bits: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """False where a window is surely not in the shard."""
    first, second = ((bits[place >> 3] >> (place & 7).astype(np.uint8)) & 1 for place in _places(bits, hashes))
    return (first & second).astype(bool)
