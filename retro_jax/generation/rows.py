"""A prompt on its way to a completion, as the host sees it, and rows put together for the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retro_jax.config import ChunkConfig
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.data.batch import Batch
from retro_jax.errors import UserError
from retro_jax.generation.neighbours import Found, padded
from retro_jax.generation.prompt import Completion, Finish, Prompt, Retrieved
from retro_jax.generation.sampling import Sampled
from retro_jax.generation.stopping import Transcript
from retro_jax.model.grid import trailing_first_chunk_len


class Row:
    """One prompt's tokens, what was drawn after them, and why it ended.

    Args:
        number: the prompt's place among those asked.
        prompt: the prompt.
        tokens: its ids, with a BOS where the tokenizer has one.
        passages: ids of its passages; None: neighbours are retrieved, or there are none.
        stop: strings that end it.
        tokenizer: the model's.
    """

    def __init__(
        self,
        number: int,
        prompt: Prompt,
        tokens: np.ndarray,
        passages: list[np.ndarray] | None,
        stop: tuple[str, ...],
        tokenizer: Tokenizer,
    ) -> None:
        self.number, self.prompt, self.tokens, self.passages = number, prompt, tokens, passages
        self.finish: Finish | None = None
        self.new: list[int] = []
        self._log_probabilities: list[float] = []
        self._retrieved: list[Retrieved] = []
        self._tokenizer, self._transcript, self._taken = tokenizer, Transcript(tokenizer, tokens.tolist(), stop), 0

    def take(self, token: int, log_probability: float, *, most: int, end: int | None) -> None:
        """One drawn token. ``most``: new tokens wanted; ``end``: the id that ends a document, where it ends the completion."""
        if token == end:
            self.finish = "end"
        else:
            self.new.append(token)
            self._log_probabilities.append(log_probability)
            self._transcript.add(token)
            if len(self.new) == most:
                self.finish = "length"
        if self.finish is not None:
            self._transcript.finish()
        if self._transcript.stopped:
            self.finish = "stop"

    def shown(self) -> str:
        """The text that has become certain since the last call."""
        text = self._transcript.text if self.finish is not None else self._transcript.shown
        piece, self._taken = text[self._taken :], max(self._taken, len(text))
        return piece

    def all_tokens(self) -> np.ndarray:
        """Of prompt and completion, int32."""
        return np.concatenate([self.tokens, np.array(self.new, np.int32)])

    def note(self, end: int, query: np.ndarray, ids_K: np.ndarray, distances_K: np.ndarray) -> None:
        """What was found for the text that ends before token ``end`` of the row."""
        there = ids_K >= 0
        text = self._tokenizer.decode_batch([query])[0]
        self._retrieved.append(
            Retrieved(
                end=end,
                query=text,
                chunks=tuple(ids_K[there].tolist()),
                distances=tuple(distances_K[there].astype(float).tolist()),
            )
        )

    def forget_retrieved(self) -> None:
        """Drop what was noted: the grid is laid anew."""
        self._retrieved.clear()

    def completion(self) -> Completion:
        """What came of it."""
        assert self.finish is not None
        return Completion(
            text=self._transcript.text,
            tokens=tuple(self.new),
            log_probabilities=tuple(self._log_probabilities),
            finish=self.finish,
            retrieved=tuple(self._retrieved),
        )


def take_all(rows: Sequence[Row | None], sampled: Sampled, count: int, *, most: int, end: int | None) -> UserError | None:
    """Give each unfinished row what was drawn for it, [B, count or more], until it ends; what is wrong, where a row's logits were
    not finite."""
    wrong = None
    tokens_BX, log_BX, finite_BX = (np.asarray(a).reshape(len(rows), -1) for a in sampled)
    for number, row in enumerate(rows):
        for place in range(count):
            if row is None or row.finish is not None:
                break
            if not finite_BX[number, place]:
                text = row.prompt.text if len(row.prompt.text) <= 40 else row.prompt.text[:39] + "…"
                wrong = UserError(
                    f"the model's logits are not finite for new token {len(row.new)} of prompt {row.number} ({text!r}); take "
                    "another --checkpoint, or set TrainConfig.precision='float32'"
                )
                break
            row.take(int(tokens_BX[number, place]), float(log_BX[number, place]), most=most, end=end)
    return wrong


def row_batch(texts: Sequence[np.ndarray], length: int, chunk_len: int, neighbours: Found | None) -> Batch:
    """Rows of ``length`` tokens, each a text from its first token on with the grid that ends with it.

    Args:
        texts: at least one token each.
        length: T.
        chunk_len: C.
        neighbours: of all chunks of every row, T / C rounded up, in turn; None: without.
    """
    sizes_B1 = np.array([[len(text)] for text in texts])
    inside_BT = np.arange(length)[None] < sizes_B1
    zeros_BT = np.zeros((len(texts), length), np.int32)
    shape = (len(texts), -(-length // chunk_len))
    if neighbours is None:
        neighbours_BLKR, mask_BLKR = np.zeros((*shape, 0, 1), np.int32), np.zeros((*shape, 0, 1), bool)
    else:
        neighbours_BLKR, mask_BLKR = (a.reshape(*shape, *a.shape[1:]) for a in (neighbours.tokens_QKR, neighbours.mask_QKR))
    return Batch(
        tokens=padded(texts, length),
        targets=zeros_BT,
        segments=inside_BT.astype(np.int32),
        positions=np.where(inside_BT, np.arange(length)[None], 0).astype(np.int32),
        loss_mask=zeros_BT.astype(np.float32),
        neighbours=neighbours_BLKR,
        neighbour_mask=mask_BLKR,
        first_chunk_len=np.array([trailing_first_chunk_len(len(text), chunk_len) for text in texts], np.int32),
    )


def passages_found(rows: Sequence[Row | None], chunks: ChunkConfig, queries: int) -> Found:
    """For each row ``queries`` times its passages, as many neighbours as the row with the most has; nothing where a
    row has none."""
    widest = max([chunks.num_neighbours, *(len(row.passages) for row in rows if row is not None and row.passages is not None)])
    shape = (len(rows), widest, chunks.retrieved_len)
    tokens_BKR, mask_BKR = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for number, row in enumerate(rows):
        passages = [] if row is None or row.passages is None else row.passages
        tokens_BKR[number, : len(passages)] = padded(passages, chunks.retrieved_len)
        for rank, passage in enumerate(passages):
            mask_BKR[number, rank, : len(passage)] = True
    none_QK = np.full((len(rows) * queries, widest), -1)
    tokens, mask = (np.repeat(a, queries, axis=0) for a in (tokens_BKR, mask_BKR))
    return Found(tokens, mask, none_QK, np.full(none_QK.shape, np.inf, np.float32))
