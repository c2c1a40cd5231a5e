"""One model of a sentence encoder: text to tokens, batches of few shapes, their rows shared among the devices, vectors.

JAX is imported where the model is loaded, not here: most processes of the data stages do without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tokenizers

from retro_jax.corpus.tokenizer import load_tokenizer_json
from retro_jax.errors import UserError
from retro_jax.retrieval.bert_folder import CONFIG, TOKENIZER, read_json

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


class BertTower:
    """The pooled states of an encoder's last layer.

    A text's row is padded to a length that depends on the text alone, in a batch of a number of rows that depends on that length
    alone; so its vector does not depend on the other texts of a list, and few programs are compiled. Every device of this process
    computes as many rows as one alone would, so that their number changes nothing. On another kind of device a vector differs by
    rounding.
    """

    def __init__(self, folder: Path, facts: Mapping, like: BertTower | None = None) -> None:
        """``like``: a tower of the same model, whose parameters are used."""
        self._folder, self._facts, self._like = folder, facts, like
        self._tokenizer = load_tokenizer_json(folder / TOKENIZER)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(facts["max_length"])

    @property
    def parameters(self) -> int:
        """How many the model has; reads the weights."""
        return self._model.parameters

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dim], of unit length if so asked for; zero for a text of nothing but white space."""
        vectors_ND = np.zeros((len(texts), self._facts["dim"]), np.float32)
        normalize = self._facts["normalize"] == "yes"
        running = [(numbers, self._model(*batch, normalize=normalize)) for numbers, batch in self._batches(self._encoded(texts))]
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
            rows = self._model.rows(length)
            for start in range(0, len(numbers), rows):
                batch = numbers[start : start + rows]
                yield batch, _padded([texts[number] for number in batch], rows, length)

    @functools.cached_property
    def _model(self) -> _OnDevices:
        if self._like is not None:
            return self._like._model
        import jax

        return _OnDevices(self._folder, self._tokenizer, self._facts["precision"], jax.local_devices())


class _OnDevices:
    """The encoder's parameters on every device, and the program that reads them."""

    def __init__(self, folder: Path, tokenizer: tokenizers.Tokenizer, precision: str, devices: Sequence[jax.Device]) -> None:
        import jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from retro_jax.interop.bert import bert_shape, read_bert
        from retro_jax.interop.files import SafetensorsSource
        from retro_jax.parallel.axes import DATA

        self._shape = bert_shape(read_json(folder / CONFIG))
        _refuse_other_tokenizer(tokenizer, self._shape.vocab_size, folder)
        values = read_bert(SafetensorsSource(folder), self._shape)
        self.parameters = sum(int(value.size) for value in jax.tree.leaves(values))
        self._batch_tokens = CPU_BATCH_TOKENS if devices[0].platform == "cpu" else BATCH_TOKENS
        self._mesh = Mesh(np.array(devices), (DATA,))
        self._rows = NamedSharding(self._mesh, PartitionSpec(DATA))
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._values = jax.tree.map(lambda value: jax.device_put(value.astype(precision), everywhere), values)

    def rows(self, length: int) -> int:
        """Rows of a batch: the same number on each device."""
        return self._mesh.size * max(1, self._batch_tokens // length)

    def __call__(self, tokens_BT: np.ndarray, mask_BT: np.ndarray, counted_BT: np.ndarray, *, normalize: bool) -> jax.Array:
        """Vectors float32 [B, D] on the devices, perhaps not computed yet."""
        import jax

        batch = jax.device_put((tokens_BT, mask_BT, counted_BT), self._rows)
        return _program(self._shape, self._mesh, normalize)(self._values, *batch)


@functools.lru_cache(maxsize=2)  # of embedders of one shape, so that each shape of batches is compiled once a process
def _program(shape: BertShape, mesh: jax.sharding.Mesh, normalize: bool) -> Callable[..., jax.Array]:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import PartitionSpec

    from retro_jax.interop.bert import bert_graph
    from retro_jax.model.bert import mean_states, unit_length

    graph = bert_graph(shape)

    def vectors(values: Any, tokens_BT: jax.Array, mask_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # float32 is float32 on accelerators too
            states_BTD = nnx.merge(graph, values)(tokens_BT, mask_BT)
        means_BD = mean_states(states_BTD, counted_BT)
        return (unit_length(means_BD) if normalize else means_BD).astype(jnp.float32)

    rows = PartitionSpec(*mesh.axis_names)  # nothing is sent: each device has all parameters, and rows of its own
    specs = (PartitionSpec(), rows, rows, rows)
    return jax.jit(jax.shard_map(vectors, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False))


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
