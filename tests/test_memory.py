"""The memory that each data stage takes does not grow with the corpus.

What counts is the peak of a stage's anonymous memory (``RssAnon``), read from outside while the stage runs in a process of its
own. Peak RSS has the pages of mapped files too, which the kernel takes back whenever it needs them: a mapped file that is read
once is in it whole, as long as nobody else wants the memory.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from retro_jax.prepare import STAGES

REPOSITORY = Path(__file__).resolve().parent.parent
MAY_GROW = 1.3
# Most of a process is the libraries that it has loaded, so the growth is bounded too. Measured: at most 1 MiB.
MAY_GROW_KIB = 3 * 1024
# Each stage runs in a fork of a process that has imported everything and run nothing. Blocks of all kinds are made so small
# that the smaller corpus has several of each, too.
RUN = """
import json, os, sys, time
from pathlib import Path

import faiss
import sklearn.feature_extraction.text, sklearn.preprocessing, sklearn.utils.extmath

from retro_jax.artefact import open_artefact
from retro_jax.config import ChunkConfig, CorpusConfig, RetrievalConfig, TokenizerConfig
from retro_jax.corpus import chunk_table, token_stage, token_store, tokenizer_stage
from retro_jax.retrieval import dense_build, disk_lists, embedder, embedding, exact_index, index, lsa, neighbours, ngrams
from retro_jax.retrieval import sparse_index
from retro_jax.retrieval.chunk_texts import ChunkTexts

chunk_table.CUT_DOCUMENTS = 64
token_store.COPY_ITEMS = 2**10
ngrams.SHARD_TOKENS = 2**14
sparse_index.SHARD_ENTRIES, sparse_index.RESULTS_AT_ONCE = 2**14, 2**14
dense_build.ADD_AT_ONCE = disk_lists.ADD_AT_ONCE = 1024
exact_index.DEVICE_BYTES = 2**20
lsa.READ_AT_ONCE = 1024

source, data, embedder_name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
corpus = CorpusConfig(sources=(source,), valid_fraction=0.05, test_fraction=0.05, workers=1, block_documents=64)
tokenizer = TokenizerConfig(vocab_size=512, train_bytes=100_000)
chunks = ChunkConfig(chunk_len=16, retrieved_len=32)
config = RetrievalConfig(
    embedder=embedder_name, features=2**14, lsa_dim=64, lsa_train_chunks=1000, index_factory="IVF16,Flat",
    index_search="nprobe=2", index_train_chunks=1000, saved=10, block_chunks=256, workers=1,
)

def made(name):
    return open_artefact(data / name, name)

stages = {
    "tokenizer": lambda: tokenizer_stage.build_tokenizer(tokenizer, corpus, data),
    "tokens": lambda: token_stage.build_tokens(corpus, data),
    "chunks": lambda: chunk_table.build_chunks(chunks, data),
    "ngrams": lambda: ngrams.build_ngrams(data, chunk_table.open_chunk_tables(data)["train"]),
    "embedder": lambda: embedder.build_embedder(config, ChunkTexts.of(data), data / "embedder"),
    "vectors": lambda: embedding.build_vectors(config, ChunkTexts.of(data), made("embedder"), data / "vectors"),
    "index": lambda: index.build_index(config, made("vectors"), data / "index"),
    "neighbours": lambda: neighbours.build_neighbours(config, data, chunk_table.open_chunk_tables(data), chunks),
}
peaks = {}
for name, build in stages.items():
    child = os.fork()
    if child == 0:
        build()
        os._exit(0)
    peaks[name] = {"RssAnon": 0, "VmHWM": 0}
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
        for kind in peaks[name].keys() & lines.keys():
            peaks[name][kind] = max(peaks[name][kind], int(lines[kind].split()[0]))
        time.sleep(0.002)
    assert ended[1] == 0, name
print(json.dumps(peaks))
"""


def peaks_of(folder: Path, documents: int, embedder: str) -> dict[str, dict[str, int]]:
    """KiB of every stage over a corpus of so many documents of about 100 words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(2000)]
    with (folder / f"{documents}.jsonl").open("w") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=100))}) + "\n")
    files = [str(folder / f"{documents}.jsonl"), str(folder / f"data{documents}")]
    command = [sys.executable, "-c", RUN, *files, embedder]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("embedder", "documents"),
    [("lsa", 200), pytest.param("lsa", 1500, marks=pytest.mark.slow), pytest.param("tfidf", 400, marks=pytest.mark.slow)],
)
def test_no_stage_takes_more_for_ten_times_the_documents(embedder: str, documents: int, tmp_path: Path) -> None:
    small, large = peaks_of(tmp_path, documents, embedder), peaks_of(tmp_path, 10 * documents, embedder)
    for stage in STAGES:
        print(stage, *(f"{kind} {small[stage][kind] / 1024:.0f} -> {large[stage][kind] / 1024:.0f} MiB" for kind in small[stage]))
    grown = {stage: large[stage]["RssAnon"] - small[stage]["RssAnon"] for stage in STAGES}
    assert all(large[stage]["RssAnon"] < MAY_GROW * small[stage]["RssAnon"] for stage in STAGES), grown
    assert max(grown.values()) < MAY_GROW_KIB, grown
