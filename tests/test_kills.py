"""The commands as a user runs them, killed with SIGKILL at random moments and run again: the bytes of a run that was let be."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from retro_jax.artefact import MANIFEST
from retro_jax.prepare import STAGES, built_stages
from retro_jax.training.checkpoint import Checkpoints

REPOSITORY = Path(__file__).resolve().parent.parent
CORPUS_STAGES = STAGES[: STAGES.index("embedder")]
RETRIEVAL_STAGES = STAGES[STAGES.index("embedder") :]
POOLED = ("tokens", "embedder", "vectors", "index", "neighbours")
KILLS = [1, pytest.param(20, marks=pytest.mark.slow)]
STEPS = 30
# Of metrics: one every 2 steps, and of validation every 3 and wherever a checkpoint is saved, every 5.
LINES = STEPS // 2 + STEPS // 3 + STEPS // 5 - STEPS // 15
SETTINGS = """
CorpusConfig.sources = ('{corpus}',)
CorpusConfig.valid_fraction = 0.1
CorpusConfig.test_fraction = 0.1
CorpusConfig.block_documents = 16
TokenizerConfig.vocab_size = 384
ChunkConfig.chunk_len = 8
ChunkConfig.retrieved_len = 16
RetrievalConfig.features = 4096
RetrievalConfig.block_chunks = 64
RetrievalConfig.lsa_dim = 32
RetrievalConfig.lsa_train_chunks = 1000
RetrievalConfig.index_factory = 'IVF16,Flat'
RetrievalConfig.saved = 10
DataConfig.seq_len = 32
DataConfig.batch_size = 4
ModelConfig.width = 16
ModelConfig.num_layers = 1
ModelConfig.num_heads = 2
ModelConfig.dropout = 0.1
RetroConfig.cca_layers = (1,)
RetroConfig.neighbour_dropout = 0.2
EncoderConfig.num_layers = 1
TrainConfig.steps = {steps}
TrainConfig.checkpoint_every = 5
TrainConfig.valid_every = 3
TrainConfig.valid_batches = 1
TrainConfig.log_every = 2
EvalConfig.window = 32
EvalConfig.stride = 16
EvalConfig.max_documents = 8
EvalConfig.bootstrap_samples = 20
"""


@dataclass(frozen=True)
class Whole:
    """A run that was not killed: its config, its data, and how many moments (of :mod:`tests.moments`) each stage had."""

    config: Path
    data: Path
    moments: dict[str, int]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of random words."""
    folder, rng = tmp_path_factory.mktemp("kills"), random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
    texts = [" ".join(rng.choices(words, k=rng.randint(10, 60))) for _ in range(300)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "small.gin").write_text(SETTINGS.format(corpus=folder / "corpus.jsonl", steps=STEPS))
    return folder / "small.gin"


@pytest.fixture(scope="module")
def whole(config: Path) -> dict[str, Whole]:
    """The unkilled runs, by embedder; both read the same corpus stages."""
    runs = {}
    for embedder in ("tfidf", "lsa"):
        data, counted = config.parent / f"whole-{embedder}" / "data", config.parent / f"{embedder}.json"
        for stage in CORPUS_STAGES if runs else ():
            shutil.copytree(runs["tfidf"].data / stage, data / stage)
        assert end(start_prepare(config, data, embedder, ("count", str(counted)))) == 0
        found = json.loads(counted.read_text())
        runs[embedder] = Whole(config, data, {stage: found.get(f"{data / stage}.partial", 0) for stage in STAGES})
    return runs


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments, "--config", str(config)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def start_prepare(
    config: Path, data: Path, embedder: str, moments: Sequence[str] = (), workers: int = 1
) -> subprocess.Popen[str]:
    """The command, where ``moments`` are given in :mod:`tests.moments`, whose arguments they are."""
    settings = {"CorpusConfig.workers": workers, "RetrievalConfig.workers": workers, "RetrievalConfig.embedder": embedder}
    words = [f"--set={name}={value}" for name, value in settings.items()]
    module = ("tests.moments", *moments) if moments else ("retro_jax",)
    return start(config, "-m", *module, "prepare", "--workdir", str(data.parent), *words)


def end(process: subprocess.Popen[str]) -> int:
    output = process.communicate()[0]
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    """Until the process has stopped itself; see :mod:`tests.moments`."""
    deadline = time.monotonic() + 300
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the command alone: the processes that it started must go by themselves."""
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # so that nothing happens while its children are listed
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        deadline = time.monotonic() + 20
        while any(map(is_running, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_running, children)), "processes outlive the killed command"
    end(process)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_while_building(stage: str, whole: Whole, data: Path, embedder: str, workers: int, moments: random.Random) -> None:
    """Kill one run while it builds this stage."""
    partial = data / f"{stage}.partial"
    nothing_left = (partial / MANIFEST).exists()
    moment, seconds = moments.randint(1, whole.moments[stage]), moments.uniform(0, 2.0 if workers > 1 else 0.02)
    process = start_prepare(whole.config, data, embedder, ("stop", str(partial), str(moment), str(seconds)), workers)
    wait_until_stopped(process)
    kill(process)
    assert built_stages(data)[stage] == "unfinished"
    if nothing_left:  # later kills shall find something to do
        shutil.rmtree(partial)


def contents(data: Path, stages: Sequence[str] = STAGES) -> dict[str, str]:
    """SHA-256 of every file of these artefacts, their manifests with fingerprints too."""
    files = sorted(path for stage in stages for path in (data / stage).rglob("*"))
    return {str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize(
    ("embedder", "stages"),
    [("tfidf", CORPUS_STAGES), ("tfidf", RETRIEVAL_STAGES), ("lsa", RETRIEVAL_STAGES)],
    ids=["corpus", "tfidf", "lsa"],
)
def test_killed_data_stages_end_in_the_same_bytes(
    embedder: str, stages: tuple[str, ...], kills: int, whole: dict[str, Whole], tmp_path: Path
) -> None:
    """The first kill and every second one after it hit a run with two worker processes."""
    run, data = whole[embedder], tmp_path / "run" / "data"
    for stage in CORPUS_STAGES if stages == RETRIEVAL_STAGES else ():
        shutil.copytree(run.data / stage, data / stage)
    moments = random.Random(f"{embedder} {kills}")
    for stage in stages:
        for number in range(kills):
            workers = 2 if stage in POOLED and number % 2 == 0 else 1
            kill_while_building(stage, run, data, embedder, workers, moments)
    assert end(start_prepare(run.config, data, embedder)) == 0
    assert contents(data) == contents(run.data)
    assert {path.name for path in data.iterdir()} == {path.name for path in run.data.iterdir()}


def metrics_of(workdir: Path) -> bytes:
    path = workdir / "models" / "retro" / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def wait_for_a_line(process: subprocess.Popen[str], workdir: Path) -> None:
    """Until a run has changed its metrics: begun them, cut them to the checkpoint, or written a line more."""
    before, deadline = metrics_of(workdir), time.monotonic() + 300
    while process.poll() is None and metrics_of(workdir) == before:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start_training(config: Path, data: Path, workdir: Path) -> subprocess.Popen[str]:
    return start(config, "train.py", "--workdir", str(workdir), f"--set=Config.data_dir={data}")


def trained(workdir: Path) -> tuple[bytes, dict[str, str], bytes]:
    """The loss curve, the checksum of every array of the last checkpoint, and the results of the evaluation."""
    with Checkpoints(workdir / "models" / "retro" / "checkpoints", keep=2) as checkpoints:
        about = checkpoints.about(checkpoints.find("latest"))
    assert about.step == STEPS
    results = (workdir / "evaluation" / "perplexity-test.json").read_bytes()
    return metrics_of(workdir), about.digests, results


@pytest.mark.parametrize("kills", KILLS)
def test_killed_training_ends_in_the_same_bytes(
    kills: int, whole: dict[str, Whole], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    run, moments, killed = whole["tfidf"], random.Random(kills), 0
    unkilled = start_training(run.config, run.data, tmp_path / "unkilled")
    wait_for_a_line(unkilled, tmp_path / "unkilled")
    began = time.perf_counter()
    while len(metrics_of(tmp_path / "unkilled").splitlines()) < LINES and unkilled.poll() is None:
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    assert end(unkilled) == 0
    workdir = tmp_path / "killed"
    while killed < kills:
        process = start_training(run.config, run.data, workdir)
        wait_for_a_line(process, workdir)
        time.sleep(moments.uniform(0, 2 * seconds / kills))
        kill(process)
        if process.returncode == -signal.SIGKILL and len(metrics_of(workdir).splitlines()) < LINES:
            killed += 1
        else:  # training was done before: begin again
            shutil.rmtree(workdir)
    assert end(start_training(run.config, run.data, workdir)) == 0
    one, other = trained(tmp_path / "unkilled"), trained(workdir)
    assert len(one[1]) > 50 and len(one[0].splitlines()) == LINES
    assert one == other
