"""Chunks that are found with what stands around them, and what searches alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from retro_jax.artefact import open_artefact
from retro_jax.config import SPLITS, ChunkConfig, Config, Context, CorpusConfig, ModelConfig, RetrievalConfig, TokenizerConfig
from retro_jax.corpus.chunk_table import open_chunk_tables
from retro_jax.errors import UserError
from retro_jax.prepare import built_stages, prepare, remove_stage
from retro_jax.retrieval.chunk_texts import ChunkTexts

WORDS = [f"{a}{b}{c}" for a in "abcd" for b in "aeiou" for c in "klmnst"]
CHUNKS = ChunkConfig(chunk_len=16, num_neighbours=2, retrieved_len=32)


@pytest.fixture(scope="module")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Documents of one to six chunks with titles of words of their own."""
    folder = tmp_path_factory.mktemp("titled")
    rng = np.random.default_rng(0)
    lines = [
        {"id": f"d{i}", "title": f"Title{i} {rng.choice(WORDS)}", "text": " ".join(rng.choice(WORDS, rng.integers(3, 60)))}
        for i in range(50)
    ]
    lines[4]["title"] = ""
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config(
        corpus=CorpusConfig(sources=(str(folder / "corpus.jsonl"),), valid_fraction=0.15, test_fraction=0.15, workers=1),
        tokenizer=TokenizerConfig(vocab_size=400),
        chunks=CHUNKS,
        model=ModelConfig(retro=None),
        retrieval=RetrievalConfig(saved=10, features=2**12, context="title_and_before", block_chunks=16, workers=1),
    )
    prepare(config, folder / "data", lambda line: None)
    return config, folder / "data"


@pytest.mark.parametrize("context", ["none", "title", "before", "title_and_before"])
def test_what_stands_before_a_chunk(context: Context, prepared_dir: tuple[Config, Path]) -> None:
    _, data_dir = prepared_dir
    texts, titled = ChunkTexts.of(data_dir, context), {}
    for line in (data_dir.parent / "corpus.jsonl").read_text().splitlines():
        titled[json.loads(line)["text"]] = json.loads(line)["title"]
    for split in SPLITS:
        table = texts.table(split)
        alone = texts.read(split, np.arange(table.num_chunks))
        shuffled = np.random.default_rng(1).permutation(table.num_chunks)
        found = dict(zip(shuffled.tolist(), texts.read_found(split, shuffled), strict=True))
        for document in range(table.num_documents):
            chunks = np.flatnonzero(table.document_N == document)
            title = titled["".join(alone[chunk] for chunk in chunks)]
            for place, chunk in enumerate(chunks):
                before = alone[chunk - 1] if place and "before" in context else ""
                start = f"{title}\n" if title and "title" in context else ""
                assert found[chunk] == start + before + alone[chunk]


def test_neighbours_are_those_of_chunks_alone_among_chunks_in_context(prepared_dir: tuple[Config, Path]) -> None:
    """Against scikit-learn's TF-IDF by brute force, weights fitted on what is found."""
    _, data_dir = prepared_dir
    assert built_stages(data_dir)["queries"] == "built"
    texts, tables = ChunkTexts.of(data_dir, "title_and_before"), open_chunk_tables(data_dir)
    database = texts.read_found("train", np.arange(tables["train"].num_chunks))
    count = HashingVectorizer(n_features=2**12, ngram_range=(1, 2), alternate_sign=False, norm=None)
    weigh = TfidfTransformer(sublinear_tf=True).fit(count.transform(database))
    database_ND = weigh.transform(count.transform(database)).toarray()
    neighbours = open_artefact(data_dir / "neighbours", "neighbours")
    for split in SPLITS:
        queries = texts.read(split, np.arange(tables[split].num_chunks))
        distances = 1 - weigh.transform(count.transform(queries)).toarray() @ database_ND.T
        distances[distances >= 1] = np.inf
        if split == "train":
            distances[tables["train"].document_N[:, None] == tables["train"].document_N] = np.inf
        np.testing.assert_allclose(neighbours.array(f"{split}.distances"), np.sort(distances, axis=1)[:, :10], atol=1e-6)
    assert not (data_dir / "vectors" / "test.data.npy").exists()  # held-out chunks are never found


def test_another_context_is_refused_and_rebuilt(prepared_dir: tuple[Config, Path], tmp_path: Path) -> None:
    config, data_dir = prepared_dir
    data_dir = shutil.copytree(data_dir, tmp_path / "data")
    plain = replace(config, retrieval=replace(config.retrieval, context="none"))
    with pytest.raises(UserError, match="embedder was built with input context='title_and_before', now context=None"):
        prepare(plain, data_dir, lambda line: None)
    assert remove_stage(data_dir, "queries") == ["queries", "neighbours"]
    with pytest.raises(UserError, match="has no queries, and several processes"):
        prepare(config, data_dir, lambda line: None, build=False)
    assert remove_stage(data_dir, "embedder") == ["embedder", "vectors", "index"]
    prepare(plain, data_dir, lambda line: None)
    assert "queries" not in built_stages(data_dir)
    prepare(plain, data_dir, lambda line: None, build=False)
