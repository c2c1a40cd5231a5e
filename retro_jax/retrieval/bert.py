"""Sentence encoders of BERT's form as an embedder: which folder, which tokens, and batches of few shapes.

JAX is imported where the model is loaded, not here: most processes of the data stages do without it.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
import tokenizers

from retro_jax.config import RetrievalConfig
from retro_jax.corpus.tokenizer import load_tokenizer_json
from retro_jax.errors import BadInput, UserError
from retro_jax.retrieval.bert_folder import CONFIG, TOKENIZER, folder_facts, read_json, weight_files
from retro_jax.retrieval.chunk_texts import ChunkTexts

if TYPE_CHECKING:
    import jax

    from retro_jax.model.bert import BertShape

# Rows of a batch hold at most so many tokens: more do not make a CPU faster, and few make one text alone cheap.
CPU_BATCH_TOKENS, BATCH_TOKENS = 256, 16_384
# Rows are padded to a multiple of the second up to the first.
LENGTHS = ((128, 8), (256, 16), (2**31, 32))
ENCODED_AT_ONCE = 1024


class _Text(NamedTuple):
    """Token ids with the special ones, and which of them count for the vector."""

    ids: np.ndarray
    counted: np.ndarray


class BertEmbedder:
    """The pooled states of an encoder's last layer, of unit length.

    A text's row is padded to a length that depends on the text alone, in a batch of a number of rows that depends on that length
    alone; so its vector does not depend on the other texts of a list, and few programs are compiled. On another kind of device it
    differs by rounding.
    """

    name: ClassVar[str] = "bert"
    sparse: ClassVar[bool] = False
    one_process: ClassVar[bool] = True

    def __init__(self, folder: Path, facts: Mapping) -> None:
        self._folder, self._facts = folder, facts
        self._tokenizer = load_tokenizer_json(folder / TOKENIZER)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(facts["max_length"])

    @property
    def dim(self) -> int:
        """The encoder's width."""
        return self._facts["dim"]

    @classmethod
    def dim_of(cls, config: RetrievalConfig) -> int:
        """The encoder's width."""
        return cls.facts(config)["dim"]

    @classmethod
    def facts(cls, config: RetrievalConfig) -> Mapping:
        """See :func:`retro_jax.retrieval.bert_folder.folder_facts`."""
        return folder_facts(config.bert)

    @classmethod
    def fit(cls, config: RetrievalConfig, texts: ChunkTexts, folder: Path) -> Mapping:
        """Nothing is learned: the model's files are checked and copied, so that the artefact is whole by itself.

        Raises:
            UserError: the weights are not those of the encoder that ``config.json`` tells, or the tokenizer's ids are not.
        """
        assert config.bert.path is not None
        source = Path(config.bert.path)
        try:
            model = cls(source, cls.facts(config))
            parameters = model._run.parameters
        except UserError as error:
            raise BadInput(str(error)) from None
        for file in (source / CONFIG, source / TOKENIZER, *weight_files(source)):
            shutil.copyfile(file, folder / file.name)
        return {"name": source.resolve().name, "parameters": parameters, "dim": model.dim, "pooling": model._facts["pooling"]}

    @classmethod
    def load(cls, folder: Path, facts: Mapping) -> Self:
        """From the files that :meth:`fit` copied; the weights are read when the first text is embedded."""
        return cls(folder, facts)

    def embed(self, texts: list[str]) -> np.ndarray:
        """float32 [texts, dim], rows of unit length; zero for a text of nothing but white space."""
        vectors_ND = np.zeros((len(texts), self.dim), np.float32)
        running = [(numbers, self._run(*batch)) for numbers, batch in self._batches(self._encoded(texts))]
        for numbers, result in running:
            vectors_ND[numbers] = np.asarray(result)[: len(numbers)]
        vectors_ND[[not text.strip() for text in texts]] = 0
        return vectors_ND

    def token_ids(self, texts: list[str]) -> list[np.ndarray]:
        """What the encoder reads of each text, int32."""
        return [text.ids for text in self._encoded(texts)]

    def _encoded(self, texts: Sequence[str]) -> list[_Text]:
        encoded = []
        for start in range(0, len(texts), ENCODED_AT_ONCE):  # an encoding is far larger than what is kept of it
            prefixed = [self._facts["prefix"] + text for text in texts[start : start + ENCODED_AT_ONCE]]
            encodings = self._tokenizer.encode_batch_fast(prefixed, add_special_tokens=True)
            encoded += [self._text(encoding) for encoding in encodings]
        return encoded

    def _text(self, encoding: tokenizers.Encoding) -> _Text:
        ids = np.array(encoding.ids, np.int32)
        if self._facts["pooling"] == "mean_without_special":
            return _Text(ids, np.array(encoding.special_tokens_mask) == 0)
        return _Text(ids, np.arange(len(ids)) < (1 if self._facts["pooling"] == "cls" else len(ids)))

    def _batches(self, texts: Sequence[_Text]) -> Iterator[tuple[list[int], tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """Which texts, and their ids, mask and counted tokens [rows, length]."""
        by_length: dict[int, list[int]] = {}
        for number, text in enumerate(texts):
            by_length.setdefault(padded_length(len(text.ids), self._facts["max_length"]), []).append(number)
        for length, numbers in sorted(by_length.items()):
            rows = max(1, self._run.batch_tokens // length)
            for start in range(0, len(numbers), rows):
                batch = numbers[start : start + rows]
                yield batch, _padded([texts[number] for number in batch], rows, length)

    @functools.cached_property
    def _run(self) -> _OnDevice:
        return _OnDevice(self._folder, self._tokenizer, self._facts["precision"])


class _OnDevice:
    """The encoder's parameters on the device, and the program that reads them."""

    def __init__(self, folder: Path, tokenizer: tokenizers.Tokenizer, precision: str) -> None:
        import jax

        from retro_jax.interop.bert import bert_shape, read_bert
        from retro_jax.interop.files import SafetensorsSource

        shape = bert_shape(read_json(folder / CONFIG))
        _refuse_other_tokenizer(tokenizer, shape.vocab_size, folder)
        values = read_bert(SafetensorsSource(folder), shape)
        self.parameters = sum(int(value.size) for value in jax.tree.leaves(values))
        self.batch_tokens = CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else BATCH_TOKENS
        self._values = jax.tree.map(lambda value: jax.device_put(value.astype(precision)), values)
        self._program = _program(shape)

    def __call__(self, tokens_BT: np.ndarray, mask_BT: np.ndarray, counted_BT: np.ndarray) -> jax.Array:
        """Vectors float32 [B, D] on the device, perhaps not computed yet."""
        return self._program(self._values, tokens_BT, mask_BT, counted_BT)


@functools.lru_cache(maxsize=2)  # of embedders of one shape, so that each shape of batches is compiled once a process
def _program(shape: BertShape) -> Callable[..., jax.Array]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from retro_jax.interop.bert import bert_graph
    from retro_jax.model.bert import mean_states, unit_length

    graph = bert_graph(shape)

    def vectors(values: Any, tokens_BT: jax.Array, mask_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # float32 is float32 on accelerators too
            states_BTD = nnx.merge(graph, values)(tokens_BT, mask_BT)
        return unit_length(mean_states(states_BTD, counted_BT)).astype(jnp.float32)

    compiled = jax.jit(vectors)
    return lambda values, *batch: compiled(values, *jax.device_put(batch))


def padded_length(length: int, longest: int) -> int:
    """The length that a row of so many tokens is padded to."""
    step = next(step for end, step in LENGTHS if length <= end)
    return min(-(-length // step) * step, longest)


def _padded(texts: Sequence[_Text], rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens_BT, mask_BT, counted_BT = (np.zeros((rows, length), dtype) for dtype in (np.int32, bool, bool))
    for row, text in enumerate(texts):
        size = len(text.ids)
        tokens_BT[row, :size], mask_BT[row, :size], counted_BT[row, :size] = text.ids, True, text.counted
    return tokens_BT, mask_BT, counted_BT


def _refuse_other_tokenizer(tokenizer: tokenizers.Tokenizer, vocab_size: int, folder: Path) -> None:
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has ids up to {largest}, but the model has {vocab_size} words; take both from one model"
        )
