"""What a run would do, without doing it: its settings, parameters, data stages, steps and tokens."""

from __future__ import annotations

from pathlib import Path

from retro_jax.artefact import open_artefact
from retro_jax.cli import Run
from retro_jax.data.join import row_record, rows_to_join, space_needed
from retro_jax.gin_config import config_text
from retro_jax.model import count_parameters
from retro_jax.prepare import built_stages, stages_of
from retro_jax.retrieval.memory import in_words
from retro_jax.training.train import check_run, model_configs


def describe_run(run: Run) -> str:
    """The resolved config and what would happen with it; nothing is written.

    Raises:
        UserError: the config names baselines that it cannot have or a checkpoint that it cannot start from, or an artefact is
            corrupted.
    """
    check_run(run.config, run.workdir)
    built = built_stages(run.data_dir)
    states = {stage: built.get(stage, "missing") for stage in stages_of(run.config)}
    parts = [
        config_text(run.config),
        f"workdir: {run.workdir} ({'there' if run.workdir.exists() else 'to be made'})",
        "data: " + ", ".join(f"{stage} {'to build' if state == 'missing' else state}" for stage, state in states.items()),
        *_joined(run, states),
        *_models(run, states),
        *([f"starts from: {run.config.training.start_from}"] if run.config.training.start_from else []),
        *_steps(run, states),
    ]
    return "\n".join(parts)


def _vocab_size(run: Run, states: dict[str, str]) -> int | None:
    """None: not known before the tokenizer is loaded."""
    if states["tokenizer"] == "built":
        return int(open_artefact(run.data_dir / "tokenizer", "tokenizer").summary["vocab_size"])
    return run.config.tokenizer.vocab_size if run.config.tokenizer.kind == "train_bpe" else run.config.model.vocab_size


def _joined(run: Run, states: dict[str, str]) -> list[str]:
    vocab = _vocab_size(run, states)
    if run.config.data.rows == "gathered" or states["joined"] == "built" or vocab is None:
        return []
    record, rows = row_record(run.config, vocab), rows_to_join(run.config)
    return [f"joined: {rows:,} training rows of {record.dtype.itemsize:,} bytes, at most {in_words(space_needed(rows, record))}"]


def _models(run: Run, states: dict[str, str]) -> list[str]:
    vocab = _vocab_size(run, states)
    if vocab is None:
        path = run.config.tokenizer.path
        return [f"parameters: known when the tokenizer {path} is loaded (run prepare), or with ModelConfig.vocab_size"]
    models = model_configs(run.config, vocab)
    return [f"model {name}: {count_parameters(model):,} parameters" for name, model in models.items()]


def _steps(run: Run, states: dict[str, str]) -> list[str]:
    data, training = run.config.data, run.config.training
    tokens = data.seq_len * data.batch_size
    lines = [
        f"steps: {training.steps:,} a model, each {data.batch_size} rows of {data.seq_len} tokens: "
        f"{tokens:,} tokens a step, {tokens * training.steps:,} in all (padding counted)"
    ]
    if states["chunks"] == "built":
        train = open_artefact(run.data_dir / "chunks", "chunks").summary["splits"]["train"]
        epochs = tokens * training.steps / (train["chunks"] * run.config.chunks.chunk_len)
        lines.append(f"training text: {train['tokens']:,} tokens in {train['chunks']:,} chunks, read {epochs:.2f} times")
    done = {folder.parent.name: _last(folder) for folder in sorted((run.workdir / "models").glob("*/checkpoints"))}
    return lines + [
        f"model {name}: step {step:,} is done, {max(training.steps - step, 0):,} to go" for name, step in done.items()
    ]


def _last(checkpoints: Path) -> int:
    return max((int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()), default=0)
