"""Chunks whose neighbours no token reads leave the batch before the encoder: a chunk that its document ends in, one without
neighbours. The others are packed into a fixed number of places, and so are the queries of the tokens that read them.

Packing is a partial permutation, so each way is a gather, backward too, by the inverse.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Where this device's B * L chunks are packed, in their order, into Y places. An index past the end is none.

    ``chunks_Y`` int32: the chunk of each place. ``places_BL`` int32: the place of each chunk. ``too_few``: some chunk that
    is read has no place.
    """

    chunks_Y: jax.Array
    places_BL: jax.Array
    too_few: jax.Array

    def pack(self, x_BL: jax.Array) -> jax.Array:
        """[B, L, ...] to [1, Y, ...], zeros in an empty place."""
        B, L = self.places_BL.shape
        return _moved(x_BL.reshape(B * L, *x_BL.shape[2:]), self.chunks_Y, self.places_BL.reshape(B * L))[None]

    def last_chunks(self, packed_1Y: jax.Array) -> jax.Array:
        """[1, B, ...]: what is packed of each row's last chunk, zeros where that has no place."""
        return packed_1Y.at[:, self.places_BL[:, -1]].get(mode="fill", fill_value=0)


class Readers(NamedTuple):
    """Which tokens read each place: the C tokens of place y are ``tokens_S`` [y * C : (y + 1) * C], int32 numbers b * T + t, and
    token t of row b finds what it reads at ``answers_BT``."""

    tokens_S: jax.Array
    answers_BT: jax.Array

    def pack(self, q_BT: jax.Array) -> jax.Array:
        """[B, T, ...] to [1, Y * C, ...]."""
        B, T = self.answers_BT.shape
        return _moved(q_BT.reshape(B * T, *q_BT.shape[2:]), self.tokens_S, self.answers_BT.reshape(B * T))[None]

    def unpack(self, o_1S: jax.Array) -> jax.Array:
        """[1, Y * C, ...] to [B, T, ...], zeros for a token that reads nothing."""
        B, T = self.answers_BT.shape
        return _moved(o_1S[0], self.answers_BT.reshape(B * T), self.tokens_S).reshape(B, T, *o_1S.shape[2:])


def places_of(read_BL: jax.Array, count: int) -> Places:
    """Places for the chunks that are read, of which there should be no more than ``count``.

    Args:
        read_BL: bool.
        count: Y.
    """
    B, L = read_BL.shape
    read_N = read_BL.reshape(B * L)
    before_N = jnp.cumsum(read_N, dtype=jnp.int32) - read_N.astype(jnp.int32)
    places_N = jnp.where(read_N & (before_N < count), before_N, count)
    (chunks_Y,) = jnp.nonzero(read_N, size=count, fill_value=B * L)
    return Places(chunks_Y.astype(jnp.int32), places_N.reshape(B, L), read_N.sum() > count)


def readers_of(places: Places, chunk_len: int, *, part_before: bool) -> Readers:
    """The tokens that read each place.

    Args:
        places: of the device's chunks.
        chunk_len: C.
        part_before: B places stand in front, for the chunks that the row's parts on the device before end in: their readers are
            the first C - 1 tokens here.
    """
    (B, L), Y, C = places.places_BL.shape, places.chunks_Y.shape[0], chunk_len
    T, first = L * C, B if part_before else 0
    row_Y, chunk_Y = places.chunks_Y // L, places.chunks_Y % L
    before_B = jnp.arange(B, dtype=jnp.int32) if part_before else jnp.full((B,), Y, jnp.int32)
    if part_before:
        row_Y, chunk_Y = jnp.concatenate([before_B, row_Y]), jnp.concatenate([jnp.full_like(before_B, -1), chunk_Y])
    token_YC = (chunk_Y[:, None] + 1) * C - 1 + jnp.arange(C, dtype=jnp.int32)[None, :]
    there_YC = (token_YC >= 0) & (token_YC < T) & (row_Y < B)[:, None]
    tokens_YC = jnp.where(there_YC, row_Y[:, None] * T + token_YC, B * T)
    places_BL = jnp.where(places.places_BL < Y, places.places_BL + first, first + Y)
    since_T = jnp.arange(T, dtype=jnp.int32) - (C - 1)
    place_BT = jnp.concatenate([before_B[:, None], places_BL], axis=1)[:, since_T // C + 1]
    answers_BT = jnp.where(place_BT < first + Y, place_BT * C + (since_T % C)[None, :], (first + Y) * C)
    return Readers(tokens_YC.reshape(-1), answers_BT)


@jax.custom_vjp
def _moved(x_N: jax.Array, from_M: jax.Array, to_N: jax.Array) -> jax.Array:
    """x at ``from_M``, zeros past its end. Each entry is taken once at most: ``to_N`` says where it went."""
    return x_N.at[from_M].get(mode="fill", fill_value=0)


def _moved_forward(x_N: jax.Array, from_M: jax.Array, to_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _moved(x_N, from_M, to_N), to_N


def _moved_backward(to_N: jax.Array, dy_M: jax.Array) -> tuple[jax.Array, None, None]:
    return dy_M.at[to_N].get(mode="fill", fill_value=0), None, None


_moved.defvjp(_moved_forward, _moved_backward)
