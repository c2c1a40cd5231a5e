"""Recall of gold passages: counted by hand, kept, and refused where it means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retro_jax.config import ChunkConfig, Config, CorpusConfig, EvalConfig, ModelConfig, RetrievalConfig, TokenizerConfig
from retro_jax.errors import UserError
from retro_jax.evaluation.retrieval import evaluate_retrieval, read_questions, recall
from retro_jax.gin_config import config_text
from retro_jax.prepare import prepare_database
from retro_jax.retrieval.database import Database

REPOSITORY = Path(__file__).resolve().parent.parent.parent
WORDS = [f"{a}{b}{c}{d}" for a in "bdfg" for b in "aeio" for c in "klmn" for d in "aeiou"]
CHUNKS = ChunkConfig(chunk_len=8, retrieved_len=16)


def settings(folder: Path) -> Config:
    """30 documents of 8 words of their own each, long enough for several chunks."""
    rows = [{"id": f"p{i}", "text": " ".join(WORDS[8 * i : 8 * i + 8])} for i in range(30)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        corpus=CorpusConfig(sources=(str(folder / "corpus.jsonl"),), valid_fraction=0.0, test_fraction=0.0, workers=1),
        tokenizer=TokenizerConfig(vocab_size=330),
        chunks=CHUNKS,
        model=ModelConfig(retro=None),
        retrieval=RetrievalConfig(features=2**16, workers=1),
        evaluation=EvalConfig(bootstrap_samples=200),
    )


def words(document: int) -> list[str]:
    return WORDS[8 * document : 8 * document + 8]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Database, Path]:
    folder = tmp_path_factory.mktemp("recall")
    config = settings(folder)
    return config, prepare_database(config, folder / "data", lambda line: None), folder


def write(path: Path, *questions: tuple[str, list[str]]) -> Path:
    path.write_text("".join(json.dumps({"question": text, "gold_passage_ids": gold}) + "\n" for text, gold in questions))
    return path


def test_passages_rank_by_their_best_chunk(database: tuple[Config, Database, Path], tmp_path: Path) -> None:
    """One question finds its passage first, one second, one behind others, one not at all; one of two gold passages is enough."""
    config, opened, _ = database
    behind = " ".join(" ".join(words(i)[:4]) for i in range(8)) + " " + words(20)[0]
    found = opened.nearest_documents([behind], 20)[0][0].tolist()
    assert found.index(20) == 8 and sorted(found[:8]) == list(range(8)) and found[9:] == [-1] * 11
    file = write(
        tmp_path / "asked.jsonl",
        (" ".join(words(3)[2:4]), ["p3"]),
        (" ".join([*words(5)[:4], words(6)[0]]), ["p6"]),
        (behind, ["p20"]),
        (" ".join(words(9)[:3]), ["p10"]),
        (" ".join(words(9)[:3]), ["p12", "p9"]),
    )
    (result,) = evaluate_retrieval(config, opened, read_questions([str(file)]), tmp_path / "evaluation")
    assert {k: figure["value"] for k, figure in result["recall"].items()} == {"1": 0.4, "5": 0.6, "20": 0.8}
    assert all(f["low"] < f["value"] < f["high"] for f in result["recall"].values())
    assert result["passages"] == 30 and result["count"] == 5 and result["embedder"]["embedder"] == "tfidf"
    assert json.loads((tmp_path / "evaluation" / "retrieval-asked.json").read_text()) == result


def test_what_was_searched_is_kept(
    database: tuple[Config, Database, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, opened, _ = database
    file = write(tmp_path / "q.jsonl", (words(1)[0], ["p1"]), (words(2)[0], ["p2"]))
    first = evaluate_retrieval(config, opened, read_questions([str(file)]), tmp_path / "evaluation")
    monkeypatch.setattr(Database, "nearest_documents", None)
    again = evaluate_retrieval(config, opened, read_questions([str(file)]), tmp_path / "evaluation")
    assert again == first
    write(file, (words(1)[0], ["p1"]), (words(3)[0], ["p2"]))
    with pytest.raises(UserError, match="questions of q: 1 block failed"):  # other questions are searched
        evaluate_retrieval(config, opened, read_questions([str(file)]), tmp_path / "evaluation")


def test_intervals_are_those_of_resampled_questions() -> None:
    """A mean of 200 questions at .3: its standard error is .0324."""
    hits = np.zeros((200, 20), bool)
    hits[:60, 3] = hits[60:120, 10] = True
    figures = recall(hits, samples=2000, seed=0)
    assert (figures["1"]["value"], figures["5"]["value"], figures["20"]["value"]) == (0.0, 0.3, 0.6)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 200)
    assert figures["5"]["low"] == pytest.approx(0.3 - half, abs=0.012) and figures["5"]["high"] == pytest.approx(
        0.3 + half, abs=0.012
    )
    assert figures["1"]["low"] == figures["1"]["high"] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file"),
        ('{"question": "a", "gold_passage_ids": ["p1"]}\n', "holds 1 questions; give at least 2"),
        ('{"question": "a"\n', "line 1 is not JSON"),
        ('\n{"question": "a", "gold_passage_ids": "p1"}\n', "line 2 lacks a question (a text) or gold_passage_ids"),
        ("[1]\n", "line 1 lacks a question"),
    ],
)
def test_files_that_hold_no_questions(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UserError) as raised:
        read_questions([str(tmp_path / "q.jsonl")])
    assert message in str(raised.value)
    with pytest.raises(UserError, match="EvalConfig.questions is empty"):
        read_questions([])


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("nq", "qed"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "items.jsonl", ("a", ["p1"]), ("b", ["p2"]))
    paths = [str(tmp_path / name / "items.jsonl") for name in ("nq", "qed")]
    assert [questions.name for questions in read_questions(paths)] == ["nq-items", "qed-items"]
    assert [questions.name for questions in read_questions(paths[:1])] == ["items"]
    with pytest.raises(UserError, match="names two files 'nq-items'"):
        read_questions([paths[0], paths[0]])


def test_a_gold_passage_that_is_not_there_is_told(database: tuple[Config, Database, Path], tmp_path: Path) -> None:
    config, opened, _ = database
    file = write(tmp_path / "q.jsonl", ("a", ["p1"]), ("where?", ["x7"]))
    with pytest.raises(
        UserError, match=r"1 of the 2 questions .* no gold passage .* 'where\?' with x7; name a corpus that has them"
    ):
        evaluate_retrieval(config, opened, read_questions([str(file)]), tmp_path / "evaluation")


@pytest.mark.slow
def test_the_command_needs_no_model(tmp_path: Path) -> None:
    """From text to a table; no neighbours are searched, and the config is stored for `retrieval query`."""
    config = settings(tmp_path)
    file = write(tmp_path / "asked.jsonl", (words(3)[0], ["p3"]), (words(4)[0], ["p4"]))
    config = replace(config, evaluation=replace(config.evaluation, questions=(str(file),)))
    (tmp_path / "tiny.gin").write_text(config_text(config))
    command = [sys.executable, "eval.py", "--task", "retrieval", "--config", tmp_path / "tiny.gin", "--workdir", tmp_path / "run"]
    done = subprocess.run([str(word) for word in command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Recall of gold passages" in done.stdout and "1.000" in done.stdout
    assert (tmp_path / "run" / "evaluation" / "retrieval-asked.json").exists()
    assert (tmp_path / "run" / "config.gin").exists() and not (tmp_path / "run" / "data" / "neighbours").exists()
