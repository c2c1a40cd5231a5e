"""The chunk grid of a row: which chunk a token lies in, and which chunk's neighbours it reads.

With f the row's first chunk length and C the chunk length, chunk 0 is the first f tokens and every later chunk C tokens. Token i
reads the neighbours of chunk floor((i - f + 1) / C): a chunk's last token and the next C - 1 tokens read that chunk's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def trailing_first_chunk_len(num_tokens: int, chunk_len: int) -> int:
    """First chunk length that makes the last chunk end at the row's end (Megatron's rule; RETRO's left padding without pads)."""
    return (num_tokens - 1) % chunk_len + 1


def reads(
    segments_BT: jax.Array,
    chunk_valid_BL: jax.Array,
    *,
    chunk_len: int,
    first_chunk_len_B: jax.Array | None,
    cross_document: bool,
) -> jax.Array:
    """Which tokens read neighbours at all, bool [B, T].

    A token reads if a chunk of its own document ended at or before it in this row (with ``cross_document``: of any document),
    and that chunk has a valid neighbour.

    Args:
        segments_BT: document number in the row, 0 for padding.
        chunk_valid_BL: whether a chunk has any valid neighbour token.
    """
    B, T = segments_BT.shape
    L = chunk_valid_BL.shape[1]
    first_B = jnp.full((B,), chunk_len, jnp.int32) if first_chunk_len_B is None else first_chunk_len_B
    chunk_BT = (jnp.arange(T, dtype=jnp.int32)[None, :] - first_B[:, None] + 1) // chunk_len
    inside = (chunk_BT >= 0) & (chunk_BT < L)
    chunk_BT = jnp.clip(chunk_BT, 0, L - 1)
    readable = inside & jnp.take_along_axis(chunk_valid_BL, chunk_BT, axis=1) & (segments_BT > 0)
    if cross_document:
        return readable
    last_BT = jnp.clip(first_B[:, None] - 1 + chunk_BT * chunk_len, 0, T - 1)
    return readable & (jnp.take_along_axis(segments_BT, last_BT, axis=1) == segments_BT)


def chunks_read(reads_BT: jax.Array, chunk_len: int) -> jax.Array:
    """Which chunks of a row on the grid some token reads, bool [B, L], from which tokens read."""
    B, T = reads_BT.shape
    readers_BT = jnp.pad(reads_BT[:, chunk_len - 1 :], ((0, 0), (0, chunk_len - 1)))
    return readers_BT.reshape(B, T // chunk_len, chunk_len).any(axis=2)


def in_chunks(
    x_BTD: jax.Array, num_chunks: int, chunk_len: int, first_chunk_len_B: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """A row cut into its chunks, [B, L, C, D] with zeros after a short first chunk, and a bool [B, L, C] of the true tokens."""
    B, T, D = x_BTD.shape
    if first_chunk_len_B is None:
        return x_BTD.reshape(B, num_chunks, chunk_len, D), jnp.ones((B, num_chunks, chunk_len), bool)
    first = first_chunk_len_B[:, None]
    place = jnp.arange(num_chunks * chunk_len, dtype=jnp.int32)[None, :]
    token = jnp.where(place < chunk_len, place, place - chunk_len + first)
    valid = (token < T) & ((place >= chunk_len) | (place < first))
    moved = jnp.take_along_axis(x_BTD, jnp.clip(token, 0, T - 1)[:, :, None], axis=1)
    moved = jnp.where(valid[:, :, None], moved, jnp.zeros_like(moved))
    return moved.reshape(B, num_chunks, chunk_len, D), valid.reshape(B, num_chunks, chunk_len)


def chunk_tokens(
    segments_BT: jax.Array, num_chunks: int, chunk_len: int, first_chunk_len_B: jax.Array | None, *, cross_document: bool
) -> jax.Array:
    """The tokens of each chunk that its neighbours may be conditioned on, bool [B, L, C].

    Those are its text tokens; where a document ends inside a chunk, only the tokens of the document that the chunk's last token
    belongs to, because only that document reads the chunk's neighbours (with ``cross_document``: all).
    """
    segments_BLC1, valid_BLC = in_chunks(segments_BT[:, :, None], num_chunks, chunk_len, first_chunk_len_B)
    segments_BLC = segments_BLC1[..., 0]
    valid_BLC = valid_BLC & (segments_BLC > 0)
    if cross_document:
        return valid_BLC
    last_BL1 = segments_BLC[:, :, -1:]
    if first_chunk_len_B is not None:
        short_B11 = jnp.take_along_axis(segments_BLC[:, 0], first_chunk_len_B[:, None] - 1, axis=1)[:, :, None]
        last_BL1 = last_BL1.at[:, :1].set(short_B11)
    return valid_BLC & (segments_BLC == last_BL1)


def reader_positions(length: int, chunk_len: int, first_chunk_len: jax.Array | int | None) -> jax.Array:
    """Rotary position of each token relative to the first token of the neighbours that it reads, int [B or 1, T].

    A chunk's last token stands beside the neighbour's C-th token, the next chunk's tokens beside the continuation (RETRO's
    relative distance i - i' + C - 1).
    """
    first_B = jnp.atleast_1d(jnp.asarray(chunk_len if first_chunk_len is None else first_chunk_len, jnp.int32))
    return (jnp.arange(length, dtype=jnp.int32)[None, :] - first_B[:, None] + 1) % chunk_len + chunk_len - 1
