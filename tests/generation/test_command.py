"""``python -m retro_jax generate`` as a person uses it, on a model of a few thousand parameters; and what it refuses."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from retro_jax.cli import main
from retro_jax.gin_config import load_config
from retro_jax.prepare import prepare_database
from tests.tiny_run import tiny_run

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SHORT = ("--set", "GenerateConfig.max_new_tokens=12", "--set", "GenerateConfig.batch_size=2")
CHUNK = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, trained for a step: its config short.gin, and its workdir run."""
    folder = tmp_path_factory.mktemp("generate")
    tiny_run(folder)
    return folder


@pytest.fixture
def texts(folder: Path) -> list[str]:
    """The corpus's documents."""
    return [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]


def generate(folder: Path, *arguments: object) -> int:
    return main(["generate", "--config", str(folder / "short.gin"), "--workdir", str(folder / "run"), *map(str, arguments)])


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which it ends."""
    capsys.readouterr()
    assert generate(folder, *SHORT, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def completions(path: Path) -> list[dict[str, Any]]:
    """A file's lines in the order of the prompts."""
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["number"])


def test_text_neighbours_and_json_lines(
    folder: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, output = texts[0][:60], tmp_path / "new" / "out.jsonl"
    assert generate(folder, *SHORT, "--prompt", prompt, "--show-neighbours", "--output", output) == 0
    shown = capsys.readouterr().out
    (line,) = completions(output)
    assert line["prompt"] == prompt and line["seed"] == 0 and line["finish"] == "length"
    assert len(line["tokens"]) == len(line["log_probabilities"]) == 12
    assert shown.startswith(prompt) and line["text"].splitlines()[0][:3].strip() in shown
    best = next(place["found"][0] for place in line["neighbours"] if place["found"])
    assert {"distance", "document", "text", "continuation"} <= best.keys()
    assert f"document {best['document']}" in shown and f"{best['distance']:.4f}" in shown
    # Chunks of the prompt end with it, and one more has filled since.
    ends = [place["end"] for place in line["neighbours"]]
    assert all(late - early == CHUNK for early, late in itertools.pairwise(ends))
    # The same again is done already; with other settings the file is another run's.
    assert generate(folder, *SHORT, "--prompt", prompt, "--show-neighbours", "--output", output) == 0
    assert "nothing left to do" in capsys.readouterr().out
    hotter = ("--set", "GenerateConfig.temperature=2", "--prompt", prompt, "--show-neighbours", "--output", output)
    assert "was begun with other settings, another model or other data" in refusal(folder, capsys, *hotter)
    assert "line 1 completes another prompt 0" in refusal(
        folder, capsys, "--prompt", "another", "--show-neighbours", "--output", output
    )


def test_a_file_that_was_begun_is_gone_on_with(folder: Path, texts: list[str], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    asked = [{"prompt": text[: 20 + 7 * number], "seed": number} for number, text in enumerate(texts[:5])]
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in asked))
    assert generate(folder, *SHORT, "--prompts", prompts, "--output", output) == 0
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # a kill in the third line
    assert generate(folder, *SHORT, "--prompts", prompts, "--output", output) == 0
    before, after = (
        sorted(map(json.loads, data.splitlines()), key=lambda line: line["number"]) for data in (whole, output.read_bytes())
    )
    assert [{**line, "log_probabilities": None} for line in before] == [{**line, "log_probabilities": None} for line in after]
    assert [line["prompt"] for line in after] == [prompt["prompt"] for prompt in asked]


@pytest.mark.slow
def test_killed_and_gone_on_with(folder: Path, texts: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(text[:40] + "\n" for text in texts[:30]))

    def start(output: Path) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "retro_jax",
            "generate",
            "--config",
            str(folder / "short.gin"),
            "--workdir",
            str(folder / "run"),
        ]
        command += [*SHORT, "--prompts", str(prompts), "--output", str(output)]
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole.jsonl").wait() == 0
    output = tmp_path / "killed.jsonl"
    killed = start(output)
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 5 <= output.read_bytes().count(b"\n") < 30
    assert start(output).wait() == 0
    whole, resumed = completions(tmp_path / "whole.jsonl"), completions(output)
    assert [line["text"] for line in whole] == [line["text"] for line in resumed] and len(resumed) == 30


def test_several_prompts_stand_in_their_order(folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of the GPT, from standard input; the shortest is done first, and waits."""
    prompts = (texts[2][:90], texts[3][:25], texts[4][:60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("\n".join(prompts) + "\n\n"))
        assert generate(folder, *SHORT, "--model", "gpt", "--prompts", "-") == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"{number}  {prompt[:20]}") for number, prompt in enumerate(prompts)]
    assert places == sorted(places)


def test_prompts_that_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def from_file(text: str, name: str = "p.jsonl") -> str:
        (tmp_path / name).write_text(text)
        return refusal(folder, capsys, "--prompts", tmp_path / name)

    assert refusal(folder, capsys).startswith("give either --prompt TEXT")
    assert refusal(folder, capsys, "--prompt", "a", "--prompts", "b").startswith("give either --prompt TEXT")
    assert refusal(folder, capsys, "--prompt", "a", "--prompt", "") == "prompt 1 is empty; give some text to go on from"
    assert refusal(folder, capsys, "--prompts", tmp_path / "none") == (
        f"--prompts {tmp_path / 'none'} is not a file; give one, or - for standard input"
    )
    assert from_file("\n\n", "p.txt").endswith("has no prompt; give one a line")
    assert "line 2 is not JSON" in from_file('{"prompt": "a"}\nb\n')
    assert "line 1 is not an object with a text in the field prompt" in from_file('{"text": "a"}\n')
    assert "passages that are not a list of texts" in from_file('{"prompt": "a", "passages": "b"}\n')
    assert "seed True, which is not an integer" in from_file('{"prompt": "a", "seed": true}\n')
    assert "has the field 'sed'; known are prompt, passages, seed" in from_file('{"prompt": "a", "sed": 1}\n')
    assert "holds bytes that are no UTF-8 text" in refusal(
        folder, capsys, "--prompt", b"a\xff".decode("utf-8", "surrogateescape")
    )
    assert refusal(folder, capsys, "--prompt", "a", "--output", tmp_path) == f"--output {tmp_path} is a folder; name a file"
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert "line 1 is no completion" in refusal(folder, capsys, "--prompt", "a", "--output", tmp_path / "other.jsonl")


def test_what_the_model_cannot_do_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def reason(*settings: str, prompt: str = "a") -> str:
        return refusal(folder, capsys, *(word for one in settings for word in ("--set", one)), "--prompt", prompt)

    assert "which with GenerateConfig.max_new_tokens=12 are more than the model's 64 positions" in reason(prompt="a b c d " * 30)
    assert "holds an empty string, which ends every text" in reason("GenerateConfig.stop=('',)")
    assert "GenerateConfig.retrieval_step=9 is above ChunkConfig.chunk_len=8" in reason("GenerateConfig.retrieval_step=9")
    assert "has no passages, and GenerateConfig.retrieval='given' reads nothing else" in reason(
        "GenerateConfig.retrieval='given'"
    )
    assert "has seed -1; use one from 0 to 4294967295" in refusal_of_file(folder, capsys, tmp_path, {"prompt": "a", "seed": -1})
    passages = {"prompt": "a", "passages": ["b"]}
    assert "the model has no retrieval to read them with" in refusal_of_file(folder, capsys, tmp_path, passages, "--model", "gpt")


def refusal_of_file(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, prompt: dict, *arguments: str) -> str:
    (tmp_path / "one.jsonl").write_text(json.dumps(prompt) + "\n")
    return refusal(folder, capsys, "--prompts", tmp_path / "one.jsonl", *arguments)


def test_models_and_databases_that_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refusal(folder, capsys, "--prompt", "a", "--model", "bert").endswith("has no model 'bert'; it has gpt, retro")
    assert "no checkpoint 7 in" in refusal(folder, capsys, "--prompt", "a", "--checkpoint", "7")
    elsewhere = ["generate", "--config", str(folder / "short.gin"), "--workdir", str(tmp_path / "new"), "--prompt", "a"]
    assert main(elsewhere) == 2 and "train the model first" in capsys.readouterr().err
    other = load_config([folder / "short.gin"], ["TokenizerConfig.vocab_size=400"])
    prepare_database(other, tmp_path / "other", lambda line: None)
    assert "was built with another tokenizer than the model's" in refusal(
        folder, capsys, "--prompt", "a", "--database", tmp_path / "other"
    )
    data = f"Config.data_dir={tmp_path / 'other'}"
    assert "was trained with another tokenizer than" in refusal(folder, capsys, "--prompt", "a", "--set", data)
