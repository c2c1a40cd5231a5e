"""Actors of a Ray cluster as workers: the bytes of the local executor, whatever is killed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from retro_jax.blocks import run_blocks
from retro_jax.config import ChunkConfig, ExecutorConfig, RetrievalConfig
from retro_jax.corpus.chunk_table import open_chunk_tables
from retro_jax.errors import BadInput, UserError
from retro_jax.retrieval.neighbours import build_neighbours
from tests.executor.computed import bad_input, calls, dies_once, numbers, poisonous, workers_killed
from tests.retrieval.conftest import build_corpus
from tests.retrieval.test_neighbours import contents

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BLOCKS = 6
CHUNKS = ChunkConfig(chunk_len=16, num_neighbours=2, retrieved_len=32)
LSA = RetrievalConfig(embedder="lsa", lsa_dim=24, index_factory="IVF4,Flat", saved=6, features=2**14, block_chunks=32, workers=2)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of this machine alone, with two CPUs."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    from ray.cluster_utils import Cluster

    before, on_sigterm = os.environ.get("PYTHONPATH"), signal.getsignal(signal.SIGTERM)
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # what the cluster's processes import
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    )
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    signal.signal(signal.SIGTERM, on_sigterm)  # the cluster took it
    yield cluster.address
    import ray

    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def executor(address: str) -> ExecutorConfig:
    return ExecutorConfig(kind="ray", address=address)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus") / "data")


def build(corpus: Path, data_dir: Path, config: RetrievalConfig) -> dict[str, bytes]:
    shutil.copytree(corpus, data_dir)
    build_neighbours(config, data_dir, open_chunk_tables(data_dir), CHUNKS)
    return contents(data_dir)


def run(folder: Path, compute: object, executor: ExecutorConfig) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    tasks = [(number, folder.parent) for number in range(BLOCKS)]
    assert run_blocks(folder, compute, tasks, workers=2, description="numbers", executor=executor) == BLOCKS  # type: ignore
    return {path.name: path.read_bytes() for path in (folder / "blocks").iterdir()}


def test_a_build_equals_the_local_one(
    corpus: Path, executor: ExecutorConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedder, vectors, index and neighbours, manifests too, from a relative path."""
    local = build(corpus, tmp_path / "local", replace(LSA, workers=1))
    monkeypatch.chdir(tmp_path)
    assert build(corpus, Path("ray"), replace(LSA, executor=executor)) == local
    assert len(local) > 15


@pytest.mark.slow
def test_a_build_with_a_killed_worker_equals_the_local_one(
    corpus: Path, executor: ExecutorConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL to the actors that compute, as soon as there are blocks of neighbours."""
    config = replace(LSA, embedder="tfidf", block_chunks=4)
    with workers_killed(tmp_path / "ray" / "neighbours.partial", "ray::_Actor", psutil.process_iter) as killed:
        found = build(corpus, tmp_path / "ray", replace(config, executor=executor))
    assert killed and "its Ray actor is gone" in capsys.readouterr().err
    assert found == build(corpus, tmp_path / "local", replace(config, workers=1))


def test_sigterm_is_left_as_it_was(executor: ExecutorConfig, tmp_path: Path) -> None:
    """Ray takes it for itself when a process joins a cluster; a training loop that follows would end with Ray's exit code."""
    import ray

    ray.shutdown()
    before = signal.getsignal(signal.SIGTERM)
    run(tmp_path / "a", numbers, executor)
    assert ray.is_initialized() and signal.getsignal(signal.SIGTERM) == before


def test_a_killed_actor_is_replaced(executor: ExecutorConfig, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole" / "a", numbers, ExecutorConfig())
    assert run(tmp_path / "killed" / "a", dies_once, executor) == whole
    assert [calls(tmp_path / "killed", number) for number in range(BLOCKS)] == [1, 1, 2, 1, 1, 1]


def test_what_fails_three_times_is_named(executor: ExecutorConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 blocks failed 3 times.*block 2 .*Ray actor is gone.*block 4 .*KeyError: 'four'"):
        run(tmp_path / "a", poisonous, executor)
    assert [calls(tmp_path, number) for number in range(BLOCKS)] == [1, 1, 3, 1, 3, 1]
    assert len(list((tmp_path / "a" / "blocks").glob("*.done"))) == 4


def test_bad_input_ends_the_run(executor: ExecutorConfig, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the input is bad; mend it"):
        run(tmp_path / "a", bad_input, executor)


def test_gpus_that_no_machine_has_are_told(executor: ExecutorConfig, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"ExecutorConfig.gpus=2, but no machine of the Ray cluster has more than 0 GPUs"):
        run_blocks(tmp_path / "a", numbers, [(0, tmp_path)], workers=1, description="", executor=executor, gpus=2)


@pytest.mark.parametrize("where", ["auto", "port"])
def test_a_cluster_that_does_not_answer_is_told(where: str, tmp_path: Path) -> None:
    """In a process of its own: this one may have joined a cluster."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{listener.getsockname()[1]}"
    given = free if where == "port" else "auto"
    program = (
        "from retro_jax.config import ExecutorConfig\nfrom retro_jax.executor.ray_actors import connected\n"
        f"from retro_jax.errors import UserError\ntry:\n    connected(ExecutorConfig(kind='ray', address={given!r}))\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | ({"RAY_ADDRESS": free} if where == "auto" else {})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.startswith(f"no Ray cluster answers at ExecutorConfig.address={given!r} ("), done.stderr
    assert done.stdout.endswith("or use kind='local'\n")


def test_ray_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs Ray, which is not installed; install retro-jax\[ray\], or use 'local'"):
        run(tmp_path / "a", numbers, ExecutorConfig(kind="ray"))
