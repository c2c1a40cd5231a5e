"""Reading training batches with neighbours: gathered from the tables, joined, and by two look-ups a neighbour.

The rival does what Megatron-LM's retro_dataset does for a sample: for every chunk its neighbours' ids, for every neighbour one
look-up of its chunk and one of the next chunk, each a slice of the memory-mapped store. (Megatron also opens an HDF5 file for
every chunk; the rival is spared that, and reads ids from the same array.) All sides read the rows that training reads, in its
order, and give the same tokens; that is checked before anything is timed. One process, interleaved rounds, random tokens.

Warm: the files are in memory. Cold: before each round of each side the page cache is told to drop them (posix_fadvise,
POSIX_FADV_DONTNEED), and the tables are opened anew; what the process then reads from the disk is counted (/proc/self/io). Also
the share of time that a training step would wait for its batch when batches are read ahead.

    python -m benchmarks.input_pipeline [--chunks 2000000] [--rounds 15] [--cold-rounds 7]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.timing import cpu_name, spread
from retro_jax.artefact import build_artefact, open_artefact
from retro_jax.config import SPLITS, ChunkConfig, Config, DataConfig, ModelConfig, TrainConfig
from retro_jax.corpus.chunk_table import ChunkTable, build_chunks
from retro_jax.corpus.token_store import TokenStore, TokenStoreWriter
from retro_jax.data.batch import Batch
from retro_jax.data.join import build_joined
from retro_jax.data.joined_rows import JoinedRows
from retro_jax.data.pipeline import row_numbers, training_batches
from retro_jax.data.reader import open_reader
from retro_jax.data.training_rows import training_rows
from retro_jax.prepare import Prepared
from retro_jax.retrieval.neighbour_table import NeighbourTable

EOD, VOCAB, SAVED = 0, 32_000, 20
SHAPES = {
    "quick start (B 8, T 256, m 32, k 2, r 64)": (8, 256, ChunkConfig(chunk_len=32, num_neighbours=2, retrieved_len=64)),
    "papers (B 8, T 2048, m 64, k 2, r 128)": (8, 2048, ChunkConfig(chunk_len=64, num_neighbours=2, retrieved_len=128)),
}
SIDES = ("gathered", "joined", "two_look_ups")
WARM_BATCHES, COLD_BATCHES, STALL_BATCHES = 4, 4, 21
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
    parser.add_argument("--chunks", type=int, default=2_000_000, help="chunks of the database")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds; medians are reported")
    parser.add_argument("--cold-rounds", type=int, default=7, help="those with cold files")
    parser.add_argument("--folder", type=Path, help="where the files lie while they are read (default: the temporary folder)")
    given = parser.parse_args()
    load, shapes = os.getloadavg(), {}
    for name, (batch_size, seq_len, chunks) in SHAPES.items():
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            steps = max(WARM_BATCHES * given.rounds, COLD_BATCHES * given.cold_rounds, STALL_BATCHES)
            sides = Sides(Path(folder), config_of(batch_size, seq_len, chunks, steps), given.chunks)
            shapes[name] = sides.facts() | {
                "warm": warm(sides, given.rounds),
                "cold": cold(sides, given.cold_rounds),
                "stall_share": {form: {str(s): stall(sides, form, s) for s in STEP_SECONDS} for form in ("gathered", "joined")},
            }
        print_table(name, shapes[name])
    result = {
        "what": "training batches/s with neighbours, gathered, joined, and by two look-ups a neighbour, one process",
        "chunks": given.chunks,
        "rounds": {"warm": given.rounds, "cold": given.cold_rounds},
        "batches_a_round": {"warm": WARM_BATCHES, "cold": COLD_BATCHES},
        "shapes": shapes,
        "machine": {"cpus": os.cpu_count(), "processor": cpu_name()},
        "load_average": {"before": round(load[0], 2), "after": round(os.getloadavg()[0], 2)},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "grain", "array_record")},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def print_table(name: str, shape: dict) -> None:
    """Medians of one shape."""
    print(name)
    for kind in ("warm", "cold"):
        rates = {side: shape[kind]["batches_per_second"][side]["median"] for side in SIDES}
        read = shape[kind].get("mib_read_a_batch", {})
        print(
            f"  {kind}: "
            + ", ".join(f"{s} {rate:,.0f}/s" + (f" ({read[s]:.2f} MiB)" if read else "") for s, rate in rates.items())
        )
    for form, shares in shape["stall_share"].items():
        print(f"  {form}: " + ", ".join(f"a step of {seconds} s waits {share:.2%}" for seconds, share in shares.items()))


def config_of(batch_size: int, seq_len: int, chunks: ChunkConfig, steps: int) -> Config:
    """A run that reads so many batches."""
    return Config(
        chunks=chunks,
        data=DataConfig(seq_len=seq_len, batch_size=batch_size, rows="joined"),
        model=ModelConfig(retro=None),
        training=TrainConfig(steps=steps),
    )


class Sides:
    """The three readers of the same batches, on random text in ``folder``."""

    def __init__(self, folder: Path, config: Config, chunks: int) -> None:
        self.folder, self.config = folder, config
        write_random(folder, config.chunks, chunks)
        self.open()
        build_joined(config, folder, self.prepared)
        numbers, B = row_numbers(self.rows, config.data.seed, None), config.data.batch_size
        self.numbers = [np.array([numbers[B * i + j] for j in range(B)]) for i in range(config.training.steps)]
        self.open()
        self.check()

    def open(self) -> None:
        """Open every table anew, so that nothing of it is mapped yet."""
        chunks = self.config.chunks
        table = ChunkTable(self.folder, "train")
        neighbours = NeighbourTable(self.folder / "neighbours", "train", table, table, chunks.retrieved_len)
        fingerprints = {name: open_artefact(self.folder / name, name).fingerprint for name in ("chunks", "neighbours")}
        self.prepared = Prepared(SimpleNamespace(vocab_size=VOCAB), {"train": table}, {"train": neighbours}, None, fingerprints)
        self.rows = training_rows(table, self.config.data.seq_len, weights=None)
        self.gathered = open_reader(self.config, self.prepared, "train", neighbours=True)
        self.rival = TwoLookUps(table, TokenStore(self.folder / "tokens" / "0-train").tokens, chunks)
        self.joined = JoinedRows(self.folder / "joined") if (self.folder / "joined").exists() else None

    def reader(self, side: str) -> Callable[[int], object]:
        """What reads batch number i."""
        if side == "joined":
            return lambda i: self.joined.read(i * self.config.data.batch_size, self.numbers[i])
        if side == "gathered":
            return lambda i: self.gathered.read(self.rows.chunk_ids(self.numbers[i]))
        return lambda i: self.rival.batch(self.rows.chunk_ids(self.numbers[i]), self.gathered.neighbours.ids_NS)

    def check(self) -> None:
        """All sides read the same tokens where there is text, ours the same bits."""
        one, other = self.reader("gathered")(0), self.reader("joined")(0)
        tokens, neighbours = self.reader("two_look_ups")(0)
        assert isinstance(one, Batch) and isinstance(other, Batch)
        for ours, stored in zip(one[:-1], other[:-1], strict=True):
            np.testing.assert_array_equal(ours, stored, strict=True)
        text = one.segments > 0
        np.testing.assert_array_equal(one.tokens[text], tokens[text])
        np.testing.assert_array_equal(one.neighbours[one.neighbour_mask], neighbours[one.neighbour_mask])
        assert text.any() and one.neighbour_mask.any()

    def facts(self) -> dict:
        """How large the files are."""
        summary = open_artefact(self.folder / "joined", "joined", checksums="none").summary
        tables = sum(
            path.stat().st_size for name in ("tokens", "chunks", "neighbours") for path in (self.folder / name).iterdir()
        )
        stored = {"joined_rows": summary["rows"], "joined_bytes_a_row": round(summary["bytes"] / summary["rows"])}
        return {"tables_mib": round(tables / 2**20), "record_bytes": self.joined.record.dtype.itemsize, **stored}


def warm(sides: Sides, rounds: int) -> dict:
    """Batches/s of all sides in turn, files in memory."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for side in SIDES:
        for i in range(WARM_BATCHES * rounds):
            sides.reader(side)(i)
    for first in range(0, WARM_BATCHES * rounds, WARM_BATCHES):
        for side in SIDES:
            seconds[side].append(timed(sides.reader(side), first, WARM_BATCHES))
    return rates(seconds)


def cold(sides: Sides, rounds: int) -> dict:
    """The same, with files that the page cache has dropped."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    read: dict[str, list[int]] = {side: [] for side in SIDES}
    os.sync()  # only pages that are written can be dropped
    for first in range(0, COLD_BATCHES * rounds, COLD_BATCHES):
        for side in SIDES:
            sides.open()
            gc.collect()
            for path in sides.folder.rglob("*"):
                if path.is_file():
                    drop(path)
            before = bytes_read()
            seconds[side].append(timed(sides.reader(side), first, COLD_BATCHES))
            read[side].append(bytes_read() - before)
    mib = {side: round(float(np.median(read[side])) / COLD_BATCHES / 2**20, 3) for side in SIDES}
    return {**rates(seconds), "mib_read_a_batch": mib}


def timed(read: Callable[[int], object], first: int, count: int) -> float:
    """Seconds a batch."""
    began = time.perf_counter()
    for i in range(first, first + count):
        read(i)
    return (time.perf_counter() - began) / count


def rates(seconds: dict[str, list[float]]) -> dict:
    """Batches/s of each side, and against the two look-ups, round by round."""
    times = {side: np.array(values) for side, values in seconds.items()}
    return {
        "batches_per_second": {side: spread(1 / values) for side, values in times.items()},
        "ratio_to_two_look_ups": {side: spread(times["two_look_ups"] / times[side]) for side in ("gathered", "joined")},
    }


def drop(path: Path) -> None:
    """Tell the page cache to forget a file."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def bytes_read() -> int:
    """What this process has had read from disks so far."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["read_bytes"])


def stall(sides: Sides, form: str, seconds: float) -> float:
    """The share of time that steps of ``seconds`` (asleep, as when an accelerator works) wait for a batch that is read ahead."""
    joined = sides.joined if form == "joined" else None
    batches = training_batches(sides.rows, sides.gathered, sides.config.data, joined=joined)
    next(batches)
    waited, began = 0.0, time.perf_counter()
    for _ in range(STALL_BATCHES - 1):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(seconds)
    total = time.perf_counter() - began
    batches.close()
    return waited / total


def write_random(folder: Path, chunks: ChunkConfig, count: int) -> None:
    """About ``count`` chunks of random tokens in documents of 1 to 2,000, and random neighbours."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 2000, max(1, int(count * chunks.chunk_len / 1000)))
    tokens = random.integers(1, VOCAB, int(lengths.sum() + len(lengths)), dtype=np.uint16)
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


if __name__ == "__main__":
    main()
