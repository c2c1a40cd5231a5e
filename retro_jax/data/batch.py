"""What one step of training or evaluation reads."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # NumPy's in the pipeline, whose worker processes run without JAX; JAX's in the model


class Batch(NamedTuple):
    """Rows of text on the chunk grid, with each chunk's neighbours. A pytree; NumPy arrays from the pipeline.

    A row holds one or more segments: documents, or parts of one, that do not see each other. Each starts at a chunk's first
    token. A chunk that its document ends in is padded to C tokens; a row without enough chunks is padded with empty ones.
    """

    tokens: Array
    """int32 [B, T]: token ids, 0 in padding."""
    targets: Array
    """int32 [B, T]: the document's next token, also past the row's end; EOD after its last one; 0 in padding."""
    segments: Array
    """int32 [B, T]: 1, 2, ... in a row's order; 0 marks padding."""
    positions: Array
    """int32 [B, T]: from 0 at each segment's first token; 0 in padding."""
    loss_mask: Array
    """float32 [B, T]: 1 where the target counts, 0 elsewhere (padding; in held-out windows, what another window scores)."""
    neighbours: Array
    """int32 [B, L, K, R]: tokens of each chunk's neighbours, nearest first; 0 where masked. K is 0 in rows read without."""
    neighbour_mask: Array
    """bool [B, L, K, R]: True for a token, False where a neighbour is missing or its document has ended."""
    first_chunk_len: Array | None = None
    """int32 [B] in 1..C: tokens of each row's first chunk; None: C, as in all rows read from a chunk table (T = L * C)."""
