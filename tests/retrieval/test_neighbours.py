"""From a corpus on disk to neighbour tables: the right neighbours, the same bytes however they were made, plain refusals."""

import pickle
import shutil
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from retro_jax.artefact import open_artefact
from retro_jax.config import SPLITS, ChunkConfig, Metric, RetrievalConfig, Split
from retro_jax.corpus.chunk_table import ChunkTable, open_chunk_tables
from retro_jax.corpus.tokenizer import load_tokenizer
from retro_jax.errors import UserError
from retro_jax.retrieval import search_stage, sparse_costs, sparse_index
from retro_jax.retrieval.metric import DISTANCES
from retro_jax.retrieval.neighbour_table import NeighbourTable
from retro_jax.retrieval.neighbours import build_neighbours
from retro_jax.retrieval.sparse_index import SparseIndex
from retro_jax.retrieval.vectors import open_vectors
from tests.retrieval.conftest import build_corpus

CHUNKS = ChunkConfig(chunk_len=16, num_neighbours=2, retrieved_len=32)
TFIDF = RetrievalConfig(saved=6, features=2**14, block_chunks=32, workers=1)
LSA = replace(TFIDF, embedder="lsa", lsa_dim=24)
STAGES = ("embedder", "vectors", "index", "neighbours")


@pytest.fixture
def data_dir(corpus_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(corpus_dir, tmp_path / "data")


def build(data_dir: Path, config: RetrievalConfig, chunks: ChunkConfig = CHUNKS) -> dict[Split, NeighbourTable]:
    return build_neighbours(config, data_dir, open_chunk_tables(data_dir), chunks)


def contents(data_dir: Path) -> dict[str, bytes]:
    """Every file of retrieval's artefacts, the manifests too."""
    paths = [path for stage in STAGES for path in sorted((data_dir / stage).rglob("*")) if path.is_file()]
    return {str(path.relative_to(data_dir)): path.read_bytes() for path in paths}


def test_tfidf_neighbours_equal_brute_force(data_dir: Path) -> None:
    """Against scikit-learn's own TF-IDF, dense, with every chunk compared to every other."""
    tables, tokenizer = open_chunk_tables(data_dir), load_tokenizer(data_dir / "tokenizer")
    texts = {split: table.texts(np.arange(table.num_chunks), tokenizer) for split, table in tables.items()}
    assert all(len(texts[split]) > 10 for split in SPLITS)
    count = HashingVectorizer(n_features=2**14, ngram_range=(1, 2), alternate_sign=False, norm=None)
    weigh = TfidfTransformer(sublinear_tf=True).fit(count.transform(texts["train"]))
    vectors = {split: weigh.transform(count.transform(texts[split])).toarray() for split in SPLITS}
    found = build(data_dir, TFIDF)
    for split in SPLITS:
        distances = 1 - vectors[split] @ vectors["train"].T
        distances[distances >= 1] = np.inf
        if split == "train":
            distances[tables["train"].document_N[:, None] == tables["train"].document_N] = np.inf
        expected = np.sort(distances, axis=1)[:, :6]
        ids, got = np.array(found[split].ids_NS), np.array(found[split].distances_NS)
        np.testing.assert_allclose(got, expected, atol=1e-6)  # measured 3e-7
        assert (np.isinf(got) == (ids < 0)).all()
        there = ids >= 0
        np.testing.assert_allclose(got[there], np.take_along_axis(distances, np.maximum(ids, 0), 1)[there], atol=1e-6)
        same = got[:, 1:] == got[:, :-1]
        assert (ids[:, 1:] > ids[:, :-1])[same & there[:, 1:]].all() and same[there[:, 1:]].any()


def test_lsa_neighbours_equal_brute_force(data_dir: Path) -> None:
    tables, found = open_chunk_tables(data_dir), build(data_dir, LSA)
    vectors = open_artefact(data_dir / "vectors", "vectors")
    train = vectors.array("train.vectors")
    assert train.shape == (tables["train"].num_chunks, 24)
    for split in SPLITS:
        queries = vectors.array(f"{split}.vectors")
        distances = 1 - queries @ train.T
        distances[~queries.any(axis=1)] = np.inf
        if split == "train":
            distances[tables["train"].document_N[:, None] == tables["train"].document_N] = np.inf
        np.testing.assert_allclose(found[split].distances_NS, np.sort(distances, axis=1)[:, :6], atol=1e-6)  # measured 2.4e-7
    summary = open_artefact(data_dir / "neighbours", "neighbours").summary
    assert summary["factory"] == "Flat" and summary["search"] == "exact" and "131072" in summary["why"]


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_exact_search_finds_what_faiss_finds(
    metric: Metric, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """On the tests' eight devices, in one process however many workers there are."""
    first, second = (shutil.copytree(corpus_dir, tmp_path / name) for name in ("a", "b"))
    config = replace(LSA, metric=metric, index_factory="exact", workers=3)
    exact, flat = build(first, config), build(second, replace(config, index_factory="Flat", workers=1))
    assert "neighbours are searched exactly on 8 x cpu, at most 256 MiB of each" in capsys.readouterr().err
    for split in SPLITS:
        np.testing.assert_array_equal(exact[split].distances_NS, flat[split].distances_NS)
        np.testing.assert_array_equal(exact[split].ids_NS, flat[split].ids_NS)
    summary = open_artefact(first / "neighbours", "neighbours").summary
    assert summary["factory"] == "exact" and summary["distance"] == DISTANCES[metric]
    assert sorted(path.name for path in (first / "index").iterdir()) == ["manifest.json"]


@pytest.mark.parametrize("config", [TFIDF, replace(LSA, metric="inner_product")], ids=["tfidf", "lsa"])
def test_facts_of_the_sample(config: RetrievalConfig, data_dir: Path) -> None:
    """Of all chunks, as there are few: duplicates by comparing every two vectors, runs of tokens by looking for every one."""
    found, tables = build(data_dir, config), open_chunk_tables(data_dir)
    facts = open_artefact(data_dir / "neighbours", "neighbours").summary["sample"]
    vectors = {split: open_vectors(open_artefact(data_dir / "vectors", "vectors"), split) for split in SPLITS}
    train = vectors["train"].rows(0, len(vectors["train"]))
    for split in SPLITS:
        queries, ids = vectors[split].rows(0, len(vectors[split])), np.array(found[split].ids_NS)
        products = np.asarray((queries @ train.T).todense()) if config.embedder == "tfidf" else queries @ train.T
        copies = np.take_along_axis(products, np.maximum(ids, 0), 1) > 1 - 1e-5
        assert facts[split]["chunks"] == len(ids) and facts[split]["duplicates"] == round(
            (copies & (ids >= 0)).any(axis=1).mean(), 4
        )
        shares = []
        for chunk, near in enumerate(ids[:, :2]):
            tokens, length = tables[split].gather(np.array([chunk]), 32)
            halves = [tokens[0, :16][: length[0]].tolist(), tokens[0, 16 : length[0]].tolist()]
            shares.append(
                max((_run(half, _tokens(tables["train"], other)) for half in halves for other in near if other >= 0), default=0)
            )
        for share, above in facts[split]["overlap_above"].items():
            assert above == round(np.mean(np.array(shares) > float(share) * 16), 4)
    assert 0 < facts["train"]["duplicates"] < 1 and 0 < facts["train"]["overlap_above"]["0.5"] < 1


def _tokens(table: ChunkTable, chunk: int) -> list[int]:
    tokens, length = table.gather(np.array([chunk]), 32)
    return tokens[0, : length[0]].tolist()


def _run(first: list[int], second: list[int]) -> int:
    """The longest run of tokens that stands in both."""
    match = SequenceMatcher(None, first, second, autojunk=False).find_longest_match()
    return match.size


def test_lsa_finds_what_tfidf_finds(corpus_dir: Path, tmp_path: Path) -> None:
    """The projection keeps most of the neighbours: a third of the best six at least, where chance gives 3%."""
    first, second = (shutil.copytree(corpus_dir, tmp_path / name) for name in ("a", "b"))
    sparse, dense = build(first, TFIDF)["test"].ids_NS, build(second, replace(LSA, lsa_dim=100))["test"].ids_NS
    shared = np.mean([len(np.intersect1d(a[a >= 0], b)) / 6 for a, b in zip(sparse, dense, strict=True)])
    assert shared > 0.33


@pytest.mark.parametrize("config", [TFIDF, replace(LSA, index_factory="IVF4,Flat")], ids=["tfidf", "lsa"])
def test_workers_do_not_change_a_byte(config: RetrievalConfig, corpus_dir: Path, tmp_path: Path) -> None:
    one, two = (shutil.copytree(corpus_dir, tmp_path / name) for name in ("one", "two"))
    build(one, config)
    build(two, replace(config, workers=2))
    assert contents(one) == contents(two)


def test_block_size_does_not_change_a_byte(corpus_dir: Path, tmp_path: Path) -> None:
    one, two = (shutil.copytree(corpus_dir, tmp_path / name) for name in ("one", "two"))
    build(one, TFIDF)
    build(two, replace(TFIDF, block_chunks=1000))
    assert contents(one) == contents(two)


def test_what_stands_there_is_opened_not_built(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(data_dir, TFIDF)
    before = contents(data_dir)
    monkeypatch.setattr(search_stage, "nearest_outside", None)
    found = build(data_dir, replace(TFIDF, workers=2, block_chunks=8), replace(CHUNKS, num_neighbours=5, retrieved_len=64))
    assert contents(data_dir) == before
    again = pickle.loads(pickle.dumps(found["valid"]))
    np.testing.assert_array_equal(again.ids_NS, found["valid"].ids_NS)


def test_a_corpus_smaller_than_saved(tmp_path: Path) -> None:
    """Fewer chunks than are saved are no mistake; fewer than are read are one."""
    data_dir = build_corpus(tmp_path / "data", count=1, chunk_len=64)
    chunks = ChunkConfig(chunk_len=64, num_neighbours=2, retrieved_len=64)
    database = open_chunk_tables(data_dir)["train"].num_chunks
    found = build(data_dir, replace(TFIDF, saved=50), chunks)["train"]
    assert found.ids_NS.shape == (database, 50) and (found.ids_NS[:, database:] == -1).all()
    with pytest.raises(UserError, match=f"{database} chunks, fewer than ChunkConfig.num_neighbours=40"):
        build(data_dir, replace(TFIDF, saved=50), replace(chunks, num_neighbours=40))


def test_neighbours_of_another_corpus_are_refused(data_dir: Path, tmp_path: Path) -> None:
    build(data_dir, TFIDF)
    other = build_corpus(tmp_path / "other", seed=1)
    for stage in STAGES:
        shutil.copytree(data_dir / stage, other / stage)
    with pytest.raises(UserError, match="embedder was built with input chunks="):
        build(other, TFIDF)


def test_other_settings_are_refused(data_dir: Path) -> None:
    build(data_dir, TFIDF)
    with pytest.raises(UserError, match="saved=6, now saved=7"):
        build(data_dir, replace(TFIDF, saved=7))
    with pytest.raises(UserError, match="embedder='tfidf', now embedder='lsa'"):
        build(data_dir, LSA)


@pytest.mark.parametrize("name", ["neighbours/test.ids.npy", "vectors/train.data.npy", "index/0.chunks.npy", "embedder/idf.npy"])
def test_a_truncated_file_is_told(name: str, data_dir: Path) -> None:
    build(data_dir, TFIDF)
    path = data_dir / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{path.name} has .* bytes instead of"):
        build(data_dir, TFIDF)


@pytest.mark.parametrize("workers", [1, 2])
def test_neighbours_do_not_depend_on_the_shards_of_a_sparse_index(
    workers: int, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copytree(data_dir, tmp_path / "whole")
    build(whole, TFIDF)
    monkeypatch.setattr(sparse_index, "SHARD_ENTRIES", 500)
    build(data_dir, replace(TFIDF, workers=workers))
    summaries = [open_artefact(folder / "index", "index").summary for folder in (whole, data_dir)]
    assert len(summaries[0]["shards"]) == 1 and len(summaries[1]["shards"]) > 5
    assert summaries[0]["chunks"] == summaries[1]["chunks"] == sum(summaries[1]["shards"])
    for split in SPLITS:
        for name in ("ids", "distances"):
            files = [(folder / "neighbours" / f"{split}.{name}.npy").read_bytes() for folder in (whole, data_dir)]
            assert files[0] == files[1], (split, name)


def test_a_sparse_index_without_shards_is_searched(data_dir: Path) -> None:
    """As 0.1.0 wrote it."""
    build(data_dir, TFIDF)
    index, vectors = (open_artefact(data_dir / name, name) for name in ("index", "vectors"))
    queries = open_vectors(vectors, "train").rows(0, 20)
    expected = SparseIndex.open(index).search(queries, 5)
    for name in sparse_index.ARRAYS:
        (index.path / f"0.{name}.npy").rename(index.path / f"{name}.npy")
    del index.manifest["summary"]["shards"]
    for old, new in zip(SparseIndex.open(index).search(queries, 5), expected, strict=True):
        np.testing.assert_array_equal(old, new)


def test_too_little_memory_is_told_before_anything_is_built(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_costs, "memory_of_machine", lambda: 2**20)
    with pytest.raises(UserError, match=r"needs about 48 MiB .* but this machine has 1 MiB; use .*'lsa'"):
        build(data_dir, TFIDF)
    assert not any((data_dir / f"{stage}{suffix}").exists() for stage in STAGES for suffix in ("", ".partial"))
    build(data_dir, LSA)


def test_a_bad_index_is_told_before_anything_is_built(data_dir: Path) -> None:
    with pytest.raises(UserError, match="index_factory='IVF' is no index"):
        build(data_dir, replace(LSA, index_factory="IVF"))
    assert not any((data_dir / f"{stage}{suffix}").exists() for stage in STAGES for suffix in ("", ".partial"))


def test_the_memory_told_is_said(data_dir: Path, capsys: pytest.CaptureFixture) -> None:
    build(data_dir, TFIDF)
    database = open_chunk_tables(data_dir)["train"].num_chunks
    assert f"the exact index of {database} chunks takes about 0 MiB on disk, 48 MiB of memory" in capsys.readouterr().err
    for stage in STAGES:
        shutil.rmtree(data_dir / stage)
    build(data_dir, LSA)
    assert f"index of {database} chunks x 24: Flat ({database} chunks, not above 131072: " in capsys.readouterr().err


def test_held_out_text_does_not_change_the_weights(corpus_dir: Path, data_dir: Path) -> None:
    """IDF counts are those of the training chunks alone."""
    build(data_dir, TFIDF)
    tables, tokenizer = open_chunk_tables(data_dir), load_tokenizer(data_dir / "tokenizer")
    texts = tables["train"].texts(np.arange(tables["train"].num_chunks), tokenizer)
    counts = HashingVectorizer(n_features=2**14, ngram_range=(1, 2), alternate_sign=False, norm=None).transform(texts)
    idf = np.log((1 + len(texts)) / (1 + np.bincount(counts.indices, minlength=2**14))) + 1
    np.testing.assert_allclose(np.load(data_dir / "embedder" / "idf.npy"), idf, rtol=1e-6)


def test_counts_of_the_manifest(data_dir: Path) -> None:
    found = build(data_dir, TFIDF)
    summary = open_artefact(data_dir / "neighbours", "neighbours").summary
    for split in SPLITS:
        ids = found[split].ids_NS
        assert summary["splits"][split] == {
            "chunks": len(ids),
            "short": int((ids < 0).any(axis=1).sum()),
            "without": int((ids < 0).all(axis=1).sum()),
        }
    assert summary["distance"] == "1 - cosine" and summary["search"] == "exact"
    assert summary["splits"]["train"]["without"] > 0  # the texts without a word
