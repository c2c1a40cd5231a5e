"""Where neighbours come from, over random corpora in which every document's text tells its number.

Hypothesis draws the corpora; what is found in the end, as text and as bytes, is compared with nothing but the documents.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from retro_jax.config import SPLITS, ChunkConfig, Config, CorpusConfig, ModelConfig, RetrievalConfig, TokenizerConfig
from retro_jax.corpus.split import split_of_text
from retro_jax.corpus.token_store import TokenStore
from retro_jax.data.reader import open_reader
from retro_jax.prepare import prepare

WORDS = ["".join(random.Random(seed).choices("abcdefgh", k=4)) for seed in range(40)]
# A corpus that fails is not made smaller: each try builds all stages.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
MARK = re.compile(r"<(\d+)>")
# What training documents alone may decide, in every artefact that lies behind the neighbours.
TRAIN_FILES = (
    "tokenizer/tokenizer.json",
    "tokens/*-train.*",
    "chunks/train.*",
    "ngrams/*.npy",
    "embedder/*.npy",
    "vectors/train.*",
    "index/*.*",
    "neighbours/train.*",
)


def document(number: int, length: int) -> str:
    """A text of common words with the document's number after every other one, and whole sentences that others have too."""
    drawn = random.Random(number)
    words = [" ".join(drawn.choices(WORDS, k=2)) if drawn.random() < 0.7 else " ".join(WORDS[:4]) for _ in range(length)]
    return " ".join(f"{word} <{number}>" for word in words)


def config_of(source: Path, chunks: ChunkConfig, retrieval: RetrievalConfig) -> Config:
    return Config(
        corpus=CorpusConfig(sources=(str(source),), valid_fraction=0.2, test_fraction=0.2, workers=1),
        tokenizer=TokenizerConfig(vocab_size=330),
        chunks=chunks,
        retrieval=retrieval,
        model=ModelConfig(retro=None),
    )


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def marks(text: str) -> set[int]:
    """The documents whose numbers stand in a text; those that its ends cut are left out."""
    return {int(number) for number in MARK.findall(text)}


@settings(max_examples=8, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.too_slow])
@given(
    first=st.integers(0, 900),
    lengths=st.lists(st.integers(1, 25), min_size=25, max_size=40).filter(lambda lengths: sum(lengths) > 100),
    shape=st.tuples(st.sampled_from([8, 16]), st.integers(1, 3), st.integers(1, 4)),
    dense=st.booleans(),
)
def test_a_neighbour_is_one_training_document_and_never_the_querys(
    first: int, lengths: list[int], shape: tuple[int, int, int], dense: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, (C, continuation, k) = tmp_path_factory.mktemp("any"), shape
    texts = {first + i: document(first + i, length) for i, length in enumerate(lengths)}
    chunks = ChunkConfig(chunk_len=C, num_neighbours=k, retrieved_len=continuation * C)
    kind = {"embedder": "lsa", "lsa_dim": 8} if dense else {"embedder": "tfidf"}
    config = config_of(
        write(folder / "a.jsonl", list(texts.values())), chunks, RetrievalConfig(features=2**10, saved=10, workers=1, **kind)
    )
    prepared = prepare(config, folder / "data", report=lambda line: None)
    splits = {number: split_of_text(text, "", config.corpus) for number, text in texts.items()}
    stores = {split: TokenStore(folder / "data" / "tokens" / f"0-{split}") for split in SPLITS}
    documents = {split: [number for number in texts if splits[number] == split] for split in SPLITS}
    training = [stores["train"].tokens[s : s + n - 1].tolist() for s, n in zip(*whole(stores["train"]), strict=True)]
    seen = 0
    for split in SPLITS:
        table = prepared.tables[split]
        ids = np.arange(table.num_chunks)[None]
        batch = open_reader(config, prepared, split, neighbours=True).read(ids)
        for chunk, neighbours_KR, mask_KR in zip(ids[0], batch.neighbours[0], batch.neighbour_mask[0], strict=True):
            own = documents[split][int(table.document_N[chunk])]
            for tokens, mask in zip(neighbours_KR, mask_KR, strict=True):
                found = tokens[mask].tolist()
                named = marks(prepared.tokenizer.decode_batch([np.asarray(found)])[0])
                assert len(named) <= 1, "a continuation crosses into another document"
                for number in named:
                    assert number != own and splits[number] == "train"
                    seen += 1
                    text = training[documents["train"].index(number)]
                    starts = [at for at in range(0, len(text), C) if text[at : at + continuation * C] == found]
                    assert starts, "a neighbour is a chunk of the grid with all of its continuation in the document"
    assert seen > 10


def whole(store: TokenStore) -> tuple[list[int], list[int]]:
    """First token and length of each document."""
    return store.starts(0, store.num_documents).tolist(), store.lengths(0, store.num_documents).tolist()


@settings(max_examples=5, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.too_slow])
@given(first=st.integers(0, 900), order=st.randoms(use_true_random=False), dense=st.booleans())
def test_no_byte_of_training_depends_on_a_held_out_document(
    first: int, order: random.Random, dense: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same training documents among other held-out ones: tokenizer, database, IDF weights, projection, the index with what it
    was trained on, and every training chunk's neighbours are the same to the byte."""
    folder, chunks = tmp_path_factory.mktemp("any"), ChunkConfig(chunk_len=8, retrieved_len=16)
    kind = {"embedder": "lsa", "lsa_dim": 8, "index_factory": "IVF4,Flat", "index_train_chunks": 90, "lsa_train_chunks": 90}
    retrieval = RetrievalConfig(features=2**10, saved=10, workers=1, **kind if dense else {})
    texts = [document(number, 1 + number % 23) for number in range(first, first + 80)]
    corpus = config_of(folder, chunks, retrieval).corpus
    training = [text for text in texts if split_of_text(text, "", corpus) == "train"]
    held_out = [text for text in texts if split_of_text(text, "", corpus) != "train"]
    found = []
    for name, among in (("a", held_out[::2]), ("b", held_out[1::2])):
        source = write(folder / f"{name}.jsonl", mixed(training, among, order))
        prepare(config_of(source, chunks, retrieval), folder / name, report=lambda line: None)
        found.append(bytes_of_training(folder / name))
    assert {name.split("/")[0] for name in found[0]} == {pattern.split("/")[0] for pattern in TRAIN_FILES}
    assert found[0].keys() == found[1].keys() and [name for name in found[0] if found[0][name] != found[1][name]] == []
    tests = [(folder / name / "tokens" / "0-test.bin").read_bytes() for name in "ab"]
    assert tests[0] != tests[1], "the held-out documents differ"


def mixed(training: list[str], held_out: list[str], order: random.Random) -> list[str]:
    """Both in their order, one among the other."""
    turns, rest = [True] * len(held_out) + [False] * len(training), {True: iter(held_out), False: iter(training)}
    order.shuffle(turns)
    return [next(rest[turn]) for turn in turns]


def bytes_of_training(data: Path) -> dict[str, bytes]:
    paths = [path for pattern in TRAIN_FILES for path in sorted(data.glob(pattern)) if path.name != "manifest.json"]
    return {str(path.relative_to(data)): path.read_bytes() for path in paths}
