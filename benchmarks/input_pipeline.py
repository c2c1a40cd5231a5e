"""Reading training batches with neighbours: this project's batched gather against two look-ups a neighbour.

The rival does what Megatron-LM's retro_dataset does for a sample: for every chunk its neighbours' ids, for every neighbour one
look-up of its chunk and one of the next chunk, each a slice of the memory-mapped store. (Megatron also opens an HDF5 file for
every chunk; the rival is spared that, and reads ids from the same array.) Both sides give the same tokens; that is checked
before anything is timed. One process, interleaved rounds, random tokens; also the share of time that a training step would wait
for its batch when batches are read ahead.

    python -m benchmarks.input_pipeline [--chunks 400000] [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.timing import cpu_name, spread
from retro_jax.artefact import build_artefact
from retro_jax.config import SPLITS, ChunkConfig, DataConfig
from retro_jax.corpus.chunk_table import ChunkTable, build_chunks
from retro_jax.corpus.token_store import TokenStore, TokenStoreWriter
from retro_jax.data.pipeline import training_batches
from retro_jax.data.reader import RowReader
from retro_jax.data.training_rows import training_rows
from retro_jax.retrieval.neighbour_table import NeighbourTable

EOD, VOCAB, SAVED = 0, 32_000, 20
SHAPES = {
    "quick start (B 8, T 256, m 32, k 2, r 64)": (8, 256, ChunkConfig(chunk_len=32, num_neighbours=2, retrieved_len=64)),
    "papers (B 8, T 2048, m 64, k 2, r 128)": (8, 2048, ChunkConfig(chunk_len=64, num_neighbours=2, retrieved_len=128)),
}
STEP_SECONDS = (0.05, 0.2)
RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"


class TwoLookUps:
    """The rival: a data set of chunks that is asked for one chunk at a time."""

    def __init__(self, table: ChunkTable, tokens: np.ndarray, chunks: ChunkConfig) -> None:
        self.tokens, self.chunks = tokens, chunks
        self.starts, self.documents = np.asarray(table.start_N), np.asarray(table.document_N)
        self.remaining = np.asarray(table.remaining_N)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, chunk: int) -> dict:
        start, length = self.starts[chunk], min(self.chunks.chunk_len, self.remaining[chunk])
        text = np.array(self.tokens[start : start + length], np.int64)
        if length < self.chunks.chunk_len:
            text = np.concatenate([text, np.full(self.chunks.chunk_len - length, EOD, np.int64)])
        return {"doc_id": self.documents[chunk], "text": text}

    def sample(self, chunk_ids: np.ndarray, neighbour_ids_NS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [T] of a row and its neighbours [L, K, R]."""
        text = np.concatenate([self[chunk]["text"] for chunk in chunk_ids])
        neighbours = []
        for chunk in chunk_ids:
            retrieved = []
            for neighbour in neighbour_ids_NS[chunk][: self.chunks.num_neighbours]:
                first, after = self[neighbour], self[(neighbour + 1) % len(self)]
                if after["doc_id"] != first["doc_id"]:
                    after = {"text": np.full(self.chunks.chunk_len, EOD, np.int64)}
                retrieved.append(np.concatenate([first["text"], after["text"]]))
            neighbours.append(np.stack(retrieved))
        return text, np.stack(neighbours)

    def batch(self, chunk_ids_BL: np.ndarray, neighbour_ids_NS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, T] and neighbours [B, L, K, R]."""
        samples = [self.sample(ids, neighbour_ids_NS) for ids in chunk_ids_BL]
        return np.stack([text for text, _ in samples]), np.stack([neighbours for _, neighbours in samples])


def main() -> None:
    """Measure every shape, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=400_000, help="chunks of the database")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds; medians are reported")
    arguments = parser.parse_args()
    shapes = {}
    for name, (batch_size, seq_len, chunks) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            shapes[name] = measure(Path(folder), batch_size, seq_len, chunks, arguments.chunks, arguments.rounds)
        ours, rival = shapes[name]["batches_per_second"], shapes[name]["two_look_ups_per_second"]
        print(
            f"{name}: {ours['median']:.1f} batches/s against {rival['median']:.1f}, ratio {shapes[name]['ratio']['median']:.2f}"
        )
        for step, share in shapes[name]["stall_share"].items():
            print(f"    a step of {step} s waits {share:.2%} of its time for its batch")
    result = {
        "what": "training batches with neighbours: batched gather against two look-ups a neighbour, one process",
        "chunks": arguments.chunks,
        "rounds": arguments.rounds,
        "shapes": shapes,
        "machine": {"cpus": os.cpu_count(), "processor": cpu_name()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def measure(folder: Path, batch_size: int, seq_len: int, chunks: ChunkConfig, count: int, rounds: int) -> dict:
    """Both sides on the same random rows."""
    reader, rival = random_tables(folder, chunks, count)
    rows = training_rows(reader.queries, seq_len, weights=None)
    random = np.random.default_rng(1)
    ids = [rows.chunk_ids(random.integers(0, len(rows) - 1, batch_size)) for _ in range(rounds * 4)]
    check(reader, rival, ids[0])
    times: dict[str, list[float]] = {"ours": [], "rival": []}
    for first in range(0, len(ids), 4):
        for side, read in (("ours", reader.read), ("rival", lambda i: rival.batch(i, reader.neighbours.ids_NS))):
            began = time.perf_counter()
            for chunk_ids_BL in ids[first : first + 4]:
                read(chunk_ids_BL)
            times[side].append((time.perf_counter() - began) / 4)
    ours, theirs = np.array(times["ours"]), np.array(times["rival"])
    return {
        "batches_per_second": spread(1 / ours),
        "two_look_ups_per_second": spread(1 / theirs),
        "ratio": spread(theirs / ours),
        "stall_share": {str(seconds): stall(reader, batch_size, seq_len, seconds) for seconds in STEP_SECONDS},
    }


def check(reader: RowReader, rival: TwoLookUps, chunk_ids_BL: np.ndarray) -> None:
    """Both sides read the same tokens where there is text."""
    batch = reader.read(chunk_ids_BL)
    tokens, neighbours = rival.batch(chunk_ids_BL, reader.neighbours.ids_NS)
    text = batch.segments > 0
    np.testing.assert_array_equal(batch.tokens[text], tokens[text])
    np.testing.assert_array_equal(batch.neighbours[batch.neighbour_mask], neighbours[batch.neighbour_mask])
    assert text.any() and batch.neighbour_mask.any()


def stall(reader: RowReader, batch_size: int, seq_len: int, seconds: float) -> float:
    """The share of time that steps of ``seconds`` (asleep, as when an accelerator works) wait for a batch that is read ahead."""
    rows = training_rows(reader.queries, seq_len, weights=None)
    batches = training_batches(rows, reader, DataConfig(seq_len=seq_len, batch_size=batch_size))
    next(batches)
    waited, began = 0.0, time.perf_counter()
    for _ in range(20):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(seconds)
    total = time.perf_counter() - began
    batches.close()
    return waited / total


def random_tables(folder: Path, chunks: ChunkConfig, count: int) -> tuple[RowReader, TwoLookUps]:
    """About ``count`` chunks of random tokens in documents of 1 to 2,000, and random neighbours."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 2000, max(1, int(count * chunks.chunk_len / 1000)))
    tokens = random.integers(1, VOCAB, int(lengths.sum() + len(lengths))).astype(np.uint16)
    tokens[np.cumsum(lengths + 1) - 1] = EOD

    def write_tokens(path: Path) -> dict:
        for split in SPLITS:
            with TokenStoreWriter(path / f"0-{split}", np.dtype(np.uint16)) as writer:
                if split == "train":
                    writer.add(tokens, lengths + 1)
        return {"eod": EOD, "sources": [{"name": "random"}]}

    build_artefact(folder / "tokens", kind="tokens", settings={}, inputs={}, make=write_tokens)
    build_chunks(chunks, folder)
    table = ChunkTable(folder, "train")

    def write_neighbours(path: Path) -> dict:
        ids = random.integers(0, len(table), (len(table), SAVED))
        np.save(path / "train.ids.npy", ids)
        np.save(path / "train.distances.npy", np.zeros(ids.shape, np.float32))
        return {}

    build_artefact(folder / "neighbours", kind="neighbours", settings={}, inputs={}, make=write_neighbours)
    neighbours = NeighbourTable(folder / "neighbours", "train", table, table, chunks.retrieved_len)
    reader = RowReader(queries=table, database=table, neighbours=neighbours, chunks=chunks)
    return reader, TwoLookUps(table, TokenStore(folder / "tokens" / "0-train").tokens, chunks)


if __name__ == "__main__":
    main()
