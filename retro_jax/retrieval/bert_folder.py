"""A sentence encoder's folder: its files, and what it says of pooling and length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_jax.config import BertConfig
from retro_jax.corpus.digests import digest_file
from retro_jax.errors import UserError

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "*.safetensors"
# What sentence-transformers keeps beside a model: its modules, how tokens are pooled, how many are read.
MODULES, POOLING, LENGTH = "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def folder_facts(config: BertConfig) -> dict[str, Any]:
    """What decides the vectors: SHA-256 of the folder's files (16 digits each), the width ``dim``, and how texts are read and
    pooled, with what the folder says in the place of "auto" and None.

    Raises:
        UserError: the folder lacks a file, or does more after pooling than to make the length 1.
    """
    assert config.path is not None
    folder = Path(config.path)
    files = {"weights": weight_files(folder), "model": [folder / CONFIG], "tokenizer": [folder / TOKENIZER]}
    theirs = read_json(folder / CONFIG)
    return {
        **{name: "+".join(digest_file(file)[:16] for file in paths) for name, paths in files.items()},
        "dim": _number(theirs, "hidden_size"),
        "pooling": _pooling(folder, config),
        "max_length": _max_length(folder, config, theirs),
        "prefix": config.prefix,
        "precision": config.precision,
    }


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights.

    Raises:
        UserError: there are none, or the folder lacks the model's settings or its tokenizer.
    """
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise UserError(
                f"BertConfig.path={str(folder)!r} has no {name}; give a folder that transformers' save_pretrained wrote"
            )
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        raise UserError(
            f"BertConfig.path={str(folder)!r} has no {WEIGHTS}; load the model with transformers and save it with save_pretrained"
        )
    return files


def read_json(path: Path) -> Any:
    """What a file of the folder holds; UserError if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); load the model's folder anew") from None


def _number(theirs: Mapping[str, Any], name: str) -> int:
    if not isinstance(value := theirs.get(name), int):
        raise UserError(f"config.json has {name}={value!r}; an encoder of BERT's form has a whole number there")
    return value


def _pooling(folder: Path, config: BertConfig) -> str:
    """As the config says, or the folder; what the folder does after pooling must be nothing but to make the length 1."""
    if (folder / MODULES).is_file():
        for module in read_json(folder / MODULES):
            if (kind := str(module.get("type")).rsplit(".", 1)[-1]) not in ("Transformer", "Pooling", "Normalize"):
                raise UserError(
                    f"{folder / MODULES} has a module {kind}; only Transformer, Pooling and Normalize can be computed"
                )
    if config.pooling != "auto":
        return config.pooling
    if not (folder / POOLING).is_file():
        return "mean"
    modes = [name for name, on in read_json(folder / POOLING).items() if name.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UserError(
            f"{folder / POOLING} asks for {' and '.join(modes) or 'no pooling'}; set BertConfig.pooling to 'mean' or 'cls'"
        )
    return POOLINGS[modes[0]]


def _max_length(folder: Path, config: BertConfig, theirs: Mapping[str, Any]) -> int:
    positions = _number(theirs, "max_position_embeddings")
    if config.max_length is not None:
        if config.max_length > positions:
            raise UserError(f"BertConfig.max_length={config.max_length} is above the model's {positions} positions; lower it")
        return config.max_length
    told = read_json(folder / LENGTH).get("max_seq_length") if (folder / LENGTH).is_file() else None
    return min(told or positions, positions)
