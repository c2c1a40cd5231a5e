"""A model of ours as lm_eval's: on a model whose answers are known beforehand, and on one with retrieval."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import TrainConfig
from retro_jax.errors import UserError
from tests.evaluation import forced
from tests.model.build import randomised, small

pytestmark = pytest.mark.harness
if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed; make test-harness installs it", allow_module_level=True)

from lm_eval.api.registry import get_model

from retro_jax.evaluation.harness import RetroLM
from retro_jax.evaluation.harness_models import Opened, refuse_other_vocabulary
from retro_jax.evaluation.harness_run import evaluate_harness
from retro_jax.evaluation.harness_tasks import load_tasks
from retro_jax.evaluation.likelihood import Scorer
from retro_jax.generation.neighbours import Found

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOKENIZER = forced.byte_tokenizer()
CHUNK, K, R = 4, 2, 8


def request(*arguments: Any, **document: Any) -> Any:
    return SimpleNamespace(args=arguments, doc=document, task_name="asked")


def evaluate(folder: Path, tasks: list[str], model: nnx.Module | None = None, **settings: Any) -> dict:
    config = forced.config_of(tasks, **settings)
    models = {"gpt": (model or forced.forced_model(TOKENIZER), 1)}
    return evaluate_harness(Opened(config, TOKENIZER, models, None), folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return forced.write_tasks(tmp_path_factory.mktemp("tasks"))


def test_forced_answers(tasks: list[str], tmp_path: Path) -> None:
    result = evaluate(tmp_path, tasks)
    values = {
        task: {metric: entry["models"]["gpt"]["value"] for metric, entry in facts["metrics"].items()}
        for task, facts in result["tasks"].items()
    }
    assert values["choice"] == {"acc": 0.75, "acc_norm": 0.75}
    assert values["schema"] == {"acc": 0.5} and values["generated"] == {"exact_match": 0.5}
    # One byte of 4 of the second document is another than the model's.
    cloze = [forced.log_probability(" xyz", context) for context in ("abc", "b")]
    assert values["cloze"] == {"acc": 0.5, "perplexity": pytest.approx(np.exp(-np.mean(cloze)), rel=1e-5)}  # measured 1e-7
    texts = forced.WHOLE
    nats, size = sum(forced.log_probability(text, "?") for text in texts), sum(len(text) for text in texts)
    assert max(len(text) for text in texts) > 2 * forced.ROW
    assert values["whole"]["bits_per_byte"] == pytest.approx(-nats / size / np.log(2), rel=1e-5)  # measured 1e-8
    assert values["whole"]["byte_perplexity"] == pytest.approx(np.exp(-nats / size), rel=1e-5)
    assert result["tasks"]["choice"]["documents"] == 4 and result["models"]["gpt"]["retrieval"] == "none"
    assert result["tasks"]["choice"]["metrics"]["acc"]["models"]["gpt"]["stderr"] == pytest.approx(0.25)
    assert json.loads((tmp_path / "harness.json").read_text()) == result


def test_a_limit_and_examples(tasks: list[str], tmp_path: Path) -> None:
    result = evaluate(tmp_path, tasks[:1], limit=3, fewshot=1)
    assert result["tasks"]["choice"]["documents"] == 3
    assert result["tasks"]["choice"]["metrics"]["acc"]["models"]["gpt"]["value"] == 1.0


def test_nothing_is_computed_twice(tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(tmp_path, tasks)
    monkeypatch.setattr(Scorer, "_computed", None)
    monkeypatch.setattr("retro_jax.evaluation.harness_models.Engine", None)
    assert evaluate(tmp_path, tasks) == first


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.evaluation.forced", str(folder), *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_killed_at_half_it_goes_on_to_the_same_file(tasks: list[str], tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tasks.json").write_text(json.dumps(tasks))
    assert run(tmp_path / "whole").returncode == 0
    assert run(tmp_path / "killed", 6).returncode == -signal.SIGKILL
    kept = next((tmp_path / "killed" / "evaluation" / "harness").glob("*.jsonl"))
    before = kept.read_bytes()
    assert 5 < before.count(b"\n") and not (tmp_path / "killed" / "evaluation" / "harness.json").exists()
    kept.write_bytes(before[:-9])  # and the last line torn
    done = run(tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    files = [(tmp_path / name / "evaluation" / "harness.json").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert kept.read_bytes().startswith(before[: before.rstrip(b"\n").rindex(b"\n")])


class Retrieves:
    """Neighbours that depend on the chunk's tokens."""

    def find(self, queries: Any) -> Found:
        tokens = np.stack([np.random.default_rng(query.tolist()).integers(0, 200, (K, R), np.int32) for query in queries])
        return Found(tokens, np.ones(tokens.shape, bool), np.zeros((len(queries), K)), np.zeros((len(queries), K)))


@pytest.fixture(scope="module")
def retro() -> Any:
    return randomised(small(vocab_size=264, num_layers=1, max_positions=64, retro={"cca_layers": (1,)}))


def language_model(model: Any, **settings: Any) -> RetroLM:
    retriever = Retrieves() if settings.get("retrieval") == "live" else None
    return RetroLM(Scorer(model, TrainConfig(), longest=24, batch_size=4, retriever=retriever), TOKENIZER, **settings)


@pytest.mark.parametrize("retrieval", ["live", "none"])
def test_a_rolling_sum_is_the_texts_log_likelihood(retro: Any, retrieval: Any) -> None:
    """Of a text that fits into a row; a longer one is the sum over windows that score each token once."""
    model = language_model(retro, retrieval=retrieval)
    short, long = "the cat sat on the mat", "the cat sat on the mat and looked at the moon for a long time"
    (whole,) = model.loglikelihood_rolling([request(short)])
    ((nats, _),) = model.loglikelihood([request("", short)])
    assert whole == pytest.approx(nats, rel=1e-6)
    (rolling,) = model.loglikelihood_rolling([request(long)])
    if retrieval == "none":
        text = [request(long[max(0, end - 24) : start], long[start:end]) for start, end in ((0, 24), (24, 48), (48, 61))]
        # The last window has as much context as there is room for.
        text[1].args = (long[23:24], long[24:48])
        text[2].args = (long[37 - 1 : 48], long[48:61])
        assert rolling == pytest.approx(sum(nats for nats, _ in model.loglikelihood(text)), rel=1e-5)  # measured 2e-7


def test_windows_lie_on_the_texts_grid(retro: Any) -> None:
    """Wherever a window begins, its chunks end where the text's chunks end."""
    model = language_model(retro, retrieval="live")
    for window, start in zip(model._windows(request("x" * 61)), (0, 24, 37), strict=True):
        assert window.first_chunk_len is not None
        # The row's token 0 is the text's token start - 1.
        assert (start - 1 + window.first_chunk_len) % CHUNK == 0 and 1 <= window.first_chunk_len <= CHUNK


def test_given_passages_are_read(retro: Any) -> None:
    model, without = language_model(retro, retrieval="given"), language_model(retro)
    one, other, none = (request("the cat", " sat", passages=passages) for passages in (["a cat sat"], ["a dog"], []))
    found = model.loglikelihood([one, other, none])
    assert len({nats for nats, _ in found}) == 3
    assert found[2] == pytest.approx(without.loglikelihood([none])[0], rel=1e-5)
    with pytest.raises(UserError, match="a document of asked has no field passages, which HarnessConfig.retrieval='given' reads"):
        model.loglikelihood([request("the cat", " sat")])


def test_lm_eval_knows_it_by_name(tmp_path: Path) -> None:
    assert get_model("retro_jax") is RetroLM
    with pytest.raises(UserError, match=r"config.gin is not there; name the folder of a trained run"):
        RetroLM.create_from_arg_string(f"workdir={tmp_path}", {"batch_size": 4, "device": None})


def test_what_cannot_be_asked(retro: Any) -> None:
    model = language_model(retro)
    with pytest.raises(UserError, match="the continuation '' after 'the cat' has no token of its own"):
        model.loglikelihood([request("the cat", "")])
    with pytest.raises(UserError, match="this model was opened to score it alone"):
        model.generate_until([request("the cat", {"until": ["\n"]})])
    writes = language_model(retro, complete=lambda prompts, config: [])
    with pytest.raises(UserError, match="a task generates 24 tokens, and a row has at most 24; lower"):
        writes.generate_until([request("the cat", {"until": ["\n"], "max_gen_toks": 24})])


def test_tasks_that_are_not_there(tmp_path: Path) -> None:
    for names, message in (
        (["no_such_task_at_all"], "'no_such_task_at_all', which is neither a file nor a folder, nor a task of lm_eval"),
        ([str(tmp_path / "no.yaml")], "no.yaml', which is not there; check the path"),
        ([str(tmp_path)], r"which has 0 files \*.jsonl; name one with one"),
    ):
        with pytest.raises(UserError, match=message):
            load_tasks(names, fewshot=None, seed=0)
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\noutput_type: nothing\n")
    with pytest.raises(UserError, match="lm_eval cannot load the tasks .*bad.yaml .*; mend the task's file, or leave it out"):
        load_tasks([str(tmp_path / "bad.yaml")], fewshot=None, seed=0)


def test_numbers_that_are_none_keep_what_was_answered(tasks: list[str], tmp_path: Path) -> None:
    model = forced.forced_model(TOKENIZER)
    graph, state = nnx.split(model)
    spoilt = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.at[...].set(np.nan), state))
    with pytest.raises(UserError, match=r"the log-likelihood of \d+ tokens after \d+ is nan"):
        evaluate(tmp_path, tasks[:1], spoilt)


def test_another_tokenizer_is_refused() -> None:
    model = randomised(small(vocab_size=64, num_layers=1, retro={"cca_layers": (1,)}))
    with pytest.raises(UserError, match="the model retro knows 64 tokens, and the tokenizer has 257: it was trained"):
        refuse_other_vocabulary("retro", model, TOKENIZER)
