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
# Before the names of the facts of what embeds queries.
QUERY = "query_"
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def encoder_facts(config: BertConfig) -> dict[str, Any]:
    """What decides the vectors. Of the model that embeds the database: SHA-256 of its folder's files (16 digits each), the width
    ``dim``, and how texts are read and pooled, with what the folder says in the place of "auto" and None. The same, each name
    with "query_" before it, of what embeds queries, where the config names a model or a prefix for it.

    Raises:
        UserError: a folder lacks a file, or does more after pooling than to make the length 1; or the two models' widths differ.
    """
    assert config.path is not None
    passages = _folder_facts(Path(config.path), config, config.prefix)
    if config.query_path is None and config.query_prefix is None:
        return passages
    query_prefix = config.prefix if config.query_prefix is None else config.query_prefix
    queries = _folder_facts(Path(config.query_path or config.path), config, query_prefix)
    if queries["dim"] != passages["dim"]:
        raise UserError(
            f"BertConfig.query_path={config.query_path!r} gives {queries['dim']} dimensions and path={config.path!r} "
            f"{passages['dim']}; take both from one release"
        )
    return passages | {f"{QUERY}{name}": value for name, value in queries.items()}


def query_facts(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of :func:`encoder_facts` those of what embeds queries, without "query_"; None where the config names none."""
    return {name.removeprefix(QUERY): value for name, value in facts.items() if name.startswith(QUERY)} or None


def same_model(facts: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two encoders have the same files."""
    return all(facts[name] == others[name] for name in ("weights", "model", "tokenizer"))


def _folder_facts(folder: Path, config: BertConfig, prefix: str) -> dict[str, Any]:
    files = {"weights": weight_files(folder), "model": [folder / CONFIG], "tokenizer": [folder / TOKENIZER]}
    theirs, modules = read_json(folder / CONFIG), _modules(folder)
    return {
        **{name: "+".join(digest_file(file)[:16] for file in paths) for name, paths in files.items()},
        "dim": _number(theirs, "hidden_size"),
        "pooling": _pooling(folder, config),
        "normalize": _normalize(modules) if config.normalize == "auto" else config.normalize,
        "max_length": _max_length(folder, config, theirs),
        "prefix": prefix,
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
                f"the encoder's folder {str(folder)!r} has no {name}; give a folder that transformers' save_pretrained wrote"
            )
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        raise UserError(
            f"the encoder's folder {str(folder)!r} has no {WEIGHTS}; load the model with transformers and save it anew"
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


def _modules(folder: Path) -> list[str] | None:
    """What the folder does with a text, in order; None where it does not say. All of it must be something that we compute."""
    if not (folder / MODULES).is_file():
        return None
    kinds = [str(module.get("type")).rsplit(".", 1)[-1] for module in read_json(folder / MODULES)]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise UserError(f"{folder / MODULES} has a module {kind}; only Transformer, Pooling and Normalize can be computed")
    return kinds


def _normalize(modules: list[str] | None) -> str:
    return "yes" if modules is None or "Normalize" in modules else "no"


def _pooling(folder: Path, config: BertConfig) -> str:
    """As the config says, or the folder."""
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
