"""python eval.py --task qa and text-quality, on trained models of a few thousand parameters."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import eval as program
from retro_jax.evaluation.outputs import OUTPUTS
from retro_jax.generation.engine import Engine
from retro_jax.gin_config import load_config
from retro_jax.model import Retro
from retro_jax.prepare import prepare_database
from tests.tiny_run import tiny_run

REPOSITORY = Path(__file__).resolve().parents[2]
MODES = ("closed", "rag", "retro", "retro++")
SHORT = (
    "QaConfig.max_new_tokens=6",
    "QaConfig.max_prompt_tokens=48",
    "QaConfig.bootstrap_samples=50",
    "QaConfig.template=papers",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny_run(folder)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """The run without results of other tests, and a file of questions."""
    shutil.rmtree(trained / "run" / "evaluation", ignore_errors=True)
    texts = [json.loads(line)["text"].split() for line in (trained / "corpus.jsonl").read_text().splitlines()[:9]]
    lines = [{"question": " ".join(t[:3]), "answers": [t[3]], "ctxs": [" ".join(t[:6]), " ".join(t[6:9])]} for t in texts]
    (trained / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return trained


def command(folder: Path, task: str, *settings: str) -> list[str]:
    arguments = ["eval.py", "--config", str(folder / "short.gin"), "--workdir", str(folder / "run"), "--task", task]
    return [*arguments, *(word for one in settings for word in ("--set", one))]


def evaluate(folder: Path, task: str, *settings: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(folder, task, *settings))
        return program.main()


def asked(folder: Path) -> str:
    return f"QaConfig.questions={folder / 'asked.jsonl'}"


def result(folder: Path, name: str = "qa-asked") -> dict[str, Any]:
    return json.loads((folder / "run" / "evaluation" / f"{name}.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, task: str, *settings: str) -> str:
    capsys.readouterr()
    assert evaluate(folder, task, *settings) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_every_model_in_every_mode_that_it_has(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(folder, "qa", asked(folder), *SHORT) == 0
    shown, found = capsys.readouterr().out, result(folder)
    assert list(found["figures"]) == [*(f"retro {mode}" for mode in MODES), "gpt closed", "gpt rag"]
    assert found["count"] == found["with_passages"] == 9 and found["models"]["retro"]["step"] == 1
    assert "retro++" in shown and f"written to {folder / 'run'}/evaluation" in shown
    # All is known now: nothing is asked again, and the file stays as it is.
    whole = (folder / "run" / "evaluation" / "qa-asked.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "stream", None)
        assert evaluate(folder, "qa", asked(folder), *SHORT) == 0
    assert (folder / "run" / "evaluation" / "qa-asked.json").read_bytes() == whole


def test_passages_are_retrieved_from_the_run_s_database(folder: Path) -> None:
    """A question that is the beginning of a training document finds that document first."""
    assert evaluate(folder, "qa", asked(folder), *SHORT, "QaConfig.evidence=retrieved", "QaConfig.modes=('rag', 'retro')") == 0
    found = result(folder)
    assert found["with_passages"] == 9 and found["database"]
    (outputs,) = (folder / "run" / "evaluation" / "qa").glob(f"asked-retro-retro-*/{OUTPUTS}")
    assert sorted(json.loads(line)["number"] for line in outputs.read_text().splitlines()) == list(range(9))


def test_logits_that_are_not_finite_lose_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the GPT alone: what the Retro answered is kept, and asked for no more once the GPT is whole again."""
    make = Engine.__init__

    def spoilt(engine: Engine, model: Retro, *arguments: Any, **settings: Any) -> None:
        if model.config.retro is None:
            graph, arrays = nnx.split(model)
            model = nnx.merge(graph, nnx.map_state(lambda path, value: value * np.float32(np.nan), arrays))
        make(engine, model, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "__init__", spoilt)
        assert "the model's logits are not finite for new token 0 of prompt" in refusal(
            capsys, folder, "qa", asked(folder), *SHORT
        )
    answered = sorted((folder / "run" / "evaluation" / "qa").glob(f"asked-retro-*/{OUTPUTS}"))
    assert [path.read_bytes().count(b"\n") for path in answered] == [9] * 4
    before = [path.stat().st_mtime_ns for path in answered]
    assert evaluate(folder, "qa", asked(folder), *SHORT) == 0
    assert [path.stat().st_mtime_ns for path in answered] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "settings", "name"),
    [
        ("qa", SHORT, "qa-asked"),
        (
            "text-quality",
            (
                "TextQualityConfig.split=valid",
                "TextQualityConfig.max_new_tokens=24",
                "TextQualityConfig.prompt_tokens=8",
                "TextQualityConfig.bootstrap_samples=50",
                "TextQualityConfig.batch_size=2",
            ),
            "text-quality",
        ),
    ],
)
def test_killed_and_continued_gives_the_same(folder: Path, task: str, settings: tuple[str, ...], name: str) -> None:
    settings = (*settings, asked(folder), "QaConfig.batch_size=2")
    place = folder / "run" / "evaluation" / task
    process = subprocess.Popen(
        [sys.executable, *command(folder, task, *settings)], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while sum(path.read_bytes().count(b"\n") for path in place.glob(f"*/{OUTPUTS}")) < 15:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "run" / "evaluation" / f"{name}.json").exists()
    assert evaluate(folder, task, *settings) == 0
    continued = result(folder, name)
    shutil.rmtree(folder / "run" / "evaluation")
    assert evaluate(folder, task, *settings) == 0
    assert result(folder, name) == continued


@pytest.mark.slow
def test_text_quality_of_every_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"TextQualityConfig.{name}" for name in ("max_new_tokens=12", "prompt_tokens=8", "bootstrap_samples=50")]
    assert evaluate(folder, "text-quality", *settings) == 0
    shown, found = capsys.readouterr().out, result(folder, "text-quality")
    assert list(found["figures"]) == ["retro", "retro off", "gpt"] and "Zipf" in shown
    for figures in found["figures"].values():
        assert 0 < figures["length"]["value"] <= 12 and figures["zipf"]["value"] > 0
        assert figures["self_bleu"]["low"] <= figures["self_bleu"]["value"] <= figures["self_bleu"]["high"]
    prompts = f"TextQualityConfig.prompts={folder / 'corpus.jsonl'}"
    assert evaluate(folder, "text-quality", *settings, prompts, "TextQualityConfig.num_prompts=3") == 0
    assert result(folder, "text-quality")["prompts"] == 3


def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reason(*settings: str) -> str:
        return refusal(capsys, folder, "qa", *settings)

    assert "QaConfig.questions is empty" in reason()
    assert "cannot be read (No such file or directory); check the path" in reason("QaConfig.questions=nowhere.jsonl")
    (folder / "wrong.jsonl").write_text('{"question": "who?"}\n')
    assert "line 1 has no answers; give it the field answers" in reason(f"QaConfig.questions={folder / 'wrong.jsonl'}")
    assert "QaConfig.template='mine' is not in" in reason(asked(folder), "QaConfig.template=mine")
    longest = reason(asked(folder), "QaConfig.max_prompt_tokens=4", "QaConfig.max_new_tokens=6")
    assert "tokens more than the 4 that a prompt may have" in longest
    assert "leaves nothing of DataConfig.seq_len=32" in reason(asked(folder), "QaConfig.max_new_tokens=32")
    other = load_config([folder / "short.gin"], ["TokenizerConfig.vocab_size=400"])
    prepare_database(other, folder / "other", lambda line: None)
    data = f"Config.data_dir={folder / 'other'}"
    assert "was built with setting vocab_size=400, now vocab_size=384 is asked for" in reason(
        asked(folder), *SHORT, "QaConfig.evidence=retrieved", data
    )
