"""Where `prepare` spends its time: seconds of every stage, and how many Python functions it calls for each chunk.

The stages are built twice, in one process: for their seconds, and under cProfile for the calls. A stage that has a Python loop
over chunks calls something for every chunk; work in arrays and libraries has a few calls a block. The functions that
take most of a stage's time are named with their share.

    python -m benchmarks.prepare_stages CORPUS [--config wiki_small] [--set Class.field=value]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.timing import cpu_name
from retro_jax.artefact import Artefact, open_artefact
from retro_jax.config import Config
from retro_jax.corpus.chunk_table import build_chunks, open_chunk_tables
from retro_jax.corpus.token_stage import build_tokens
from retro_jax.corpus.tokenizer_stage import build_tokenizer
from retro_jax.gin_config import load_config
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import build_embedder
from retro_jax.retrieval.embedding import build_vectors
from retro_jax.retrieval.index import build_index
from retro_jax.retrieval.neighbours import build_neighbours
from retro_jax.retrieval.ngrams import build_ngrams

RESULTS = Path(__file__).parent / "results" / "prepare_stages.json"
NAMED = 3


def main() -> None:
    """Build twice, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="JSON lines, or whatever else CorpusConfig.sources takes")
    parser.add_argument("--config", default="wiki_small")
    parser.add_argument("--set", action="append", default=[], metavar="Class.field=value")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    alone = ["CorpusConfig.workers=1", "RetrievalConfig.workers=1"]
    config = load_config([given.config], [f"CorpusConfig.sources=('{given.corpus}',)", *alone, *given.set])
    with tempfile.TemporaryDirectory() as folder:
        seconds = {name: timed(build) for name, build in stages(config, Path(folder)).items()}
        tables = open_chunk_tables(Path(folder))
        chunks = {split: table.num_chunks for split, table in tables.items()}
        sizes = {name: size_of(Path(folder) / name) for name in seconds}
    with tempfile.TemporaryDirectory() as folder:
        profiles = {name: profiled(build) for name, build in stages(config, Path(folder)).items()}
    total = sum(chunks.values())
    result = {
        "what": "the stages of prepare with one worker: seconds, Python function calls a chunk, shares of the profiled time",
        "machine": {"processor": cpu_name(), "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)},
        "python": platform.python_version(),
        "config": given.config,
        "set": given.set,
        "chunks": chunks,
        "stages": {
            name: {**seconds[name], "bytes": sizes[name], "calls_a_chunk": round(calls / total, 2), "most": most}
            for name, (calls, most) in profiles.items()
        },
    }
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    show(result, total)


def stages(config: Config, folder: Path) -> dict[str, Callable[[], object]]:
    """What builds each artefact, in order."""
    retrieval = config.retrieval

    def made(name: str) -> Artefact:
        return open_artefact(folder / name, name, checksums="none")

    return {
        "tokenizer": lambda: build_tokenizer(config.tokenizer, config.corpus, folder),
        "tokens": lambda: build_tokens(config.corpus, folder),
        "chunks": lambda: build_chunks(config.chunks, folder),
        "ngrams": lambda: build_ngrams(folder, open_chunk_tables(folder)["train"]),
        "embedder": lambda: build_embedder(retrieval, ChunkTexts.of(folder, retrieval.context), folder / "embedder"),
        "vectors": lambda: build_vectors(
            retrieval, ChunkTexts.of(folder, retrieval.context), made("embedder"), folder / "vectors"
        ),
        "index": lambda: build_index(retrieval, made("vectors"), folder / "index"),
        "neighbours": lambda: build_neighbours(retrieval, folder, open_chunk_tables(folder), config.chunks),
    }


def timed(build: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds of one build."""
    wall, cpu = time.perf_counter(), time.process_time()
    build()
    return {"wall_seconds": round(time.perf_counter() - wall, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}


def profiled(build: Callable[[], object]) -> tuple[int, list[dict]]:
    """How many functions written in Python are called, and the functions of any kind that take most of the time themselves."""
    profile = cProfile.Profile()
    profile.runcall(build)
    stats = pstats.Stats(profile)
    functions = stats.stats  # type: ignore[attr-defined]
    calls = sum(count for (file, _, _), (_, count, *_) in functions.items() if file != "~")
    longest = sorted(functions.items(), key=lambda item: -item[1][2])[:NAMED]
    most = [
        {"function": name_of(function), "calls": entry[1], "share": round(entry[2] / stats.total_tt, 3)}  # type: ignore[attr-defined]
        for function, entry in longest
    ]
    return calls, most


def name_of(function: tuple[str, int, str]) -> str:
    """A function's name with its file's."""
    file, _, name = function
    return name.strip("<>") if file == "~" else f"{Path(file).stem}.{name}"


def size_of(folder: Path) -> int:
    """Bytes of an artefact."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(result: dict, total: int) -> None:
    """The table."""
    table = Table(title=f"{total:,} chunks, one worker")
    for column in ("stage", "wall s", "CPU s", "chunks/s", "MB", "calls/chunk", "most of the time"):
        table.add_column(column, justify="left" if column in ("stage", "most of the time") else "right")
    for name, stage in result["stages"].items():
        most = ", ".join(f"{entry['function']} {entry['share']:.0%}" for entry in stage["most"])
        rate = total / max(stage["wall_seconds"], 0.01)
        numbers = (stage["wall_seconds"], stage["cpu_seconds"], f"{rate:,.0f}", f"{stage['bytes'] / 1e6:,.0f}")
        table.add_row(name, *map(str, numbers), str(stage["calls_a_chunk"]), most)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
