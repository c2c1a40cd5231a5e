"""How many bytes of text each token of a ``tokenizer.json`` stands for."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import numpy as np

from retro_jax.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE, to its byte (GPT-2, ``bytes_to_unicode``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def tokenizer_json_bytes(spec: dict, vocab_size: int) -> np.ndarray:
    """Bytes of each token, int32 ``[vocab_size]``, from the parsed ``tokenizer.json``; 0 for special tokens.

    Raises:
        UserError: it is neither byte-level nor of sentencepiece's kind, so that its tokens do not tell their bytes.
    """
    count = _counter(spec)
    counts = np.zeros(vocab_size, np.int32)
    for token, number in _vocabulary(spec["model"]):
        counts[number] = count(token)
    for added in spec.get("added_tokens", []):
        counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return counts


def _counter(spec: dict) -> Callable[[str], int]:
    parts = {part["type"]: part for name in ("normalizer", "pre_tokenizer") for part in _flat(spec.get(name))}
    suffix = spec["model"].get("end_of_word_suffix") or spec["model"].get("continuing_subword_prefix")
    if spec["model"]["type"] in ("BPE", "Unigram") and not suffix:
        if "ByteLevel" in parts:
            return len
        if "Metaspace" in parts or parts.get("Replace", {}).get("content") == "\u2581":
            fallback = spec["model"].get("byte_fallback", False)
            is_byte = _BYTE_TOKEN.fullmatch if fallback else lambda token: None
            return lambda token: 1 if is_byte(token) else len(token.replace("\u2581", " ").encode())
    raise UserError(
        f"the tokenizer.json is a {spec['model']['type']} that is neither byte-level nor of sentencepiece's kind, "
        "so the bytes of its tokens cannot be told; load another, or train one with TokenizerConfig.kind='train_bpe'"
    )


def _flat(part: dict | None) -> Iterator[dict]:
    if part is None:
        return
    inner = part.get("normalizers") or part.get("pretokenizers")
    if inner:
        for one in inner:
            yield from _flat(one)
    else:
        yield part


def _vocabulary(model: dict) -> Iterator[tuple[str, int]]:
    if isinstance(model["vocab"], dict):
        yield from model["vocab"].items()
    else:  # Unigram: [token, score] in order of ids
        yield from ((token, number) for number, (token, _) in enumerate(model["vocab"]))
