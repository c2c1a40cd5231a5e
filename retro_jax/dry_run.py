"""What a run would do, without doing it: its settings, parameters, data stages, steps and tokens."""

from __future__ import annotations

from pathlib import Path

from retro_jax.artefact import open_artefact
from retro_jax.cli import Run
from retro_jax.gin_config import config_text
from retro_jax.model import count_parameters
from retro_jax.prepare import built_stages, stages_of
from retro_jax.training.train import check_run, model_configs


def describe_run(run: Run) -> str:
    """The resolved config and what would happen with it; nothing is written.

    Raises:
        UserError: the config names baselines that it cannot have or a checkpoint that it cannot start from, or an artefact is
            corrupted.
    """
    check_run(run.config, run.workdir)
    states = built_stages(run.data_dir)
    parts = [
        config_text(run.config),
        f"workdir: {run.workdir} ({'there' if run.workdir.exists() else 'to be made'})",
        "data: "
        + ", ".join(f"{stage} {states.get(stage, 'missing').replace('missing', 'to build')}" for stage in stages_of(run.config)),
        *_models(run, states),
        *([f"starts from: {run.config.training.start_from}"] if run.config.training.start_from else []),
        *_steps(run, states),
    ]
    return "\n".join(parts)


def _models(run: Run, states: dict[str, str]) -> list[str]:
    config, tokenizer = run.config, run.config.tokenizer
    if states["tokenizer"] == "built":
        vocab = int(open_artefact(run.data_dir / "tokenizer", "tokenizer").summary["vocab_size"])
    elif tokenizer.kind == "train_bpe":
        vocab = tokenizer.vocab_size
    elif config.model.vocab_size is not None:
        vocab = config.model.vocab_size
    else:
        return [f"parameters: known when the tokenizer {tokenizer.path} is loaded (run prepare), or with ModelConfig.vocab_size"]
    models = model_configs(config, vocab)
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
