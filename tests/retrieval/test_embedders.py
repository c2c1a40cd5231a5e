"""Embedders: unit vectors that depend on one text alone, saved and loaded, and what they refuse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import issparse

from retro_jax.artefact import open_artefact
from retro_jax.config import RetrievalConfig
from retro_jax.errors import UserError
from retro_jax.retrieval import lsa
from retro_jax.retrieval.chunk_texts import ChunkTexts
from retro_jax.retrieval.embedder import EMBEDDERS, Embedder, build_embedder, load_embedder
from tests.retrieval.conftest import build_corpus

CONFIG = RetrievalConfig(features=2**12, lsa_dim=20, block_chunks=50, workers=1)


@pytest.fixture(params=sorted(EMBEDDERS))
def embedder(request: pytest.FixtureRequest, corpus_dir: Path, tmp_path: Path) -> Embedder:
    build_embedder(replace(CONFIG, embedder=request.param), ChunkTexts.of(corpus_dir), tmp_path / "embedder")
    return load_embedder(tmp_path / "embedder")


def dense(vectors: object) -> np.ndarray:
    return vectors.toarray() if issparse(vectors) else vectors


def test_vectors_have_unit_length_or_none(embedder: Embedder, corpus_dir: Path) -> None:
    texts = [*ChunkTexts.of(corpus_dir).read("test", np.arange(20)), "? !", ""]
    vectors = embedder.embed(texts)
    assert vectors.shape == (22, embedder.dim) and vectors.dtype == np.float32 and issparse(vectors) == embedder.sparse
    norms = np.linalg.norm(dense(vectors), axis=1)
    np.testing.assert_allclose(norms[:20], 1, atol=1e-6)
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


def test_lsa_spans_the_leading_directions(corpus_dir: Path, tmp_path: Path) -> None:
    """The projection keeps as much of the sample's energy as the exact singular vectors do, and its columns are orthonormal."""
    texts = ChunkTexts.of(corpus_dir)
    artefact = build_embedder(replace(CONFIG, embedder="lsa"), texts, tmp_path / "lsa")
    build_embedder(CONFIG, texts, tmp_path / "tfidf")
    tfidf = load_embedder(tmp_path / "tfidf").embed(texts.read("train", np.arange(texts.table("train").num_chunks))).toarray()
    kept = np.bincount(np.nonzero(tfidf)[1], minlength=2**12) >= 2
    strengths = np.linalg.svd(tfidf[:, kept], compute_uv=False)
    exact = (strengths[:20] ** 2).sum() / (tfidf**2).sum()
    assert 0.97 * exact < artefact.summary["energy_kept"] <= exact * (1 + 1e-5)  # measured 0.9998
    projection = artefact.array("projection")
    assert projection.shape == (kept.sum(), 20)
    np.testing.assert_allclose(projection.T @ projection, np.eye(20), atol=1e-5)


def test_lsa_learns_from_a_sample_and_bounded_columns(corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsa, "MAX_COLUMNS", 64)
    config = replace(CONFIG, embedder="lsa", lsa_train_chunks=70)
    first = build_embedder(config, ChunkTexts.of(corpus_dir), tmp_path / "a")
    again = build_embedder(config, ChunkTexts.of(corpus_dir), tmp_path / "b")
    other = build_embedder(replace(config, seed=1), ChunkTexts.of(corpus_dir), tmp_path / "c")
    assert first.summary["sampled_chunks"] == 70 and first.summary["projected_columns"] == 64
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_fewer_directions_than_asked_for(tmp_path: Path) -> None:
    data_dir = build_corpus(tmp_path / "data", count=1, chunk_len=64)
    artefact = build_embedder(replace(CONFIG, embedder="lsa", lsa_dim=500), ChunkTexts.of(data_dir), tmp_path / "lsa")
    assert artefact.summary["dim"] == load_embedder(tmp_path / "lsa").dim < 100


def test_lsa_without_a_repeated_word_is_refused(corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsa, "MIN_CHUNKS", 10**6)
    with pytest.raises(UserError, match="finds no word that occurs in two of the .* training chunks"):
        build_embedder(replace(CONFIG, embedder="lsa"), ChunkTexts.of(corpus_dir), tmp_path / "lsa")
    assert not (tmp_path / "lsa.partial").exists()


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
