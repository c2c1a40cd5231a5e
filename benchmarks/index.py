"""What `index_factory = 'auto'` gives by size: recall at 20 against exact search, seconds and memory to build, queries a second,
and what our search costs over faiss's own on the same index, with the same threads, batch and number searched.

The vectors are a mixture: --clusters random directions, and about each of them vectors that differ from it by noise of --noise
times its length; they have unit length and are written block by block. --vectors FILE takes those of a prepared corpus
(<workdir>/data/vectors/train.vectors.npy) in their place. Queries are vectors that are not in the database. Each size is measured
in a process of its own; its memory (of its workers too) is read from outside: `anonymous` is what the machine must have,
`resident` counts pages of mapped files, which it can take back.

The sides of the search alternate in one process, on one thread: `faiss` is the index's own search, `ours` adds distances from the
vectors, `whole` also leaves out the own document and orders by (distance, id). CPU time stands beside wall time, as other
programs on the machine disturb it less.

    python -m benchmarks.index [--sizes 10000 100000 1000000] [--vectors FILE] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.timing import Timed, cpu_name, interleave, spread
from retro_jax.array_files import array_file, save_array
from retro_jax.config import RetrievalConfig
from retro_jax.retrieval.dense_build import build_dense_index
from retro_jax.retrieval.dense_index import DenseIndex, import_faiss, one_thread, read_index
from retro_jax.retrieval.exact_index import ExactIndex
from retro_jax.retrieval.index_costs import costs_of
from retro_jax.retrieval.search import TIE_ROOM, nearest_outside
from retro_jax.retrieval.vectors import DenseVectors

AT, ROWS_AT_ONCE = 20, 65536
RESULTS = Path(__file__).parent / "results" / "index.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """One database, and how it is measured."""

    chunks: int
    dim: int
    clusters: int
    noise: float
    vectors: str | None
    factory: str
    train_chunks: int
    workers: int
    queries: int
    recall_queries: int
    rounds: int
    folder: str


def main() -> None:
    """Measure every size, print a line for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--vectors", help="a train.vectors.npy; its first vectors are the database, its last the queries")
    parser.add_argument("--factory", default="auto")
    parser.add_argument("--train-chunks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--queries", type=int, default=4096, help="of a batch")
    parser.add_argument("--recall-queries", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="for vectors and indexes, which are deleted afterwards")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = vars(parser.parse_args())
    output, folder, sizes = given.pop("output"), given.pop("folder"), given.pop("sizes")
    result = {
        "what": "indexes of dense vectors: recall, build, memory, search beside faiss's own search",
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": cpu_name()},
        "versions": {
            "python": platform.python_version(),
            **{n: importlib.metadata.version(n) for n in ("faiss-cpu", "numpy", "jax")},
        },
        "cases": [],
    }
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            result["cases"].append(measured(Case(chunks=size, folder=place, **given)))
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(line_of(result["cases"][-1]), flush=True)


def measured(case: Case) -> dict[str, Any]:
    """One size, in a process of its own whose memory is watched."""
    spawn = multiprocessing.get_context("spawn")
    phase = spawn.Value("i", 0)
    child = spawn.Process(target=measure, args=(case, phase))
    load = [round(load, 1) for load in os.getloadavg()]
    child.start()
    peaks = [{"anonymous": 0, "resident": 0} for _ in PHASES]
    while child.is_alive():
        for kind, count in memory_of(child.pid).items():
            peaks[phase.value][kind] = max(peaks[phase.value][kind], count)
        time.sleep(0.05)
    assert child.exitcode == 0, f"the measuring process ended with {child.exitcode}"
    told = json.loads((Path(case.folder) / "told.json").read_text())
    memory = {
        name: {kind: round(count / 2**20) for kind, count in peak.items()} for name, peak in zip(PHASES, peaks, strict=True)
    }
    return {**told, "peak_mib": memory, "load": {"before": load, "after": [round(load, 1) for load in os.getloadavg()]}}


PHASES = ("vectors", "build", "recall", "search")


def memory_of(process: int | None) -> dict[str, int]:
    """Bytes of a process and of its children now."""
    counts = {"anonymous": 0, "resident": 0}
    try:
        family = [psutil.Process(process)]
        family += family[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return counts
    for member in family:
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{member.pid}/status").read_text().splitlines())
        except OSError:
            continue
        for kind, name in (("anonymous", "RssAnon"), ("resident", "VmRSS")):
            counts[kind] += int(lines.get(name, "0 kB").split()[0]) * 1024
    return counts


def measure(case: Case, phase: Any) -> None:
    """Make the vectors, build, search; writes ``told.json``."""
    folder = Path(case.folder)
    with phase_of(phase, "vectors"):
        database, queries_QD = vectors_of(case)
    config = RetrievalConfig(
        embedder="lsa", index_factory=case.factory, index_train_chunks=case.train_chunks, workers=case.workers, saved=AT
    )
    costs = costs_of(config, len(database), case.dim)
    print(f"{case.chunks:,} chunks x {case.dim}: {costs}", flush=True)
    (folder / "index").mkdir()
    wall, cpu = time.perf_counter(), cpu_seconds()
    with phase_of(phase, "build"):
        summary = dict(build_dense_index(config, database, folder / "index"))
    built = {"wall_seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1)}
    shutil.rmtree(folder / "index" / "blocks", ignore_errors=True)
    size = sum(path.stat().st_size for path in (folder / "index").iterdir())
    index = DenseIndex(
        read_index(folder / "index"), database, "cosine", summary["longest"], summary["search_parameters"], summary["candidates"]
    )
    with phase_of(phase, "recall"):
        exact, sample = ExactIndex(database, "cosine", summary["longest"]), queries_QD[: case.recall_queries]
        last_Q = np.sort(exact.search(sample, AT)[1], axis=1)[:, -1:]
        recall = float((np.sort(index.search(sample, AT)[1], axis=1) <= last_Q).mean())
    with phase_of(phase, "search"):
        searched = search_of(index, queries_QD, case.rounds)
    told = {
        "chunks": len(database),
        "dim": case.dim,
        "vectors": (case.vectors and Path(case.vectors).name) or f"mixture of {case.clusters} clusters, noise {case.noise}",
        "index": summary,
        "bytes_per_chunk": round(size / len(database), 1),
        "estimated": {"build_seconds": round(costs.build_seconds), "memory_mib": round(costs.memory / 2**20)},
        "build": built,
        "recall_at_20": {"queries": len(sample), "recall": round(recall, 4)},
        "search": searched,
    }
    (folder / "told.json").write_text(json.dumps(told))


@contextmanager
def phase_of(phase: Any, name: str) -> Iterator[None]:
    """What the memory seen meanwhile is counted under."""
    phase.value = PHASES.index(name)
    yield


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = (resource.getrusage(kind) for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def vectors_of(case: Case) -> tuple[DenseVectors, np.ndarray]:
    """The database on disk, and queries that are not in it."""
    queries, path = max(case.queries, case.recall_queries), Path(case.folder) / "train.vectors.npy"
    if case.vectors:
        found_ND = np.load(case.vectors, mmap_mode="r")
        chunks = min(case.chunks, len(found_ND) - queries)
        save_array(path, found_ND[:chunks])
        return DenseVectors(path), np.array(found_ND[-queries:])
    rng = np.random.default_rng(0)
    centres_CD = unit(rng.standard_normal((case.clusters, case.dim), np.float32))

    def draw(count: int) -> np.ndarray:
        noise_ND = rng.standard_normal((count, case.dim), np.float32) * np.float32(case.noise / np.sqrt(case.dim))
        return unit(centres_CD[rng.integers(0, case.clusters, count)] + noise_ND)

    queries_QD = draw(queries)
    with array_file(path, np.float32, (case.chunks, case.dim)) as append:
        for start in range(0, case.chunks, ROWS_AT_ONCE):
            append(draw(min(ROWS_AT_ONCE, case.chunks - start)))
    return DenseVectors(path), queries_QD


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """The same vectors with unit length."""
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def search_of(index: DenseIndex, queries_QD: np.ndarray, rounds: int) -> dict[str, Any]:
    """Queries a second of the three sides, and what ours takes more than faiss's own; the ids are compared first."""
    faiss, width = import_faiss(), AT + TIE_ROOM
    outside, document_N = np.full(len(queries_QD), -1), np.arange(index.num_chunks)

    def by_faiss() -> np.ndarray:
        with one_thread(faiss):
            return index.index.search(queries_QD, width * index.candidates)[1]

    sides = {
        "faiss": Timed(by_faiss),
        "ours": Timed(lambda: index.search(queries_QD, width)),
        "whole": Timed(lambda: nearest_outside(index, queries_QD, outside, document_N, AT)),
    }
    raw_QW, ours_QW = by_faiss(), index.search(queries_QD, width)[0]
    if index.candidates == 1:
        assert np.array_equal(raw_QW, ours_QW)
    whole_QS = nearest_outside(index, queries_QD, outside, document_N, AT)[0]
    inside = np.mean([np.isin(whole, raw).mean() for whole, raw in zip(whole_QS, raw_QW, strict=True)])
    interleave(sides, rounds)
    told: dict[str, Any] = {"queries": len(queries_QD), "threads": 1, "width": width, "candidates": index.candidates}
    told |= {"ids_equal": index.candidates == 1, "share_of_whole_in_faiss": round(float(inside), 4)}
    for name, side in sides.items():
        told[name] = {
            "queries_per_second": spread(len(queries_QD) / np.array(side.wall)),
            "queries_per_cpu_second": spread(len(queries_QD) / np.array(side.cpu)),
        }
        if name != "faiss":
            told[name]["times_faiss"] = {
                "wall": spread(np.array(side.wall) / np.array(sides["faiss"].wall)),
                "cpu": spread(np.array(side.cpu) / np.array(sides["faiss"].cpu)),
            }
    return told


def line_of(case: dict[str, Any]) -> str:
    """The figures that count."""
    search, memory = case["search"], case["peak_mib"]
    return (
        f"{case['chunks']:>10,} {case['index']['factory']:<28} {case['index']['search_parameters']:<12} "
        f"recall@20 {case['recall_at_20']['recall']:.4f}  build {case['build']['wall_seconds']:.0f} s "
        f"({case['build']['cpu_seconds']:.0f} CPU), {memory['build']['anonymous']} MiB; search "
        f"{search['ours']['queries_per_cpu_second']['median']:.0f} queries/CPU s, {memory['search']['anonymous']} MiB, ours "
        f"{search['ours']['times_faiss']['cpu']['median']:.3f} and whole {search['whole']['times_faiss']['cpu']['median']:.3f} "
        f"of faiss by CPU time; load {case['load']['after'][0]}"
    )


if __name__ == "__main__":
    main()
