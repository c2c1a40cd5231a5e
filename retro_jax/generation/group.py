"""A group of prompts completed together, in step: prefill, then bursts of tokens between the places where neighbours arrive.

The group runs as a coroutine. Where it needs neighbours it yields the search that it has begun; whoever drives it lets another
group decode until that is done. Within one group nothing can overlap but the search of the rows with each other: a chunk's
neighbours are read from its last token on, and what to look for is not known before that token is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from retro_jax.config import ChunkConfig, GenerateConfig
from retro_jax.errors import UserError
from retro_jax.generation.decode import Arrived
from retro_jax.generation.neighbours import Found, chunks_of
from retro_jax.generation.rows import Row, passages_found, row_batch, take_all
from retro_jax.generation.sampling import Sampled, Sampling
from retro_jax.generation.steps import Params, State, go_on, go_on_with, next_of_rows, some_rows, start

Search = Callable[[Sequence[np.ndarray]], "Future[Found]"]
# Yields a search that has to be done before it goes on, or None: rows have moved on, look at them.
Progress = Generator["Future[Found] | None", None, None]


@dataclass
class Seconds:
    """Where time went: searching (in its own thread), waiting for a search with nothing else to do, and in the model's steps."""

    searching: float = 0.0
    waiting: float = 0.0
    prompts: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What groups share. ``search`` None: nothing is retrieved; ``reads``: the encoder reads neighbours or passages;
    ``longest``: tokens that a row may have."""

    params: Params
    config: GenerateConfig
    sampling: Sampling
    chunks: ChunkConfig
    search: Search | None
    reads: bool
    end: int | None
    longest: int | None
    seconds: Seconds = field(default_factory=Seconds)

    @property
    def step(self) -> int:
        """Tokens from one retrieval to the next."""
        return self.config.retrieval_step or self.chunks.chunk_len

    def row_length(self, rows: Sequence[Row | None]) -> int:
        """Tokens that the rows are padded to."""
        C = self.chunks.chunk_len
        tokens = bucket(-(-max(len(row.tokens) + len(row.new) for row in rows if row is not None) // C)) * C
        return tokens if self.longest is None else min(tokens, self.longest)

    def num_chunks(self, length: int) -> int:
        """Chunks that a row of so many tokens has at most."""
        return -(-length // self.chunks.chunk_len)


class Asked(NamedTuple):
    """A text that is looked for: where the answer goes, of which row, and where in it the text ends."""

    place: int
    row: Row
    end: int
    text: np.ndarray


def complete(work: Work, rows: Sequence[Row]) -> Progress:
    """Complete the rows, with a cache. Rows that end leave; once half of the places are empty the others move together."""
    places: list[Row | None] = [*rows, *[None] * (bucket(len(rows)) - len(rows))]
    length = work.row_length(places)
    slots = length + bucket(work.config.max_new_tokens)
    neighbours = None
    if work.reads:
        neighbours = yield from _of_prompts(work, places, work.num_chunks(length))
    began = time.perf_counter()
    batch = row_batch([row.tokens if row else np.zeros(1, np.int32) for row in places], length, work.chunks.chunk_len, neighbours)
    state, sampled = start(work.params, batch, _seeds(places), work.sampling, slots)
    wrong = _take(work, places, sampled, 1)
    work.seconds.prompts += time.perf_counter() - began
    yield from _told(wrong)
    read = 0  # new tokens that the model has read
    while any(row is not None and row.finish is None for row in places):
        state, places = _together(state, places)
        if work.reads and (read + 1) % work.step == 0:
            arrived = yield from _of_last_tokens(work, places)
            count, began = 1, time.perf_counter()
            state, sampled = go_on_with(work.params, state, arrived, work.sampling)
        else:
            until = work.step - 1 - read % work.step if work.reads else work.config.burst
            count = min(work.config.burst, until, work.config.max_new_tokens - 1 - read)
            began = time.perf_counter()
            state, sampled = go_on(work.params, state, count, work.sampling, work.config.burst)
        wrong = _take(work, places, sampled, count)
        work.seconds.tokens += time.perf_counter() - began
        yield from _told(wrong)
        read += count


def complete_rechunked(work: Work, rows: Sequence[Row]) -> Progress:
    """Complete the rows as the papers do: every retrieval step the grid is laid anew from the end of the text, and the neighbours
    of all its chunks are looked for; every token recomputes the whole row. Slow, and what the cached form is held against."""
    neighbours: Found | None = None
    C, grid_B = work.chunks.chunk_len, np.zeros(len(rows), np.int64)
    for number in range(work.config.max_new_tokens):
        texts, length = [row.all_tokens() for row in rows], work.row_length(rows)
        if number % work.step == 0:
            grid_B = np.array([len(text) for text in texts])
            if work.reads:
                neighbours = yield from _of_prompts(work, rows, work.num_chunks(length))
        began = time.perf_counter()
        batch = row_batch(
            texts, length, C, None if neighbours is None else _for_chunks(neighbours, len(rows), work.num_chunks(length))
        )
        batch = batch._replace(first_chunk_len=((grid_B - 1) % C + 1).astype(np.int32))
        sampled = next_of_rows(work.params, batch, _seeds(rows), number, work.sampling)
        wrong = _take(work, rows, sampled, 1)
        work.seconds.tokens += time.perf_counter() - began
        yield from _told(wrong)
        if all(row.finish is not None for row in rows):
            return


def bucket(count: int) -> int:
    """The next power of two: sizes are rounded up to few different ones, each of which is compiled once."""
    return 1 << (count - 1).bit_length()


def _of_prompts(work: Work, places: Sequence[Row | None], num_chunks: int) -> Generator[Future[Found], None, Found]:
    """The neighbours of ``num_chunks`` chunks of every row, of which those past its text have none."""
    found = passages_found(places, work.chunks, num_chunks)
    asked = []
    for number, row in enumerate(places):
        if row is not None and _searches(row):
            row.forget_retrieved()
            texts = chunks_of(row.all_tokens(), work.chunks.chunk_len)
            ends = itertools.accumulate(len(text) for text in texts)
            asked += [Asked(number * num_chunks + chunk, row, *of) for chunk, of in enumerate(zip(ends, texts, strict=True))]
    yield from _look_up(work, asked, found)
    return found


def _of_last_tokens(work: Work, places: Sequence[Row | None]) -> Generator[Future[Found], None, Arrived]:
    """The neighbours of the last chunk_len tokens of every row."""
    found = passages_found(places, work.chunks, 1)
    texts = [(number, row, row.all_tokens()) for number, row in enumerate(places) if row is not None and _searches(row)]
    asked = [Asked(number, row, len(text), text[-work.chunks.chunk_len :]) for number, row, text in texts]
    yield from _look_up(work, asked, found)
    return Arrived(jnp.asarray(found.tokens_QKR), jnp.asarray(found.mask_QKR))


def _look_up(work: Work, asked: Sequence[Asked], found: Found) -> Generator[Future[Found], None, None]:
    """Search for all texts at once, and put what was found into its places."""
    if work.search is None or not asked:
        return
    search = work.search([one.text for one in asked])
    yield search
    began = time.perf_counter()
    answer = search.result()
    work.seconds.waiting += time.perf_counter() - began
    for query, one in enumerate(asked):
        for all_QK, answer_QK in zip(found, answer, strict=True):
            all_QK[one.place, : answer_QK.shape[1]] = answer_QK[query]
        one.row.note(one.end, one.text, answer.ids_QK[query], answer.distances_QK[query])


def _take(work: Work, rows: Sequence[Row | None], sampled: Sampled, count: int) -> UserError | None:
    return take_all(rows, sampled, count, most=work.config.max_new_tokens, end=work.end)


def _told(wrong: UserError | None) -> Progress:
    """Let the rows be looked at; where one's logits were not finite, what the others have is seen before that is told."""
    yield None
    if wrong is not None:
        raise wrong


def _searches(row: Row) -> bool:
    return row.passages is None and row.finish is None


def _for_chunks(found: Found, rows: int, num_chunks: int) -> Found:
    """The neighbours of the first ``num_chunks`` chunks of every row, none where more are wanted than there are."""

    def fitted(a: np.ndarray, filler: float) -> np.ndarray:
        a = a.reshape(rows, -1, *a.shape[1:])
        missing = max(0, num_chunks - a.shape[1])
        a = np.pad(a, ((0, 0), (0, missing), *((0, 0),) * (a.ndim - 2)), constant_values=filler)
        return a[:, :num_chunks].reshape(-1, *a.shape[2:])

    return Found(*(fitted(a, filler) for a, filler in zip(found, (0, False, -1, np.inf), strict=True)))


def _together(state: State, places: list[Row | None]) -> tuple[State, list[Row | None]]:
    """The unfinished rows in the fewest places that they need."""
    left = [number for number, row in enumerate(places) if row is not None and row.finish is None]
    wanted = bucket(len(left))
    if wanted == len(places):
        return state, places
    taken = [*left, *[left[0]] * (wanted - len(left))]
    moved: list[Row | None] = [*(places[number] for number in left), *[None] * (wanted - len(left))]
    return some_rows(state, jnp.asarray(taken)), moved


def _seeds(places: Sequence[Row | None]) -> jnp.ndarray:
    return jnp.asarray([row.prompt.seed if row else 0 for row in places], jnp.uint32)
