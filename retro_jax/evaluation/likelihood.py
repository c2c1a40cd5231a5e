"""Log-likelihoods of continuations, given contexts: whole rows through the model, logits at the continuations' places alone.

A row is a context and its continuation on a chunk grid of its own, fixed so that the context's last token ends a chunk. That
chunk's neighbours are read by this token and the next C - 1; the continuation's first C tokens make the next chunk, whose
neighbours are read from its last token on, and so forth. So a query holds no token that is predicted with its answer, and what is
computed is what generation with live retrieval gives, the continuation put in the place of the tokens drawn.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.config import ChunkConfig, Implementation, TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.errors import UserError
from retro_jax.generation.neighbours import Retriever
from retro_jax.kernels import linear_cross_entropy
from retro_jax.model import Retro
from retro_jax.model.grid import trailing_first_chunk_len
from retro_jax.progress import progress_bar
from retro_jax.training.state import Tree
from retro_jax.training.step import cast, compute_dtype

# Rows are padded to these lengths and their multiples by powers of two, so that few programs are compiled.
LENGTHS = (16, 24)
FEWEST_TARGETS = 64
ROWS_LOOKED_UP = 256


@dataclass(frozen=True)
class Continuation:
    """Tokens to be predicted, one after the other.

    Attributes:
        context: ids that stand before them, at least one.
        tokens: ids to be predicted, at least one.
        passages: ids of texts that the encoder reads for every chunk of the row; None: as the caller looks up.
        first_chunk_len: of the row's grid, where the row is not cut at the left; None: as the context's length gives it.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    passages: tuple[tuple[int, ...], ...] | None = None
    first_chunk_len: int | None = None


class LogLikelihood(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities, in nats, and whether each was the likeliest."""

    nats: float
    greedy: bool


class Kept(Protocol):
    """What was computed before, and takes what is computed now."""

    def get(self, question: Any) -> Any:
        """The log-likelihood of a continuation (its two values); None if it is not known."""

    def add(self, answers: Mapping[Any, Any]) -> None:
        """Keep those of these continuations."""


class _Row(NamedTuple):
    """What the model reads for one or more continuations."""

    tokens: tuple[int, ...]
    first_chunk_len: int
    passages: tuple[tuple[int, ...], ...] | None


class Scorer:
    """A model that gives log-likelihoods; compiled for few lengths, and for each but once.

    Args:
        model: with its float32 parameters.
        config: tells the dtype to compute in, and how many tokens' logits exist at a time.
        longest: tokens of a row; what stands further to the left in a longer one is cut off.
        batch_size: rows at a time.
        retriever: finds the neighbours of the rows' chunks; None: only continuations with ``passages`` have any.
    """

    def __init__(
        self, model: Retro, config: TrainConfig, *, longest: int, batch_size: int, retriever: Retriever | None = None
    ) -> None:
        graph, variables = nnx.split(model)
        parameters: Tree = dict(nnx.to_pure_dict(variables).items())
        self.longest, self._batch_size, self._retriever = longest, batch_size, retriever
        self._graph, self._state = graph, cast(parameters, compute_dtype(config))
        self._config, self._loss_chunk, self._told_cut = model.config, config.loss_chunk, False
        retro = model.config.retro
        self._chunks = None if retro is None or retro.gate == 0.0 else retro.chunks
        self._table_VD = cast({"table": model.output_table_VD()}, compute_dtype(config))["table"]

    @property
    def chunk_len(self) -> int | None:
        """Tokens of a chunk; None: the model has no retrieval."""
        return None if self._chunks is None else self._chunks.chunk_len

    def __call__(self, asked: Sequence[Continuation], kept: Kept | None = None, *, name: str = "") -> list[LogLikelihood]:
        """The log-likelihood of each continuation, in order.

        Rows are sorted by length, and equal ones computed once. Which rows stand together depends on all that is asked and not on
        what is kept, so that a pass that was killed gives, when it is run again, the same numbers to the last bit.

        Args:
            asked: the continuations.
            kept: results of an earlier pass, that takes those of this one batch by batch.
            name: for the progress bar.

        Raises:
            UserError: a continuation is longer than a row, has no tokens or no context, or its likelihood is not finite.
        """
        by_row = self._rows(asked, name)
        rows = sorted(by_row, key=lambda row: (-len(row.tokens), row))
        batches = [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]
        known = {one: kept.get(one) for one in asked} if kept is not None else {}
        found = {one: LogLikelihood(*values) for one, values in known.items() if values is not None}
        ahead = [batch for batch in batches if not all(one in found for row in batch for one in by_row[row])]
        with progress_bar(f"log-likelihoods {name}".rstrip(), total=len(batches), done=len(batches) - len(ahead)) as bar:
            for batch, made in self._made(ahead):
                computed = self._computed(batch, made, by_row)
                found.update(computed)
                if kept is not None:
                    kept.add(computed)
                bar.advance(note=f"rows of {made.tokens.shape[1]} tokens")
        return [found[one] for one in asked]

    def _rows(self, asked: Sequence[Continuation], name: str) -> dict[_Row, list[Continuation]]:
        """What is to be computed, and which continuations it answers."""
        by_row: dict[_Row, list[Continuation]] = {}
        cut = 0
        for one in dict.fromkeys(asked):
            if not one.context or not one.tokens:
                part = "context" if not one.context else "continuation"
                raise UserError(f"a request has an empty {part}; give at least one token of it, or leave the document out")
            if len(one.tokens) > self.longest:
                raise UserError(
                    f"a continuation has {len(one.tokens)} tokens, and a row at most {self.longest}; raise "
                    "HarnessConfig.max_tokens, or leave the document out"
                )
            tokens = (one.context + one.tokens)[-(self.longest + 1) :][:-1]
            is_cut = len(tokens) + 1 < len(one.context) + len(one.tokens)
            cut += is_cut
            first = 0
            if self._chunks is not None:
                before, C = len(tokens) + 1 - len(one.tokens), self._chunks.chunk_len
                given = None if is_cut else one.first_chunk_len
                first = trailing_first_chunk_len(before, C) if given is None else given
            by_row.setdefault(_Row(tokens, first, one.passages if self._chunks else None), []).append(one)
        if cut and not self._told_cut:
            self._told_cut = True
            print(
                f"{name or 'model'}: {cut:,} of {len(asked):,} rows are longer than {self.longest} tokens and lose their "
                "beginning (HarnessConfig.max_tokens)",
                file=sys.stderr,
            )
        return by_row

    def _made(self, batches: list[list[_Row]]) -> Iterator[tuple[list[_Row], Batch]]:
        """The batches with their neighbours, which are looked up for many rows at once."""
        at_once = max(1, ROWS_LOOKED_UP // self._batch_size)
        for start in range(0, len(batches), at_once):
            group = batches[start : start + at_once]
            looked_up = self._looked_up([row for batch in group for row in batch])
            for batch in group:
                yield batch, self._batch(batch, looked_up)

    def _looked_up(self, rows: list[_Row]) -> dict[_Row, tuple[np.ndarray, np.ndarray]]:
        """Neighbours of the whole chunks of each row: int32 and bool [chunks, K, R]."""
        if self._chunks is None:
            return {}
        C = self._chunks.chunk_len
        found = {row: _given(row.passages, self._chunks, len(_whole_chunks(row, C))) for row in rows if row.passages is not None}
        if self._retriever is None:
            return found
        asked = [(row, _whole_chunks(row, C)) for row in rows if row not in found]
        asked = [(row, chunks) for row, chunks in asked if chunks]
        if asked:
            answer = self._retriever.find([chunk for _, chunks in asked for chunk in chunks])
            ends = np.cumsum([len(chunks) for _, chunks in asked])[:-1]
            parts = zip(np.split(answer.tokens_QKR, ends), np.split(answer.mask_QKR, ends), strict=True)
            found.update(zip((row for row, _ in asked), parts, strict=True))
        return found

    def _batch(self, rows: list[_Row], looked_up: Mapping[_Row, tuple[np.ndarray, np.ndarray]]) -> Batch:
        B, T = self._batch_size, _padded(max(len(row.tokens) for row in rows), self.longest)
        tokens_BT, segments_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
        for number, row in enumerate(rows):
            tokens_BT[number, : len(row.tokens)], segments_BT[number, : len(row.tokens)] = row.tokens, 1
        L, K, R, first_B = 1, 0, 1, None
        if self._chunks is not None:
            C, R = self._chunks.chunk_len, self._chunks.retrieved_len
            K = max((looked_up[row][0].shape[1] for row in rows if row in looked_up), default=0)
            L = (T - 1) // C + 1
            first_B = np.array([row.first_chunk_len for row in rows] + [C] * (B - len(rows)), np.int32)
        neighbours_BLKR, mask_BLKR = np.zeros((B, L, K, R), np.int32), np.zeros((B, L, K, R), bool)
        for number, row in enumerate(rows):
            if row in looked_up:
                here_LKR, shown_LKR = looked_up[row]
                L_here, K_here, _ = here_LKR.shape
                neighbours_BLKR[number, :L_here, :K_here], mask_BLKR[number, :L_here, :K_here] = here_LKR * shown_LKR, shown_LKR
        return Batch(
            tokens=tokens_BT,
            targets=np.zeros((B, T), np.int32),
            segments=segments_BT,
            positions=np.arange(T, dtype=np.int32) * segments_BT,
            loss_mask=np.zeros((B, T), np.float32),
            neighbours=neighbours_BLKR,
            neighbour_mask=mask_BLKR,
            first_chunk_len=first_B,
        )

    def _computed(
        self, rows: list[_Row], batch: Batch, by_row: Mapping[_Row, list[Continuation]]
    ) -> dict[Continuation, LogLikelihood]:
        asked = [(number, one) for number, row in enumerate(rows) for one in by_row[row]]
        lengths = np.array([len(one.tokens) for _, one in asked])
        row_N = np.repeat([number for number, _ in asked], lengths)
        ends = np.repeat([len(rows[number].tokens) for number, _ in asked], lengths)
        starts = np.cumsum(lengths) - lengths
        place_N = ends - np.repeat(lengths, lengths) + np.arange(len(row_N)) - np.repeat(starts, lengths)
        targets_N = np.concatenate([np.asarray(one.tokens, np.int32) for _, one in asked])
        size = max(FEWEST_TARGETS, 1 << (len(row_N) - 1).bit_length())
        padded = [np.pad(array.astype(np.int32), (0, size - len(row_N))) for array in (row_N, place_N)]
        padded.append(np.pad(targets_N, (0, size - len(row_N)), constant_values=-1))
        hidden_BTD = _hidden(self._graph, self._state, jax.device_put(batch), retrieval=batch.neighbours.shape[2] > 0)
        scores = _scores(
            hidden_BTD,
            self._table_VD,
            *map(jax.device_put, padded),
            chunk=min(self._loss_chunk, size),
            implementation=self._config.implementation,
        )
        losses_N, likeliest_N = (np.asarray(array)[: len(row_N)] for array in scores)
        nats = -np.add.reduceat(losses_N.astype(np.float64), starts)
        greedy = np.logical_and.reduceat(likeliest_N == targets_N, starts)
        for (_, one), value in zip(asked, nats, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"the log-likelihood of {len(one.tokens)} tokens after {len(one.context)} is {value}; the model's numbers "
                    "are not finite, evaluate an earlier --checkpoint, or set TrainConfig.precision='float32'"
                )
        return {one: LogLikelihood(float(n), bool(g)) for (_, one), n, g in zip(asked, nats, greedy, strict=True)}


def _whole_chunks(row: _Row, chunk_len: int) -> list[np.ndarray]:
    """The row's chunks on its grid, without an unfinished one at its end."""
    tokens = np.asarray(row.tokens, np.int32)
    ends = range(row.first_chunk_len, len(tokens) + 1, chunk_len)
    return [tokens[max(0, end - chunk_len) : end] for end in ends]


def _given(passages: tuple[tuple[int, ...], ...] | None, chunks: ChunkConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The same texts for each of ``count`` chunks, cut to R tokens, as many as there are or ``num_neighbours``: int32 and bool
    [count, K, R]."""
    widest = max(chunks.num_neighbours, len(passages or ()))
    tokens_LKR = np.zeros((count, widest, chunks.retrieved_len), np.int32)
    mask_LKR = np.zeros(tokens_LKR.shape, bool)
    for place, passage in enumerate(passages or ()):
        kept = passage[: chunks.retrieved_len]
        tokens_LKR[:, place, : len(kept)], mask_LKR[:, place, : len(kept)] = kept, True
    return tokens_LKR, mask_LKR


def _padded(length: int, longest: int) -> int:
    """The least of the lengths that are compiled for which is not below ``length``."""
    sizes = (base << power for power in range(longest.bit_length()) for base in LENGTHS)
    return min(longest, next((size for size in sizes if size >= length), longest))


@functools.partial(jax.jit, static_argnums=0, static_argnames="retrieval")
def _hidden(graph: nnx.GraphDef, state: Tree, batch: Batch, *, retrieval: bool) -> jax.Array:
    return nnx.merge(graph, state)(batch, retrieval=retrieval)


@functools.partial(jax.jit, static_argnames=("chunk", "implementation"))
def _scores(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    row_N: jax.Array,
    place_N: jax.Array,
    targets_N: jax.Array,
    *,
    chunk: int,
    implementation: Implementation | None,
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of each target at its place, float32 [N], and the likeliest token there, int32 [N]."""
    hidden_ND = hidden_BTD[row_N, place_N]
    losses_N = linear_cross_entropy.token_losses(hidden_ND, table_VD, targets_N, chunk=chunk, implementation=implementation)

    def likeliest(hidden_D: jax.Array) -> jax.Array:
        return jnp.argmax(jnp.einsum("vd,d->v", table_VD, hidden_D, preferred_element_type=jnp.float32)).astype(jnp.int32)

    return losses_N, jax.lax.map(likeliest, hidden_ND, batch_size=chunk)
