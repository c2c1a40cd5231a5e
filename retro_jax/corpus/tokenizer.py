"""Text to token ids and back, with what bits per byte needs: the bytes that each token stands for."""

from __future__ import annotations

import contextlib
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from retro_jax.artefact import open_artefact
from retro_jax.corpus.token_bytes import byte_alphabet, tokenizer_json_bytes
from retro_jax.errors import BadInput, UserError

UNKNOWN_MEND = (
    "take a byte-level tokenizer (TokenizerConfig.kind='train_bpe') or one with byte fallback, or leave the document out"
)
# A library's encodings are about a hundred times as large as their text: only so much text is encoded at once.
BATCH_CHARACTERS = 2**20


class Tokenizer(ABC):
    """A loaded tokenizer.

    Attributes:
        vocab_size: ids are below it.
        bos_id: put before each document, or None.
        eod_id: put after each document.
        prefix_bytes: bytes that ``encode_batch`` puts before a text (1: sentencepiece's dummy space), which are in the sum
            of :meth:`token_bytes` over a document, but not in its text.
    """

    vocab_size: int
    bos_id: int | None
    eod_id: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        """The ids of each text, int32, without BOS and EOD. Special tokens that a text spells out are text.

        Args:
            texts: the texts.
            where: what to call each in a message ("wiki.jsonl line 17").

        Raises:
            UserError: the tokenizer has no token for a piece of a text; it is named.
        """

    @abstractmethod
    def decode_batch(self, ids: Sequence[np.ndarray]) -> list[str]:
        """The text of each row of ids; special tokens are dropped, bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 text that each token stands for, int32 ``[vocab_size]``; 0 for special tokens.

        Summed over a document it is the length of its text in UTF-8 plus ``prefix_bytes``, for a tokenizer that does not
        change the text (normalization does; sentencepiece takes U+2581 for a space).
        """

    @abstractmethod
    def token(self, number: int) -> str:
        """How the vocabulary spells a token."""

    @functools.cached_property
    def prefix_bytes(self) -> int:
        """See the class."""
        for text in ("a", *(self.decode_batch([np.array([token])])[0] for token in range(self.vocab_size))):
            with contextlib.suppress(UserError):  # a vocabulary without Latin letters: try its own
                if text.isalpha():
                    return int(self.token_bytes()[self.encode_batch([text])[0]].sum()) - len(text.encode())
        raise UserError(
            "the tokenizer cannot encode a single letter; load another, or train one with TokenizerConfig.kind='train_bpe'"
        )

    def _drop_specials(self, ids: Sequence[np.ndarray]) -> list[list[int]]:
        special = {self.bos_id, self.eod_id}
        return [[token for token in np.asarray(row).tolist() if token not in special] for row in ids]


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of Hugging Face's ``tokenizers``: byte-level BPE, or sentencepiece's kind converted."""

    def __init__(self, model: tokenizers.Tokenizer, bos_id: int | None, eod_id: int) -> None:
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        if getattr(model.model, "dropout", None):
            model.model.dropout = None
        self._model = model
        self.bos_id, self.eod_id = bos_id, eod_id
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
        self._bytes = tokenizer_json_bytes(json.loads(model.to_str()), self.vocab_size)
        self._unknown_id, self._droppable = _ways_to_lose_text(model)
        self._bytes[[token for token in (bos_id, eod_id, self._unknown_id) if token is not None]] = 0

    def encode_batch(self, texts: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        if self._droppable:
            self._check_alphabet(texts, where)
        rows: list[np.ndarray] = []
        for batch in _batches(texts):
            encodings = self._model.encode_batch_fast(batch, add_special_tokens=False)
            rows += [np.array(encoding.ids, np.int32) for encoding in encodings]
        if self._unknown_id is not None:
            for number, row in enumerate(rows):
                if (row == self._unknown_id).any():
                    position = int(np.argmax(row == self._unknown_id))
                    start, end = self._model.encode(texts[number], add_special_tokens=False).offsets[position]
                    raise _unknown_error(texts[number][start:end], number, where)
        return rows

    def decode_batch(self, ids: Sequence[np.ndarray]) -> list[str]:
        return self._model.decode_batch(self._drop_specials(ids), skip_special_tokens=True)

    def token(self, number: int) -> str:
        return str(self._model.id_to_token(number))

    def token_bytes(self) -> np.ndarray:
        return self._bytes

    def _check_alphabet(self, texts: Sequence[str], where: Sequence[str] | None) -> None:
        """A BPE without an unknown token drops the characters that it does not know."""
        for number, text in enumerate(texts):
            changed = self._model.normalizer.normalize_str(text) if self._model.normalizer else text
            pieces = self._model.pre_tokenizer.pre_tokenize_str(changed) if self._model.pre_tokenizer else [(changed, (0, 0))]
            for piece, _ in pieces:
                if any(self._model.token_to_id(character) is None for character in piece):
                    raise _unknown_error(_spelled(piece), number, where)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece ``.model``, BPE or unigram."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor, bos_id: int | None, eod_id: int) -> None:
        self._model = model
        self.bos_id, self.eod_id = bos_id, eod_id
        self.vocab_size = self._model.get_piece_size()

    def encode_batch(self, texts: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        unknown = self._model.unk_id()
        rows = []
        for number, text in enumerate(texts):
            row = np.array(self._model.encode(text), np.int32)
            if (row == unknown).any():
                piece = self._model.encode(text, out_type=str)[int(np.argmax(row == unknown))]
                raise _unknown_error(piece.replace("\u2581", " "), number, where)
            rows.append(row)
        return rows

    def decode_batch(self, ids: Sequence[np.ndarray]) -> list[str]:
        return self._model.decode(self._drop_specials(ids)) if len(ids) else []

    def token(self, number: int) -> str:
        return self._model.id_to_piece(number)

    def token_bytes(self) -> np.ndarray:
        model, counts = self._model, np.zeros(self.vocab_size, np.int32)
        for token in range(self.vocab_size):
            if model.is_byte(token):
                counts[token] = 1
            elif not (model.is_control(token) or model.is_unknown(token) or model.is_unused(token)):
                counts[token] = len(model.id_to_piece(token).replace("\u2581", " ").encode())
        for special in (self.bos_id, self.eod_id):
            if special is not None:
                counts[special] = 0
        return counts


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a finished ``tokenizer`` artefact.

    Raises:
        UserError: the folder is no finished tokenizer.
    """
    artefact = open_artefact(Path(folder), "tokenizer")
    bos_id, eod_id = artefact.settings["bos_id"], artefact.settings["eod_id"]
    if artefact.settings["kind"] == "sentencepiece":
        return SentencePieceTokenizer(load_sentencepiece(artefact.path / "tokenizer.model"), bos_id, eod_id)
    if artefact.settings["kind"] == "gpt2":
        return JsonTokenizer(load_gpt2(artefact.path / "vocab.json", artefact.path / "merges.txt"), bos_id, eod_id)
    return JsonTokenizer(load_tokenizer_json(artefact.path / "tokenizer.json"), bos_id, eod_id)


def load_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """A ``tokenizer.json``; UserError if it is none."""
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more specific
        raise BadInput(
            f"{path} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads ({error}); check the file"
        ) from None


def load_gpt2(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE from its vocabulary and its merges; UserError if they are not such files."""
    try:
        model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises nothing more specific
        raise BadInput(f"{vocab} and {merges} are not a BPE vocabulary and its merges ({error}); check the files") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model; UserError if it is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except Exception as error:  # RuntimeError for most, with the library's C++ location
        raise BadInput(f"{path} is not a sentencepiece model ({type(error).__name__}); check the file") from None


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ways_to_lose_text(model: tokenizers.Tokenizer) -> tuple[int | None, bool]:
    """The id that stands for unknown text, if any, and whether text can be dropped without a trace."""
    spec = json.loads(model.to_str())["model"]
    unknown = spec["vocab"][spec["unk_id"]][0] if spec.get("unk_id") is not None else spec.get("unk_token")
    if unknown:
        return model.token_to_id(unknown), False
    complete = all(model.token_to_id(character) is not None for character in byte_alphabet())
    return None, not complete and not spec.get("byte_fallback", False)


def _spelled(piece: str) -> str:
    """A piece in the alphabet of byte-level BPE, as text."""
    alphabet = byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece).decode(errors="replace")
    return piece


def _unknown_error(piece: str, number: int, where: Sequence[str] | None) -> BadInput:
    place = where[number] if where else f"text {number}"
    return BadInput(f"the tokenizer has no token for {piece[:40]!r} in {place}; {UNKNOWN_MEND}")
