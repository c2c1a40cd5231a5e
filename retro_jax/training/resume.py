"""Whether a checkpoint may be continued with the settings of now, and what is told about those that differ."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from retro_jax.config import Config, DataConfig, ModelConfig, resolved
from retro_jax.corpus.tokenizer_stage import TOKENIZER
from retro_jax.errors import UserError
from retro_jax.field_types import field_hints, nested_config
from retro_jax.training.checkpoint import About

# How the same numbers are computed or read: these may differ between two parts of a run.
FREE = {("ModelConfig", name) for name in ("implementation", "recompute", "recompute_names")} | {("EncoderConfig", "division")}
FREE |= {("DataConfig", name) for name in ("rows", "workers", "prefetch")}
FREE |= {("TrainConfig", name) for name in ("steps", "neighbour_capacity")}
FREE |= {("TrainConfig", name) for name in ("baselines", "log_every", "checkpoint_every", "keep", "valid_every", "valid_batches")}
TOLD = ("optimizer", "training")


def say_what_changed(about: About, config: Config, model: ModelConfig, path: Path) -> None:
    """Refuse a checkpoint of another model or of other batches; print the settings of training that are new.

    Raises:
        UserError: the model or the batches differ; the first setting that does is named.
    """
    refused = differences(ModelConfig, about.model, resolved(model))
    refused += differences(DataConfig, about.settings["data"], resolved(config.data))
    for name, old, new in refused:
        raise UserError(
            f"the checkpoint {path} was trained with {name}={old!r}, now {name}={new!r} is asked for; "
            "use the old value, or another --workdir"
        )
    for part in TOLD:
        told = differences(type(getattr(config, part)), about.settings[part], resolved(getattr(config, part)))
        for name, old, new in told:
            print(f"{name} was {old!r} up to step {about.step}, now it is {new!r}", flush=True)
    before, now = about.settings["training"]["steps"], config.training.steps
    if before != now:
        schedule = " (the cosine schedule now ends there)" if config.optimizer.schedule == "cosine" else ""
        print(f"TrainConfig.steps was {before}, now the run goes on to {now}{schedule}", flush=True)


def refuse_other_data(about: About, data: Mapping[str, str], path: Path) -> None:
    """Refuse to go on with batches that are read from other artefacts.

    Raises:
        UserError: the first artefact that differs is named.
    """
    for name, now in data.items():
        if name == TOKENIZER and name not in about.data:
            continue  # a checkpoint of 0.1.0, whose tokens tell
        if about.data.get(name) != now:
            raise UserError(
                f"the checkpoint {path} was trained on {name} with fingerprint {about.data.get(name)}, now they have {now}; "
                "restore the old data, or use another --workdir"
            )


def differences(config_class: type, old: dict, new: dict, free: Collection[tuple[str, str]] = FREE) -> list[tuple[str, Any, Any]]:
    """Settings that differ, as (Class.field, old, new), in the order of the class; those that are ``free`` are left out. What
    an older version did not know yet had its default."""
    old, new = json.loads(json.dumps({**resolved(config_class()), **old})), json.loads(json.dumps(new))
    found: list[tuple[str, Any, Any]] = []
    for name, hint in field_hints(config_class).items():
        before, after = old.get(name), new.get(name)
        nested, _ = nested_config(hint)
        if nested is not None and isinstance(before, dict) and isinstance(after, dict):
            found += differences(nested, before, after, free)
        elif before != after and (config_class.__name__, name) not in free:
            found.append((f"{config_class.__name__}.{name}", before, after))
    return found
