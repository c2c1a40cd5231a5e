"""Which index is searched where faiss finds GPUs: the choice alone, as no GPU is needed for it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from retro_jax.retrieval.dense_index import DenseIndex
from retro_jax.retrieval.faiss_gpus import MOST_FOUND, cluster_on_gpus, copy_to_gpus
from retro_jax.retrieval.vectors import DenseVectors


def fake_faiss(gpus: int, refuses: bool = False) -> Any:
    """faiss with so many GPUs; a copy there is a clone that counts its searches."""

    def to_gpus(index: Any) -> Any:
        if refuses:
            raise RuntimeError("Error: no such index on GPU")
        clone, searches = faiss.clone_index(index), []
        return SimpleNamespace(
            search=lambda queries, width: searches.append(width) or clone.search(queries, width), searches=searches, clone=clone
        )

    class Parameters:
        def set_index_parameters(self, copy: Any, parameters: str) -> None:
            faiss.ParameterSpace().set_index_parameters(copy.clone, parameters)

    return SimpleNamespace(
        get_num_gpus=lambda: gpus,
        index_cpu_to_all_gpus=to_gpus,
        GpuParameterSpace=Parameters,
        try_extract_index_ivf=faiss.try_extract_index_ivf,
        IndexFlatL2=faiss.IndexFlatL2,
    )


@pytest.fixture
def inverted(tmp_path: Path) -> DenseIndex:
    vectors = np.random.default_rng(0).standard_normal((3000, 8), np.float32)
    np.save(tmp_path / "v.npy", vectors)
    index = faiss.index_factory(8, "IVF4,Flat", faiss.METRIC_L2)
    index.train(vectors)
    index.add(vectors)
    return DenseIndex(index, DenseVectors(tmp_path / "v.npy"), "l2", 1.0, "nprobe=4")


def test_faiss_without_gpus_searches_as_ever(inverted: DenseIndex) -> None:
    assert faiss.get_num_gpus() == 0 and copy_to_gpus(faiss, inverted.index, "nprobe=4") is None
    assert cluster_on_gpus(faiss, inverted.index) is None


def test_gpus_search_what_they_can(inverted: DenseIndex) -> None:
    copy = copy_to_gpus(fake_faiss(2), inverted.index, "nprobe=4")
    assert copy.clone.nprobe == 4
    index = replace(inverted, on_gpus=copy)
    queries = np.array(inverted.vectors.vectors_ND[:5])
    np.testing.assert_array_equal(index.search(queries, 10)[0], inverted.search(queries, 10)[0])
    assert copy.searches == [10]
    assert (index.search(queries, MOST_FOUND + 1)[0] >= 0).all() and copy.searches == [10]


def test_what_gpus_do_not_take_is_said(inverted: DenseIndex, capsys: pytest.CaptureFixture) -> None:
    assert copy_to_gpus(fake_faiss(1, refuses=True), inverted.index, "nprobe=4") is None
    assert "searched on the CPU, not on 1 GPUs: Error: no such index on GPU" in capsys.readouterr().err
