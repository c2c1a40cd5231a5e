"""What a user can get wrong, as the command answers: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from retro_jax.cli import main
from retro_jax.prepare import built_stages

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = {
    "CorpusConfig.valid_fraction": 0.1,
    "CorpusConfig.test_fraction": 0.1,
    "CorpusConfig.workers": 1,
    "TokenizerConfig.vocab_size": 384,
    "ChunkConfig.chunk_len": 8,
    "ChunkConfig.retrieved_len": 16,
    "RetrievalConfig.workers": 1,
    "RetrievalConfig.features": 4096,
}

Prepare = Callable[..., tuple[int, str]]


def texts(documents: int = 60, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    return [" ".join(rng.choices(words, k=rng.randint(20, 50))) for _ in range(documents)]


def write_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """``prepare(source, setting=...)`` runs the data stages into ``tmp_path/run``: exit code and standard error."""

    def run(source: str | Path, *extra: str, workdir: str = "run", **settings: object) -> tuple[int, str]:
        file = tmp_path / "small.gin"
        values = {**SMALL, "CorpusConfig.sources": (str(source),), **settings}
        file.write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))
        capsys.readouterr()
        code = main(["prepare", "--config", str(file), "--workdir", str(tmp_path / workdir), *extra])
        return code, "\n".join(x for x in capsys.readouterr().err.splitlines() if x.startswith("error:"))

    return run


def refused(outcome: tuple[int, str], *parts: str) -> None:
    code, error = outcome
    assert code == 2, error
    assert error.count("\n") == 0
    for part in parts:
        assert part in error, error


def test_missing_file(prepare: Prepare, tmp_path: Path) -> None:
    refused(prepare(tmp_path / "none.jsonl"), "none.jsonl")
    assert set(built_stages(tmp_path / "run" / "data").values()) == {"missing"}


def test_empty_corpus(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    refused(prepare(tmp_path / "empty.jsonl"), "empty.jsonl")
    assert set(built_stages(tmp_path / "run" / "data").values()) == {"missing"}
    refused(prepare(write_lines(tmp_path / "blank.jsonl", ["", "  \n"]), workdir="blank"), "blank.jsonl")


def test_invalid_utf8(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà vu ".encode("latin-1") * 50)
    refused(prepare(path), "latin.txt", "UTF-8")


def test_malformed_json_line_is_named(prepare: Prepare, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(3))
    with path.open("a") as file:
        file.write('{"text": "cut of\n')
    refused(prepare(path), "a.jsonl", "4")
    assert "unfinished" not in built_stages(tmp_path / "run" / "data").values()
    # Mended, it goes on without a rebuild.
    assert prepare(write_lines(path, texts()))[0] == 0


def test_missing_text_field(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "no text here", "id": 3}\n')
    refused(prepare(path), "a.jsonl", "'text'", "body")
    assert prepare(write_lines(path, texts()), **{"CorpusConfig.text_field": "text"})[0] == 0


def test_documents_shorter_than_a_chunk_are_fine(prepare: Prepare, tmp_path: Path) -> None:
    assert prepare(write_lines(tmp_path / "a.jsonl", [*texts(), "a", "of"])) == (0, "")


def test_fewer_chunks_than_neighbours(prepare: Prepare, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["one two three", "two three four", "three four five"])
    settings = {"CorpusConfig.valid_fraction": 0.0, "CorpusConfig.test_fraction": 0.0, "ChunkConfig.num_neighbours": 15}
    refused(prepare(path, **settings), "ChunkConfig.num_neighbours=15", "chunks")


def test_a_row_that_is_no_multiple_of_the_chunk(prepare: Prepare, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts())
    refused(prepare(path, **{"DataConfig.seq_len": 500}), "DataConfig.seq_len=500", "chunk_len=8", "use 496", "small.gin:")


def test_a_changed_corpus_is_refused_by_what_was_built_from_the_other(prepare: Prepare, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts())
    assert prepare(path)[0] == 0
    write_lines(path, texts(seed=1))
    refused(prepare(path), "was built with input", "--rebuild tokenizer")
    assert prepare(path, "--rebuild", "tokenizer")[0] == 0


def test_neighbours_of_another_corpus_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    assert prepare(write_lines(tmp_path / "a.jsonl", texts()))[0] == 0
    assert prepare(write_lines(tmp_path / "b.jsonl", texts(seed=1)), workdir="other")[0] == 0
    data, other = tmp_path / "run" / "data", tmp_path / "other" / "data"
    shutil.rmtree(data / "neighbours")
    shutil.copytree(other / "neighbours", data / "neighbours")
    refused(prepare(tmp_path / "a.jsonl"), "neighbours was built with input", "--rebuild neighbours")


@pytest.mark.parametrize(
    ("stage", "file"), [("tokens", "0-train.bin"), ("chunks", "train.start.npy"), ("neighbours", "train.ids.npy")]
)
def test_truncated_and_corrupted_artefacts(prepare: Prepare, tmp_path: Path, stage: str, file: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts())
    assert prepare(path)[0] == 0
    damaged = tmp_path / "run" / "data" / stage / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-8])
    refused(prepare(path), file, "truncated", f"--rebuild {stage}")
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(prepare(path), file, "corrupted", f"--rebuild {stage}")
    damaged.unlink()
    refused(prepare(path), file, "missing", f"--rebuild {stage}")
    assert prepare(path, "--rebuild", stage) == (0, "")


def test_a_tokenizer_too_small_for_a_token_store(prepare: Prepare, tmp_path: Path) -> None:
    assert prepare(write_lines(tmp_path / "a.jsonl", texts()), **{"TokenizerConfig.vocab_size": 400})[0] == 0
    assert prepare(tmp_path / "a.jsonl", workdir="smaller", **{"TokenizerConfig.vocab_size": 330})[0] == 0
    store = tmp_path / "run" / "data" / "tokens" / "0-train"
    tokenizer = tmp_path / "smaller" / "data" / "tokenizer" / "tokenizer.json"
    settings = {"TokenizerConfig.kind": "tokenizer_json", "TokenizerConfig.path": str(tokenizer)}
    refused(prepare(f"megatron:{store}", workdir="third", **settings), "token id", "load the tokenizer that made the store")


def test_no_space_left(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts())

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(prepare(path), "the disk is full", "free some space and run again")
    monkeypatch.undo()
    assert "built" not in built_stages(tmp_path / "run" / "data").values()
    assert prepare(path) == (0, "")


def test_a_file_size_limit_is_told_too(tmp_path: Path) -> None:
    """A write that fails for real, in a process of its own: no file may grow beyond 16 KB."""
    path = write_lines(tmp_path / "a.jsonl", texts(documents=300))
    settings = [f"--set={name}={value}" for name, value in {**SMALL, "CorpusConfig.sources": path}.items()]
    command = [
        sys.executable,
        "-m",
        "retro_jax",
        "prepare",
        "--config",
        "quickstart",
        "--workdir",
        str(tmp_path / "run"),
        *settings,
    ]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))

    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: a file may not grow as large as it has to")
    assert "Traceback" not in done.stderr
    assert built_stages(tmp_path / "run" / "data")["tokens"] == "unfinished"
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unfinished" not in built_stages(tmp_path / "run" / "data").values()
