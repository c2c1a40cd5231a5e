"""What is asked of a model, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Why a completion ended: it is as long as was asked, holds a stop string, or the model gave the end of the document.
Finish = Literal["length", "stop", "end"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to be completed.

    Attributes:
        text: what the model reads.
        passages: texts that the encoder reads for every chunk of the row, in place of retrieved neighbours, each up to
            ``ChunkConfig.retrieved_len`` tokens; None: as the engine retrieves.
        seed: of what is drawn for this prompt; the same seed gives the same completion in any batch.
    """

    text: str
    passages: tuple[str, ...] | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """The neighbours that were found at one place of a row.

    Attributes:
        end: tokens of the row (with a BOS) up to the end of the text that was looked for; the token before it is the first to
            read these neighbours.
        query: that text.
        chunks: ids of the training chunks found, nearest first.
        distances: of each.
    """

    end: int
    query: str
    chunks: tuple[int, ...]
    distances: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model gave for a prompt.

    Attributes:
        text: of the new tokens, up to a stop string, which is left out.
        tokens: ids of the new tokens, the end of document left out.
        log_probabilities: of each of ``tokens``, natural logarithm, under the model's unchanged distribution.
        finish: why it ended.
        retrieved: what was found in the database, in the row's order.
    """

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish: Finish
    retrieved: tuple[Retrieved, ...] = ()
