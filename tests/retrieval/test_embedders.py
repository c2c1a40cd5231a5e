"""Embedders: unit vectors that depend on one text alone, saved and loaded, and what they refuse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import issparse

from retro_jax.artefact import open_artefact
from retro_jax.config import BertConfig, RetrievalConfig
from retro_jax.retrieval import lsa
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import EMBEDDERS, Embedder, build_embedder, load_embedder
from tests.retrieval.conftest import build_corpus

CONFIG = RetrievalConfig(features=2**12, lsa_dim=20, block_chunks=50, workers=1)


@pytest.fixture(params=sorted(EMBEDDERS))
def embedder(request: pytest.FixtureRequest, corpus_dir: Path, bert_dir: Path, tmp_path: Path) -> Embedder:
    config = replace(CONFIG, embedder=request.param, bert=BertConfig(path=str(bert_dir)))
    build_embedder(config, ChunkTexts.of(corpus_dir), tmp_path / "embedder")
    return load_embedder(tmp_path / "embedder")


def dense(vectors: object) -> np.ndarray:
    return vectors.toarray() if issparse(vectors) else vectors


def test_vectors_have_unit_length_or_none(embedder: Embedder, corpus_dir: Path) -> None:
    texts = [*ChunkTexts.of(corpus_dir).read("test", np.arange(20)), "" if embedder.name == "bert" else "? !", " "]
    vectors = embedder.embed(texts)
    assert vectors.shape == (22, embedder.dim) and vectors.dtype == np.float32 and issparse(vectors) == embedder.sparse
    norms = np.linalg.norm(dense(vectors), axis=1)
    np.testing.assert_allclose(norms[:20], 1, atol=1e-6)  # measured 1.2e-7
    assert (norms[20:] == 0).all()


def test_a_vector_depends_on_its_text_alone(embedder: Embedder, corpus_dir: Path) -> None:
    texts = ChunkTexts.of(corpus_dir).read("train", np.arange(40))
    together = dense(embedder.embed(texts))
    for row in (0, 17, 39):
        np.testing.assert_array_equal(dense(embedder.embed([texts[row]]))[0], together[row])
    np.testing.assert_array_equal(dense(embedder.embed(texts[::-1]))[::-1], together)


def test_bigrams_tell_word_order_apart(embedder: Embedder, corpus_dir: Path) -> None:
    words = ChunkTexts.of(corpus_dir).read("train", np.arange(3))
    ordered = " ".join(words)
    shuffled = " ".join(ordered.split()[::-1])
    assert not np.array_equal(dense(embedder.embed([ordered])), dense(embedder.embed([shuffled])))


def test_lsa_holds_leading_directions_and_a_sketch_of_the_rest(corpus_dir: Path, tmp_path: Path) -> None:
    """The directions keep as much of the sample's energy as exact singular vectors, and inner products of the rest are kept on
    average over seeds."""
    texts = ChunkTexts.of(corpus_dir)
    build_embedder(CONFIG, texts, tmp_path / "tfidf")
    tfidf = load_embedder(tmp_path / "tfidf").embed(texts.read("train", np.arange(texts.table("train").num_chunks))).toarray()
    counted = np.count_nonzero(tfidf, axis=0) >= lsa.MIN_CHUNKS
    _, strengths, directions = np.linalg.svd(np.where(counted, tfidf, 0), full_matrices=False)
    exact = (strengths[:10] ** 2).sum() / (tfidf**2).sum()
    leading = np.where(counted, tfidf, 0) @ directions[:10].T
    rest = np.where(counted, tfidf, 0) - leading @ directions[:10]
    products = []
    for seed in range(15):
        artefact = build_embedder(replace(CONFIG, embedder="lsa", lsa_dim=40, seed=seed), texts, tmp_path / str(seed))
        assert artefact.summary["leading_directions"] == 10
        assert 0.99 * exact < artefact.summary["energy_of_leading"] <= exact * (1 + 1e-5)  # measured 0.9955
        found = artefact.array("directions")
        np.testing.assert_allclose(found.T @ found, np.eye(10), atol=1e-5)
        sketch = lsa._sketch_matrix(artefact.array("sketch"), 30)
        sketched_rest = (tfidf @ sketch) - (np.where(counted, tfidf, 0)[:, counted] @ found) @ artefact.array(
            "sketched_directions"
        )
        products.append(sketched_rest[:60] @ sketched_rest[60:120].T)
    error = np.mean(products, axis=0) - rest[:60] @ rest[60:120].T
    assert np.sqrt((error**2).mean()) < 1.3 * np.std(products, axis=0).mean() / np.sqrt(15)  # measured 1.07
    assert abs(error.mean()) < 1e-3  # measured 3.2e-4


def test_lsa_learns_from_a_sample_and_bounded_columns(corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsa, "MAX_COLUMNS", 64)
    config = replace(CONFIG, embedder="lsa", lsa_train_chunks=70)
    first = build_embedder(config, ChunkTexts.of(corpus_dir), tmp_path / "a")
    again = build_embedder(config, ChunkTexts.of(corpus_dir), tmp_path / "b")
    other = build_embedder(replace(config, seed=1), ChunkTexts.of(corpus_dir), tmp_path / "c")
    assert first.summary["sampled_chunks"] == 70 and first.summary["projected_columns"] == 64
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize("lsa_dim", [1, 3, 500])
def test_any_number_of_dimensions(lsa_dim: int, tmp_path: Path) -> None:
    """With fewer directions than asked for, the sketch takes their place."""
    data_dir = build_corpus(tmp_path / "data", count=5, chunk_len=16)
    artefact = build_embedder(replace(CONFIG, embedder="lsa", lsa_dim=lsa_dim), ChunkTexts.of(data_dir), tmp_path / "lsa")
    embedder = load_embedder(tmp_path / "lsa")
    assert embedder.dim == lsa_dim and artefact.summary["leading_directions"] < 100
    vectors = embedder.embed(ChunkTexts.of(data_dir).read("train", np.arange(20)))
    assert vectors.shape == (20, lsa_dim)
    assert np.isin(np.linalg.norm(vectors, axis=1).round(5), (0, 1)).all()


def test_fingerprints_cover_settings_and_corpus(corpus_dir: Path, tmp_path: Path) -> None:
    texts = ChunkTexts.of(corpus_dir)
    fingerprints = {
        build_embedder(c, texts, tmp_path / str(i)).fingerprint for i, c in enumerate((CONFIG, replace(CONFIG, max_ngram=1)))
    }
    assert len(fingerprints) == 2
    assert open_artefact(tmp_path / "0", "embedder").manifest["inputs"] == {
        "chunks": open_artefact(corpus_dir / "chunks", "chunks").fingerprint,
        "tokenizer": open_artefact(corpus_dir / "tokenizer", "tokenizer").fingerprint,
    }
