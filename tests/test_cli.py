"""Errors as one line and an exit code, and the config that a workdir stores."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retro_jax.cli import (
    FREE_CLASSES,
    FREE_FIELDS,
    Run,
    argument_parser,
    exit_code,
    main,
    refuse_other_config,
    run_of,
    same_arguments,
    store_config,
)
from retro_jax.config import Config
from retro_jax.errors import UserError
from retro_jax.gin_config import config_text, load_config

REPOSITORY = Path(__file__).resolve().parent.parent


def raiser(error: BaseException) -> object:
    def program() -> None:
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("corpus.jsonl is empty; name another"), 2, "error: corpus.jsonl is empty; name another\n"),
        (OSError(errno.ENOSPC, "No space left", "runs/a/b"), 2, "error: the disk is full (runs/a/b); free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: no permission (/x)"),
        (KeyboardInterrupt(), 130, "interrupted; what is finished is kept, continue with: "),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RETRO_JAX_TRACEBACK", raising=False)
    assert exit_code(raiser(error)) == code  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.strip().count("\n") == 0
    assert captured.out == ""


def test_our_own_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(raiser(ZeroDivisionError()))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="strange"):
        exit_code(raiser(OSError(errno.EIO, "strange")))  # type: ignore[arg-type]


def test_traceback_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRO_JAX_TRACEBACK", "1")
    assert exit_code(raiser(UserError("mend it"))) == 2  # type: ignore[arg-type]
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("error: mend it\n")


def test_unknown_config_lists_those_there_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["prepare", "--config", "quickstrat", "--workdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config file 'quickstrat' is not there; did you mean quickstart? configs/ has ")
    assert "wiki_small" in error
    assert not (tmp_path / "run").exists()


def test_a_file_as_workdir(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert main(["prepare", "--config", "quickstart", "--workdir", str(tmp_path / "run")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_default_workdir_and_overrides() -> None:
    parser = argument_parser("program", "does it", "program --config quickstart")
    run = run_of(parser.parse_args(["--config", "quickstart", "--set", "TrainConfig.steps=3", "--set", "DataConfig.seed=4"]))
    assert run.workdir == Path("runs/quickstart")
    assert run.data_dir == Path("runs/quickstart/data")
    assert (run.config.training.steps, run.config.data.seed) == (3, 4)


def test_the_same_arguments_again() -> None:
    parser = argument_parser("program", "does it", "program --config quickstart")
    arguments = parser.parse_args(["--config", "quickstart", "--set", "TrainConfig.steps=3", "--set", "CorpusConfig.sources=a b"])
    run = run_of(arguments)
    again = "--config quickstart --workdir runs/quickstart --set "
    assert same_arguments(run, arguments) == again + "TrainConfig.steps=3 --set 'CorpusConfig.sources=a b'"
    longer = same_arguments(run, arguments, "TrainConfig.steps=6")
    assert longer == again + "'CorpusConfig.sources=a b' --set TrainConfig.steps=6"


def stored(workdir: Path, *overrides: str, checkpoints: bool = False) -> Run:
    """A workdir in which an earlier run stored its config, and perhaps checkpoints."""
    run = Run(load_config([], list(overrides)), workdir)
    refuse_other_config(run)
    store_config(run)
    if checkpoints:
        (workdir / "models" / "retro" / "checkpoints" / "10").mkdir(parents=True)
    return run


def test_a_changed_config_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path / "run")
    assert capsys.readouterr().out == ""
    stored(tmp_path / "run", "ModelConfig.width=96", "ModelConfig.retro=None")
    lines = capsys.readouterr().out.splitlines()
    assert f"ModelConfig.width was 768 in the last run in {tmp_path / 'run'}, now it is 96" in lines
    assert any(line.startswith("RetroConfig.gate was 1.0") and line.endswith("now it is unset") for line in lines)
    assert load_config([tmp_path / "run" / "config.gin"]).model.width == 96


@pytest.mark.parametrize(
    "change", ["ModelConfig.width=96", "RetroConfig.gate=0.5", "DataConfig.batch_size=4", "ModelConfig.retro=None"]
)
def test_settings_of_checkpoints_may_not_change(tmp_path: Path, change: str) -> None:
    run = stored(tmp_path / "run", checkpoints=True)
    with pytest.raises(UserError, match=r"holds checkpoints trained with .* use another --workdir, or delete .*models"):
        refuse_other_config(Run(load_config([], [change]), run.workdir))


def test_a_setting_that_an_older_version_did_not_know_had_its_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stored(tmp_path / "run", checkpoints=True)
    path = run.workdir / "config.gin"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "DataConfig.max_overlap" not in line))
    refuse_other_config(run)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"DataConfig.max_overlap = None, now DataConfig.max_overlap = 0.5"):
        refuse_other_config(Run(load_config([], ["DataConfig.max_overlap=0.5"]), run.workdir))


def test_settings_that_may_change_while_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stored(tmp_path / "run", checkpoints=True)
    refuse_other_config(run)
    assert capsys.readouterr().out == ""
    refuse_other_config(
        Run(load_config([], ["TrainConfig.log_every=1", "EvalConfig.seed=3", "DataConfig.prefetch=9"]), run.workdir)
    )
    assert capsys.readouterr().out == f"DataConfig.prefetch was 4 in the last run in {tmp_path / 'run'}, now it is 9\n"


def test_free_settings_exist() -> None:
    text = config_text(Config())
    for name in (*(f"{name} = " for name in FREE_FIELDS), *(f"\n{name}." for name in FREE_CLASSES)):
        assert name in text


def test_help_says_how_to_begin() -> None:
    for program in (["-m", "retro_jax", "--help"], ["-m", "retro_jax", "prepare", "--help"]):
        done = subprocess.run([sys.executable, *program], cwd=REPOSITORY, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        assert "prepare" in done.stdout
        assert "example" in done.stdout or "train.py --help" in done.stdout


def test_interrupt_says_how_to_continue(tmp_path: Path) -> None:
    program = (
        "import sys, os, signal; from retro_jax.cli import exit_code\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it, and so its children
        "sys.exit(exit_code(lambda: os.kill(os.getpid(), signal.SIGINT)))"
    )
    done = subprocess.run([sys.executable, "-c", program, "a b"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 130
    assert "continue with: " in done.stderr
    assert "'a b'" in done.stderr
