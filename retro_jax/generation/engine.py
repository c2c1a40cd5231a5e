"""The engine: a model, its tokenizer and its database, asked for completions of many prompts."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx

from retro_jax.config import ChunkConfig, GenerateConfig
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.generation.group import Progress, Search, Seconds, Work, complete, complete_rechunked
from retro_jax.generation.neighbours import Found, Retriever
from retro_jax.generation.prompt import Completion, Prompt
from retro_jax.generation.rows import Row
from retro_jax.generation.sampling import Sampling
from retro_jax.generation.steps import Params
from retro_jax.generation.stopping import check_stops
from retro_jax.model import Retro, unstacked

# What stands in for the grid of a model without chunks: prompts are padded to a multiple of it.
GPT_CHUNK = 64
# One (prompt, new text, None) for each piece of text as it comes, and (prompt, last piece, completion) when it is whole.
Event = tuple[int, str, Completion | None]


class Engine:
    """Completes prompts.

    Args:
        model: a Retro or a GPT.
        tokenizer: the one that it was trained with.
        config: how, where a call does not say otherwise.
        retriever: answers while text is written; needed for ``retrieval="live"`` of a model that reads neighbours.
        dtype: what the model computes in; None: the dtype of its parameters.

    Attributes:
        seconds: where the time of all calls went.
    """

    def __init__(
        self,
        model: Retro,
        tokenizer: Tokenizer,
        config: GenerateConfig | None = None,
        retriever: Retriever | None = None,
        *,
        dtype: Any = None,
    ) -> None:
        graph, arrays = nnx.split(unstacked(model))
        if dtype is not None:
            arrays = jax.tree.map(lambda a: a.astype(dtype), arrays)
        self.tokenizer, self.config, self.retriever = tokenizer, config or GenerateConfig(), retriever
        self.model_config = model.config
        self.seconds = Seconds()
        self._params = Params(graph, arrays)

    @property
    def reads_neighbours(self) -> bool:
        """Whether the model has a retrieval path."""
        retro = self.model_config.retro
        return retro is not None and retro.gate != 0.0

    @property
    def chunks(self) -> ChunkConfig:
        """The grid of the model, or what stands in for it."""
        retro = self.model_config.retro
        return ChunkConfig(chunk_len=GPT_CHUNK, retrieved_len=GPT_CHUNK) if retro is None else retro.chunks

    def complete(self, prompts: Sequence[Prompt], config: GenerateConfig | None = None) -> list[Completion]:
        """The completion of each prompt, in their order; arguments and errors as of :meth:`stream`."""
        done = {number: completion for number, _, completion in self.stream(prompts, config) if completion is not None}
        return [done[number] for number in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], config: GenerateConfig | None = None, done: Collection[int] = ()
    ) -> Iterator[Event]:
        """Text as it comes: (the prompt's place, new text, its completion when that is whole, else None).

        Prompts of like length are completed together, ``config.batch_size`` of them, so they do not end in their order.

        Args:
            prompts: any number.
            config: how; None: the engine's.
            done: places of prompts that need no completion. What is completed together stays so, to the last bit: prompts of
                ``done`` are left out only where all of their group are, and have no events.

        Raises:
            UserError: a prompt is empty, too long or no Unicode text, a stop string can never come, passages are missing or
                cannot be read, or the model's logits are not finite; all but the last before anything is computed.
            ValueError: ``retrieval="live"``, and there is no retriever; or ``retrieval_step`` is above the chunks' length.
        """
        config = config or self.config
        rows = self._rows(prompts, config)
        with ThreadPoolExecutor(1, "search") as thread:
            work = self._work(config, thread)
            run = complete if config.grid == "kept" else complete_rechunked
            rows.sort(key=lambda row: len(row.tokens))
            groups = (rows[first : first + config.batch_size] for first in range(0, len(rows), config.batch_size))
            left = (group for group in groups if any(row.number not in done for row in group))
            for event in _in_turn(((run(work, group), group) for group in left), config.in_flight):
                if event[0] not in done:
                    yield event

    def _work(self, config: GenerateConfig, thread: ThreadPoolExecutor) -> Work:
        reads = self.reads_neighbours and config.retrieval != "none"
        return Work(
            params=self._params,
            config=config,
            sampling=Sampling(
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                repetition_penalty=config.repetition_penalty,
                vocab_size=self.tokenizer.vocab_size,
                never=self.tokenizer.eod_id if config.end_of_document == "never" else None,
            ),
            chunks=self.chunks,
            search=self._search(thread) if reads and config.retrieval == "live" else None,
            reads=reads,
            end=self.tokenizer.eod_id,
            longest=self.model_config.max_positions if self.model_config.positions == "learned" else None,
            seconds=self.seconds,
        )

    def _search(self, thread: ThreadPoolExecutor) -> Search:
        def find(queries: Sequence[np.ndarray]) -> Found:
            assert self.retriever is not None
            began = time.perf_counter()
            found = self.retriever.find(queries)
            self.seconds.searching += time.perf_counter() - began
            return found

        return lambda queries: thread.submit(find, queries)

    def _rows(self, prompts: Sequence[Prompt], config: GenerateConfig) -> list[Row]:
        """The prompts as tokens, all of them checked."""
        check_stops(config.stop, self.tokenizer)
        if self.reads_neighbours and config.retrieval == "live" and self.retriever is None:
            raise ValueError("GenerateConfig.retrieval='live' needs a retriever; give the engine one, or use 'given' or 'none'")
        if self.reads_neighbours and (config.retrieval_step or 1) > self.chunks.chunk_len:
            raise ValueError(
                f"GenerateConfig.retrieval_step={config.retrieval_step} is above chunk_len={self.chunks.chunk_len}, the tokens "
                "that a chunk's neighbours serve; use that or less"
            )
        for number, prompt in enumerate(prompts):
            self._check(number, prompt, config)
        texts = self.tokenizer.encode_batch([p.text for p in prompts], [f"prompt {n}" for n in range(len(prompts))])
        rows = []
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if not len(text):
                raise UserError(f"prompt {number} is empty; give some text to go on from")
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            tokens = np.concatenate([np.array(bos, np.int32), text])
            self._check_length(number, len(tokens), config)
            passages = None if config.retrieval == "none" else prompt.passages
            encoded = (
                None
                if passages is None
                else [
                    tokens[: self.chunks.retrieved_len]
                    for tokens in self.tokenizer.encode_batch(passages, [f"a passage of prompt {number}"] * len(passages))
                ]
            )
            rows.append(Row(number, prompt, tokens, encoded, config.stop, self.tokenizer))
        return rows

    def _check(self, number: int, prompt: Prompt, config: GenerateConfig) -> None:
        for text in (prompt.text, *(prompt.passages or ())):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"prompt {number} holds bytes that are no UTF-8 text ({text!r:.60}); convert it") from None
        if not 0 <= prompt.seed < 2**32:
            raise UserError(f"prompt {number} has seed {prompt.seed}; use one from 0 to {2**32 - 1}")
        if prompt.passages and not self.reads_neighbours and config.retrieval != "none":
            raise UserError(
                f"prompt {number} has passages, but the model has no retrieval to read them with; put them into the prompt's "
                "text, or set GenerateConfig.retrieval='none'"
            )
        if prompt.passages is None and self.reads_neighbours and config.retrieval == "given":
            raise UserError(
                f"prompt {number} has no passages, and GenerateConfig.retrieval='given' reads nothing else; give it some (or an "
                "empty list), or use 'live' or 'none'"
            )

    def _check_length(self, number: int, length: int, config: GenerateConfig) -> None:
        longest, model = self.model_config.max_positions, self.model_config
        if model.positions == "learned" and length + config.max_new_tokens > longest:
            raise UserError(
                f"prompt {number} has {length} tokens, which with GenerateConfig.max_new_tokens={config.max_new_tokens} are more "
                f"than the model's {longest} positions; shorten it, or ask for at most {max(0, longest - length)}"
            )


@dataclasses.dataclass
class _Running:
    progress: Progress
    rows: Sequence[Row]
    search: Future[Found] | None = None

    def ready(self) -> bool:
        return self.search is None or self.search.done()

    def until_search(self) -> Iterator[Event]:
        """Events until the group has to wait for neighbours, or ends; then ``search`` is None."""
        told = {row.number for row in self.rows if row.finish is not None}
        self.search = None
        for search in self.progress:
            for row in self.rows:
                if row.number not in told and (piece := row.shown(), row.finish) != ("", None):
                    yield row.number, piece, None if row.finish is None else row.completion()
                    told |= {row.number} if row.finish is not None else set()
            if search is not None:
                self.search = search
                return


def _in_turn(groups: Iterator[tuple[Progress, Sequence[Row]]], in_flight: int) -> Iterator[Event]:
    """Drive the groups: one decodes while the others wait for their neighbours."""
    running: deque[_Running] = deque()
    while True:
        while len(running) < in_flight and (group := next(groups, None)) is not None:
            running.append(_Running(*group))
        if not running:
            return
        # Where none has what it waits for, the oldest search is the next to end.
        chosen = next((group for group in running if group.ready()), running[0])
        running.remove(chosen)
        yield from chosen.until_search()
        if chosen.search is not None:
            running.append(chosen)
