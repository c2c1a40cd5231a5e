"""Who sees whom in attention, told in numbers that grow with the length, not with its square."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyMask(NamedTuple):
    """Every query of a problem sees the same keys: bool ``valid_XS``."""

    valid_XS: jax.Array

    def check(self, X: int, Q: int, S: int) -> None:
        """Raise ValueError where this does not fit X problems of Q queries and S keys."""
        if self.valid_XS.shape != (X, S):
            raise ValueError(f"attention: mask {self.valid_XS.shape} is not [X, S] = {(X, S)}")

    def dense(self) -> jax.Array:
        """bool [X, 1, S]."""
        return self.valid_XS[:, None, :]


class CausalMask(NamedTuple):
    """A token sees the keys of its own segment up to its own place; segment 0 is padding, which sees and shows nothing.

    ``key_segments_XS``, int32, are those of a row's tokens, whose segments lie together; the queries are the row's tokens from
    place ``first`` on, with ``segments_XQ``. ``first`` is an int32 scalar, for rows that are divided and keys that are cached;
    None: 0.
    """

    segments_XQ: jax.Array
    key_segments_XS: jax.Array
    first: jax.Array | None = None

    def check(self, X: int, Q: int, S: int) -> None:
        """Raise ValueError where this does not fit X problems of Q queries and S keys."""
        shapes = self.segments_XQ.shape, self.key_segments_XS.shape
        if shapes != ((X, Q), (X, S)):
            raise ValueError(f"attention: segments {shapes[0]} and {shapes[1]} are not [X, Q] = {(X, Q)} and [X, S] = {(X, S)}")

    def dense(self) -> jax.Array:
        """bool [X, Q, S]."""
        Q, S = self.segments_XQ.shape[1], self.key_segments_XS.shape[1]
        place_Q = jnp.arange(Q, dtype=jnp.int32) + (0 if self.first is None else self.first)
        causal_QS = place_Q[:, None] >= jnp.arange(S, dtype=jnp.int32)[None, :]
        segments_XQ1 = self.segments_XQ[:, :, None]
        return causal_QS[None] & (segments_XQ1 == self.key_segments_XS[:, None, :]) & (segments_XQ1 > 0)


Mask = KeyMask | CausalMask
