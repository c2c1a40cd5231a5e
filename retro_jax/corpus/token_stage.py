"""The ``tokens`` stage: every source's documents, split and tokenized, in one token store for each source and split."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from retro_jax.artefact import Artefact, build_artefact, open_artefact
from retro_jax.blocks import Block, block_arrays, keep_blocks_of, run_blocks
from retro_jax.config import SPLITS, CorpusConfig
from retro_jax.corpus.digests import MEMO
from retro_jax.corpus.document import Document
from retro_jax.corpus.document_names import DocumentName, DocumentNamesWriter, encode_names
from retro_jax.corpus.sources import MEGATRON, read_documents, source_fingerprint
from retro_jax.corpus.split import split_of, split_of_text
from retro_jax.corpus.token_store import TokenStore, TokenStoreWriter, token_dtype
from retro_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from retro_jax.corpus.tokenizer_stage import TOKENIZER
from retro_jax.errors import BadInput

TOKENS = "tokens"
# A block ends at CorpusConfig.block_documents documents or here, so that books take no more memory than sentences.
BLOCK_BYTES = 8 * 2**20
FACTS = ("documents", "empty", "text_bytes", "token_bytes")


def build_tokens(config: CorpusConfig, data_dir: Path) -> Artefact:
    """Build or open ``<data_dir>/tokens`` from the sources and ``<data_dir>/tokenizer``.

    Files: ``<i>-<split>.bin`` and ``.idx`` of source i, documents in the source's order, each [BOS] tokens EOD (documents
    of a ``megatron:`` source as they are); beside them the documents' ids and titles (``corpus/document_names.py``). Summary: per
    source the documents read, the empty ones left out, text bytes, and the bytes that the tokens stand for; per source and split
    documents and tokens.

    Raises:
        UserError: a source is missing, empty, or holds what cannot be read or tokenized.
    """
    data_dir = Path(data_dir)
    tokenizer = open_artefact(data_dir / TOKENIZER, TOKENIZER)
    settings = {
        "text_field": config.text_field,
        "split_by": config.split_by,
        "valid_fraction": config.valid_fraction,
        "test_fraction": config.test_fraction,
        "max_documents": config.max_documents,
    }
    inputs = {"tokenizer": tokenizer.fingerprint}
    inputs |= {f"source {i}": source_fingerprint(source, data_dir / MEMO) for i, source in enumerate(config.sources)}

    def make(folder: Path) -> Mapping:
        keep_blocks_of(folder, config.block_documents)
        count = run_blocks(
            folder,
            _tokenize_block,
            _tasks(config, (tokenizer.path, tokenizer.fingerprint)),
            workers=config.workers,
            description="tokens: blocks of documents",
            executor=config.executor,
            describe=_describe,
        )
        return _merge(folder, count, config, load_tokenizer(tokenizer.path))

    return build_artefact(data_dir / TOKENS, kind=TOKENS, settings=settings, inputs=inputs, make=make)


def store_prefix(folder: Path, source: int, split: str) -> Path:
    """Where the ``tokens`` artefact keeps one source's documents of one split."""
    return folder / f"{source}-{split}"


def _tasks(config: CorpusConfig, tokenizer: tuple[Path, str]) -> Iterator[tuple]:
    """Arguments of :func:`_tokenize_block`, block after block, read as they are asked for."""
    for number, source in enumerate(config.sources):
        if source.startswith(MEGATRON):
            prefix = Path(source.removeprefix(MEGATRON))
            last = min(TokenStore(prefix).num_documents, config.max_documents or np.inf)
            for first in range(0, int(last), config.block_documents):
                yield number, config, tokenizer, (prefix, first, min(first + config.block_documents, int(last)))
        else:
            documents = islice(read_documents(source, text_field=config.text_field), config.max_documents)
            for block in _cut(documents, config.block_documents):
                yield number, config, tokenizer, block


def _describe(task: tuple) -> str:
    number, config, _, block = task
    source = f"source {config.sources[number]!r}"
    if isinstance(block, tuple):
        return f"documents {block[1]} to {block[2] - 1} of {source}"
    return f"{len(block)} documents of {source}, {block[0].where!r} to {block[-1].where!r}"


def _cut(documents: Iterator[Document], block_documents: int) -> Iterator[list[Document]]:
    block: list[Document] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if len(block) == block_documents or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _tokenize_block(
    source: int, config: CorpusConfig, tokenizer: tuple[Path, str], block: list[Document] | tuple[Path, int, int]
) -> Block:
    """Tokens of a block's documents in order, their lengths, splits and names, and what was counted (``FACTS``)."""
    model = _tokenizer_of_process(*tokenizer)
    parts = _stored(model, config, *block) if isinstance(block, tuple) else _encoded(model, config, block)
    return {"source": np.array([source], np.int32), **parts}


@functools.lru_cache(maxsize=1)
def _tokenizer_of_process(folder: Path, fingerprint: str) -> Tokenizer:
    if multiprocessing.parent_process() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread in each of the workers
    return load_tokenizer(folder)


def _encoded(model: Tokenizer, config: CorpusConfig, block: list[Document]) -> Block:
    kept = [document for document in block if document.text.strip()]
    rows = model.encode_batch([document.text for document in kept], [document.where for document in kept])
    full = [(row, document) for row, document in zip(rows, kept, strict=True) if len(row)]
    begin = np.asarray([] if model.bos_id is None else [model.bos_id], np.int32)
    tokens = np.concatenate(
        [np.zeros(0, np.int32), *(part for row, _ in full for part in (begin, row, [model.eod_id]))], dtype=np.int32
    )
    splits = [SPLITS.index(split_of_text(document.text, document.group, config)) for _, document in full]
    text_bytes = sum(len(document.text.encode()) for _, document in full)
    token_bytes = int(model.token_bytes()[tokens].sum()) - model.prefix_bytes * len(full)
    names, name_lengths = encode_names([DocumentName(document.id, document.title) for _, document in full])
    return {
        "tokens": tokens.astype(token_dtype(model.vocab_size)),
        "lengths": np.array([len(begin) + len(row) + 1 for row, _ in full], np.int64),
        "splits": np.array(splits, np.uint8),
        "names": names,
        "name_lengths": name_lengths,
        "facts": np.array([len(block), len(block) - len(full), text_bytes, token_bytes], np.int64),
    }


def _stored(model: Tokenizer, config: CorpusConfig, prefix: Path, first: int, last: int) -> Block:
    tokens, lengths = TokenStore(prefix).documents(first, last)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= model.vocab_size)][0]
        raise BadInput(
            f"{prefix} holds token id {wrong}, but the tokenizer has {model.vocab_size} ids; "
            "load the tokenizer that made the store"
        )
    ends = np.cumsum(lengths)
    # As int32, so that the split does not depend on the dtype of the store.
    documents = [tokens[end - n : end].astype("<i4") for end, n in zip(ends, lengths, strict=True)]
    full = np.array([bool((document != model.eod_id).any()) for document in documents], bool)
    token_bytes = int(model.token_bytes()[tokens].sum())
    return {
        "tokens": tokens[np.repeat(full, lengths)].astype(token_dtype(model.vocab_size)),
        "lengths": lengths[full],
        "splits": np.array(
            [SPLITS.index(split_of(d.tobytes(), config)) for d, keep in zip(documents, full, strict=True) if keep], np.uint8
        ),
        "names": np.zeros(0, np.uint8),
        "name_lengths": np.zeros((int(full.sum()), 2), np.int64),
        "facts": np.array([last - first, int((~full).sum()), token_bytes, token_bytes], np.int64),
    }


def _merge(folder: Path, count: int, config: CorpusConfig, model: Tokenizer) -> Mapping:
    """Write the stores from the blocks, in order, and return the summary."""
    summary: dict = {"eod": model.eod_id, "sources": []}
    block = 0
    for number, source in enumerate(config.sources):
        facts, stored = np.zeros(len(FACTS), np.int64), {split: {"documents": 0, "tokens": 0} for split in SPLITS}
        dtype = token_dtype(model.vocab_size)
        with ExitStack() as open_files:
            enter = open_files.enter_context
            writers = {split: enter(TokenStoreWriter(store_prefix(folder, number, split), dtype)) for split in SPLITS}
            names = {split: enter(DocumentNamesWriter(store_prefix(folder, number, split))) for split in SPLITS}
            while block < count and (arrays := block_arrays(folder, block))["source"][0] == number:
                for code, split in enumerate(SPLITS):
                    chosen = arrays["splits"] == code
                    lengths = arrays["lengths"][chosen]
                    writers[split].add(arrays["tokens"][np.repeat(chosen, arrays["lengths"])], lengths)
                    name_bytes = np.repeat(chosen, arrays["name_lengths"].sum(axis=1))
                    names[split].add(arrays["names"][name_bytes], arrays["name_lengths"][chosen])
                    stored[split]["documents"] += len(lengths)
                    stored[split]["tokens"] += int(lengths.sum())
                facts += arrays["facts"]
                block += 1
        if not any(stored[split]["documents"] for split in SPLITS):
            raise BadInput(f"source {source!r} has no text ({facts[1]} empty documents); name one that has, or leave it out")
        named = {name: int(value) for name, value in zip(FACTS, facts, strict=True)}
        summary["sources"].append({"name": source, **named, "splits": stored})
    if not any(entry["splits"]["train"]["documents"] for entry in summary["sources"]):
        raise BadInput(
            "no document falls into the training split; add documents, or lower CorpusConfig.valid_fraction and test_fraction"
        )
    return summary
