"""train.py and eval.py as a user runs them, on a model of a few thousand parameters."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from retro_jax.corpus.tokenizer import load_tokenizer
from retro_jax.gin_config import config_text, load_config

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = """
CorpusConfig.sources = ('{corpus}',)
CorpusConfig.valid_fraction = 0.1
CorpusConfig.test_fraction = 0.1
CorpusConfig.workers = 1
TokenizerConfig.vocab_size = 384
ChunkConfig.chunk_len = 8
ChunkConfig.retrieved_len = 16
RetrievalConfig.workers = 1
RetrievalConfig.features = 4096
DataConfig.seq_len = 32
DataConfig.batch_size = 4
ModelConfig.width = 16
ModelConfig.num_layers = 2
ModelConfig.num_heads = 2
ModelConfig.positions = 'learned'
RetroConfig.cca_layers = (2,)
EncoderConfig.num_layers = 1
TrainConfig.steps = 8
TrainConfig.baselines = ('gpt', 'gpt_matched')
TrainConfig.checkpoint_every = 4
TrainConfig.valid_every = 4
TrainConfig.valid_batches = 1
TrainConfig.log_every = 2
EvalConfig.window = 32
EvalConfig.stride = 16
EvalConfig.bootstrap_samples = 50
"""


def write_config(folder: Path) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    corpus = folder / "corpus.jsonl"
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(120)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    file = folder / "tiny.gin"
    file.write_text(SETTINGS.format(corpus=corpus))
    return file


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One compilation cache for all commands started here: most of their time would go into compiling the same steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """The arguments of a run that is done, and what it printed."""
    folder = tmp_path_factory.mktemp("commands")
    arguments = ["--config", str(write_config(folder)), "--workdir", str(folder / "run")]
    done = run("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    return arguments, done.stdout


def test_one_command_from_text_to_a_table(trained: tuple[list[str], str]) -> None:
    arguments, output = trained
    workdir = Path(arguments[-1])
    stored = workdir / "config.gin"
    assert load_config([stored]) == load_config([arguments[1]])
    assert stored.read_text() in output
    for row in ("Retro ", "Retro, retrieval off", "Retro, shuffled neighbours", "GPT ", "GPT, as many parameters"):
        assert f"│ {row}" in output
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((workdir / "evaluation" / "perplexity-test.json").read_text())
    assert set(result["models"]) == {"retro", "retro off", "retro shuffled", "gpt", "gpt_matched"}
    commands = re.findall(r"^  (python .*?) +#", output, re.MULTILINE)
    assert f"python eval.py {' '.join(arguments)} --task perplexity --checkpoint best" in commands
    assert f"python train.py {' '.join(arguments)} --set TrainConfig.steps=16" in commands


def test_again_there_is_nothing_left_to_do(trained: tuple[list[str], str]) -> None:
    arguments, first = trained
    before = {path: path.stat().st_mtime_ns for path in Path(arguments[-1]).rglob("checkpoints/*")}
    done = run("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing is left to do") == 3
    assert before == {path: path.stat().st_mtime_ns for path in Path(arguments[-1]).rglob("checkpoints/*")}
    assert done.stdout[done.stdout.index("Held-out documents") :] == first[first.index("Held-out documents") :]


def test_evaluate_a_checkpoint(trained: tuple[list[str], str]) -> None:
    arguments, _ = trained
    done = run("eval.py", *arguments, "--task", "perplexity", "--checkpoint", "4", "--set", "EvalConfig.split=valid")
    assert done.returncode == 0, done.stderr
    result = json.loads((Path(arguments[-1]) / "evaluation" / "perplexity-valid.json").read_text())
    assert result["steps"] == {"retro": 4, "gpt": 4, "gpt_matched": 4}
    assert "Held-out documents (valid)" in done.stdout
    best = run("eval.py", *arguments, "--checkpoint", "best")
    assert best.returncode == 0, best.stderr


def test_convert_a_trained_model(trained: tuple[list[str], str], tmp_path: Path) -> None:
    models = Path(trained[0][-1]) / "models"
    for model, target, written in (
        ("retro", "retro", "decoder.1.cca.query.weight"),
        ("gpt", "megatron-core", "linear_qkv.weight"),
    ):
        what = ["--from", "run", "--to", target, "--input", models / model, "--output", tmp_path / model, "--verify", "--report"]
        done = run("-m", "retro_jax", "convert", *what)
        assert done.returncode == 0, done.stderr
        assert written in done.stdout and "verified: logits as" in done.stdout


def test_a_trained_gpt_and_its_tokenizer_for_transformers(trained: tuple[list[str], str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    workdir = Path(trained[0][-1])
    what = ["--from", "run", "--to", "huggingface", "--input", workdir / "models" / "gpt", "--output", tmp_path / "gpt"]
    done = run("-m", "retro_jax", "convert", *what, "--tokenizer", workdir / "data" / "tokenizer")
    assert done.returncode == 0, done.stderr
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt"), load_tokenizer(workdir / "data" / "tokenizer")
    text = "abba cafe, dead beef; ÄÖ 7"
    assert theirs(text)["input_ids"] == ours.encode_batch([text])[0].tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eod_id)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "gpt")
    assert (config.model_type, config.eos_token_id) == ("gpt2", ours.eod_id)


def test_what_eval_refuses(trained: tuple[list[str], str], tmp_path: Path) -> None:
    arguments, _ = trained
    for extra, told in (
        (["--checkpoint", "5"], "no checkpoint 5"),
        (["--checkpoint", "latets"], "no checkpoint latets"),
        (["--set", "ModelConfig.width=32"], "holds checkpoints trained with ModelConfig.width = 16"),
        (["--workdir", tmp_path / "none"], "train first"),
    ):
        done = run("eval.py", *arguments, *extra)
        assert done.returncode == 2, done.stdout
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_model_is_refused_without_a_stored_config(trained: tuple[list[str], str]) -> None:
    arguments, _ = trained
    workdir = Path(arguments[-1])
    stored = (workdir / "config.gin").read_text()
    (workdir / "config.gin").unlink()
    try:
        done = run("train.py", *arguments, "--set", "ModelConfig.width=32", "--set", "TrainConfig.steps=12")
    finally:
        (workdir / "config.gin").write_text(stored)
    assert done.returncode == 2, done.stdout
    assert "ModelConfig.width=16" in done.stderr
    assert "ModelConfig.width=32" in done.stderr


def test_print_config_and_dry_run_write_nothing(tmp_path: Path) -> None:
    arguments = ["--config", write_config(tmp_path), "--workdir", tmp_path / "run", "--set", "TrainConfig.steps=5"]
    expected = config_text(load_config([tmp_path / "tiny.gin"], ["TrainConfig.steps=5"]))
    printed = run("train.py", *arguments, "--print-config")
    assert (printed.returncode, printed.stdout) == (0, expected)
    dry = run("train.py", *arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.startswith(expected)
    assert "tokenizer to build" in dry.stdout
    assert "128 tokens a step, 640 in all" in dry.stdout
    assert re.search(r"model retro: [\d,]+ parameters\nmodel gpt: [\d,]+ parameters\nmodel gpt_matched: ", dry.stdout)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_retro_from_the_gpt_of_a_run(trained: tuple[list[str], str], tmp_path: Path) -> None:
    arguments, _ = trained
    workdir = Path(arguments[arguments.index("--workdir") + 1])
    mine = [
        *arguments[: arguments.index("--workdir")],
        "--workdir",
        str(tmp_path),
        *arguments[arguments.index("--workdir") + 2 :],
    ]
    mine += ["--set", f"Config.data_dir={workdir / 'data'}", "--set", "TrainConfig.baselines=gpt"]
    dry = run("train.py", *mine, "--set", f"TrainConfig.start_from={workdir / 'models'}", "--dry-run")
    assert dry.returncode == 2 and "holds neither checkpoints/" in dry.stderr
    mine += ["--set", f"TrainConfig.start_from={workdir / 'models' / 'gpt'}"]
    dry = run("train.py", *mine, "--dry-run")
    assert dry.returncode == 0 and f"starts from: {workdir / 'models' / 'gpt'}\n" in dry.stdout, dry.stderr
    done = run("train.py", *mine)
    assert done.returncode == 0 and f"retro: starts from {workdir / 'models' / 'gpt'}\n" in done.stdout, done.stderr


def test_dry_run_of_a_run_that_is_done(trained: tuple[list[str], str]) -> None:
    arguments, _ = trained
    dry = run("train.py", *arguments, "--set", "TrainConfig.steps=10", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "tokenizer built" in dry.stdout
    assert "model retro: step 8 is done, 2 to go" in dry.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_continues(tmp_path: Path, number: signal.Signals, code: int) -> None:
    arguments = ["--config", str(write_config(tmp_path)), "--workdir", str(tmp_path / "run"), "--set", "TrainConfig.baselines=()"]
    command = [sys.executable, "train.py", *arguments, "--set", "TrainConfig.steps=1000000"]
    metrics = tmp_path / "run" / "models" / "retro" / "metrics.jsonl"
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output)
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(120) == code, (tmp_path / "output").read_text()
    told = (tmp_path / "output").read_text()
    stopped = re.search(r"stopped at step (\d+) of 1000000", told)
    assert stopped is not None, told
    assert ("continue with: " in told) == (code == 130)
    step = int(stopped[1])
    assert (tmp_path / "run" / "models" / "retro" / "checkpoints" / str(step)).is_dir()
    done = run("train.py", *arguments, "--set", f"TrainConfig.steps={step + 2}", "--set", "EvalConfig.max_documents=2")
    assert done.returncode == 0, done.stderr
    assert f"continues at step {step} of {step + 2}" in done.stdout
