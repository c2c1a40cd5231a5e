"""What stands beside a model's weights for transformers: the tokenizer, and which tokens begin and end a text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from retro_jax.artefact import open_artefact
from retro_jax.corpus.tokenizer import load_tokenizer

CLASSES = {
    "train_bpe": "PreTrainedTokenizerFast",
    "tokenizer_json": "PreTrainedTokenizerFast",
    "gpt2": "GPT2Tokenizer",
    "sentencepiece": "LlamaTokenizer",
}
CONFIG, TOKENIZER_CONFIG, GENERATION_CONFIG = "config.json", "tokenizer_config.json", "generation_config.json"
TOKENIZER = "tokenizer.json"


def add_tokenizer(artefact_folder: Path, folder: Path) -> None:
    """Put a run's tokenizer (its artefact, ``<data>/tokenizer``) beside a model in Hugging Face's format.

    Raises:
        UserError: the folder is no finished tokenizer.
    """
    artefact, tokenizer = open_artefact(artefact_folder, "tokenizer"), load_tokenizer(artefact_folder)
    for name in artefact.manifest["files"]:
        shutil.copyfile(artefact.path / name, folder / name)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id}
    known = {name: number for name, number in ids.items() if number is not None}
    words = {name: tokenizer.token(number) for name, number in known.items()}
    numbers = {f"{name}_id": number for name, number in known.items()}
    _write(folder / TOKENIZER_CONFIG, {"tokenizer_class": CLASSES[artefact.settings["kind"]], **words})
    _write(folder / GENERATION_CONFIG, numbers)
    _write(folder / CONFIG, {**json.loads((folder / CONFIG).read_text()), **numbers})


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
