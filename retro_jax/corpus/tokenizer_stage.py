"""The ``tokenizer`` stage: train a byte-level BPE, or take a tokenizer that exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers

from retro_jax.artefact import Artefact, build_artefact, write_bytes, write_text
from retro_jax.config import CorpusConfig, TokenizerConfig
from retro_jax.corpus.digests import MEMO, digest_file
from retro_jax.corpus.sources import MEGATRON, read_documents, source_fingerprint
from retro_jax.corpus.split import split_of_text
from retro_jax.corpus.tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_gpt2,
    load_sentencepiece,
    load_tokenizer_json,
)
from retro_jax.errors import BadInput, UserError
from retro_jax.progress import progress_bar

TOKENIZER = "tokenizer"
BOS, EOD = "<|bos|>", "<|endoftext|>"
BOS_ID, EOD_ID = 0, 1
# Tried in this order where nothing says which token it is.
KNOWN_BOS = ("<|begin_of_text|>", "<|startoftext|>", "<bos>", "<s>", "[BOS]", BOS)
KNOWN_EOD = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]", "<eod>", "<|eod|>")
FILES = {
    "tokenizer_json": ("tokenizer.json",),
    "sentencepiece": ("tokenizer.model", "spiece.model"),
    "gpt2": ("vocab.json", "encoder.json"),
}
MERGES = ("merges.txt", "vocab.bpe")


def build_tokenizer(config: TokenizerConfig, corpus: CorpusConfig, data_dir: Path) -> Artefact:
    """Build or open ``<data_dir>/tokenizer``: trained on documents of the training split alone, or copied from a file.

    Summary: ``vocab_size``, ``bos`` and ``eod`` (ids), and for a trained one the bytes and documents it has seen.

    Raises:
        UserError: a file is missing or of another kind, a special token is not known, or there is no text to train on.
    """
    path = Path(data_dir) / TOKENIZER
    if config.kind == "train_bpe":
        return _build_trained(path, config, corpus)
    return _build_loaded(path, config)


def _build_trained(path: Path, config: TokenizerConfig, corpus: CorpusConfig) -> Artefact:
    for source in corpus.sources:
        if source.startswith(MEGATRON):
            raise UserError(
                f"source {source!r} holds tokens of another tokenizer, so none can be trained for it; "
                "load that one with TokenizerConfig.kind and path"
            )
    settings = {
        "kind": config.kind,
        "bos_id": BOS_ID,
        "eod_id": EOD_ID,
        "vocab_size": config.vocab_size,
        "train_bytes": config.train_bytes,
        "text_field": corpus.text_field,
        "split_by": corpus.split_by,
        "valid_fraction": corpus.valid_fraction,
        "test_fraction": corpus.test_fraction,
        "max_documents": corpus.max_documents,
    }
    inputs = {f"source {i}": source_fingerprint(source, path.parent / MEMO) for i, source in enumerate(corpus.sources)}

    def make(folder: Path) -> Mapping:
        counts = {"train_bytes": 0, "train_documents": 0}
        tokenizer = _train(config, corpus, counts)
        write_text(folder / "tokenizer.json", tokenizer.to_str())
        return {"vocab_size": tokenizer.get_vocab_size(), "bos": BOS_ID, "eod": EOD_ID, **counts}

    return build_artefact(path, kind=TOKENIZER, settings=settings, inputs=inputs, make=make)


def _train(config: TokenizerConfig, corpus: CorpusConfig, counts: dict[str, int]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[BOS, EOD],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with progress_bar("tokenizer: documents read") as bar:

        def texts() -> Iterator[str]:
            for text, size in training_texts(corpus, config.train_bytes):
                counts["train_bytes"] += size
                counts["train_documents"] += 1
                bar.advance()
                yield text

        tokenizer.train_from_iterator(texts(), trainer)
    if not counts["train_bytes"]:
        raise BadInput(
            f"sources {', '.join(corpus.sources)} have no text in the training split to train a tokenizer on; "
            "add documents, or lower CorpusConfig.valid_fraction and test_fraction"
        )
    return tokenizer


def training_texts(corpus: CorpusConfig, max_bytes: int) -> Iterator[tuple[str, int]]:
    """Texts of training documents with their UTF-8 bytes, at most ``max_bytes`` together, an equal share from each source as
    long as it lasts; the last text is cut."""
    streams = [(0, number, _training_documents(source, corpus)) for number, source in enumerate(corpus.sources)]
    left = max_bytes
    while streams and left > 0:
        taken, number, stream = min(streams, key=lambda entry: entry[:2])
        streams = [entry for entry in streams if entry[1] != number]
        text = next(stream, None)
        if text is None:
            continue
        data = text.encode()
        if len(data) > left:
            text = data[:left].decode(errors="ignore")
        size = min(len(data), left)
        left -= size
        streams.append((taken + size, number, stream))
        yield text, size


def _training_documents(source: str, corpus: CorpusConfig) -> Iterator[str]:
    for number, document in enumerate(read_documents(source, text_field=corpus.text_field)):
        if corpus.max_documents is not None and number >= corpus.max_documents:
            return
        if document.text and split_of_text(document.text, document.group, corpus) == "train":
            yield document.text


def _build_loaded(path: Path, config: TokenizerConfig) -> Artefact:
    files = _files_of(config)
    if config.kind == "sentencepiece":
        pieces = load_sentencepiece(files["tokenizer.model"])
        known = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
        bos, eos = (pieces.id_to_piece(i) if i >= 0 else None for i in (pieces.bos_id(), pieces.eos_id()))
        bos_id, eod_id = _special_ids(config, known, (bos, eos), (), ())
        tokenizer: Tokenizer = SentencePieceTokenizer(pieces, bos_id, eod_id)
    else:
        model = load_gpt2(*files.values()) if config.kind == "gpt2" else load_tokenizer_json(files["tokenizer.json"])
        known = model.get_vocab(with_added_tokens=True)
        if config.kind == "gpt2":
            bos_id, eod_id = _special_ids(config, known, (None, None), (), KNOWN_EOD)
        else:
            told = _told_beside(files["tokenizer.json"].with_name("tokenizer_config.json"))
            bos_id, eod_id = _special_ids(config, known, told, KNOWN_BOS, KNOWN_EOD)
        tokenizer = JsonTokenizer(model, bos_id, eod_id)

    def make(folder: Path) -> Mapping:
        for name, file in files.items():
            write_bytes(folder / name, file.read_bytes())
        return {"vocab_size": tokenizer.vocab_size, "bos": bos_id, "eod": eod_id}

    settings = {"kind": config.kind, "bos_id": bos_id, "eod_id": eod_id}
    inputs = {name: digest_file(file)[:16] for name, file in files.items()}
    return build_artefact(path, kind=TOKENIZER, settings=settings, inputs=inputs, make=make)


def _files_of(config: TokenizerConfig) -> dict[str, Path]:
    """The tokenizer's files, by their name in the artefact."""
    assert config.path is not None
    path = Path(config.path)
    if path.is_dir():
        path = _first_of(path, FILES[config.kind], config)
    if not path.is_file():
        raise UserError(
            f"TokenizerConfig.path={config.path!r} is no existing file; give the path of {' or '.join(FILES[config.kind])}"
        )
    files = {FILES[config.kind][0]: path}
    if config.kind == "gpt2":
        merges = Path(config.merges) if config.merges else _first_of(path.parent, MERGES, config)
        if not merges.is_file():
            raise UserError(
                f"TokenizerConfig.merges={config.merges!r} is no existing file; give the path of {' or '.join(MERGES)}"
            )
        files[MERGES[0]] = merges
    return files


def _first_of(folder: Path, names: Sequence[str], config: TokenizerConfig) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no {' or '.join(names)}, which TokenizerConfig.kind={config.kind!r} needs; name the file")


def _told_beside(path: Path) -> tuple[str | None, str | None]:
    """BOS and EOS as Hugging Face's ``tokenizer_config.json`` names them; a BOS that is the EOS is none of its own."""
    if not path.is_file():
        return None, None
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error}); repair or remove it") from None
    bos, eos = (
        value.get("content") if isinstance(value, dict) else value for value in (fields.get("bos_token"), fields.get("eos_token"))
    )
    return (None if bos == eos else bos), eos


def _special_ids(
    config: TokenizerConfig,
    known: Mapping[str, int],
    told: tuple[str | None, str | None],
    usual_bos: Sequence[str],
    usual_eod: Sequence[str],
) -> tuple[int | None, int]:
    """Ids of BOS (or None) and EOD: as the config says, as the tokenizer tells, or by their usual names."""
    for name, token in (("bos", config.bos), ("eod", config.eod)):
        if token and token not in known:
            raise UserError(
                f"TokenizerConfig.{name}={token!r} is not in the tokenizer's vocabulary of {len(known)}; {_candidates(known)}"
            )
    eod = config.eod or told[1] or next((token for token in usual_eod if token in known), None)
    if eod is None or eod not in known:
        raise UserError(f"the tokenizer does not tell which token ends a document; set TokenizerConfig.eod: {_candidates(known)}")
    bos = config.bos
    if bos is None:
        bos = told[0] or next((token for token in usual_bos if token in known and token != eod), None)
    return (known.get(bos) if bos else None), known[eod]


def _candidates(known: Mapping[str, int]) -> str:
    marked = sorted(token for token in known if re.fullmatch(r"<(?!0x)\S+>|\[\w+\]", token))
    return f"tokens that look special are {', '.join(map(repr, marked[:12])) or 'none'}"
