"""Who can influence whom, by gradient: exactly zero wherever the rules say that nothing is seen.

Every token of the row and of its neighbours has an id of its own, so the gradient of one row of the embedding table is the
gradient of one token.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from tests.model.build import C, K, R, randomised, rows, small

T, L = 12, 3
# name: segments, first chunk length (None: on the grid), cross_document
CASES = {
    "one document on the grid": ([1] * 12, None, False),
    "two documents and padding": ([1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2], None, False),
    "a short first chunk, a document that ends inside a chunk": ([1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2], [3], False),
    "reading across documents": ([1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2], [3], True),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def influence(request):
    """(segments, first, cross, who influences token i: bool [T, T] for tokens and [T, L, K, R] for neighbour tokens, mask)."""
    segments, first, cross = CASES[request.param]
    # A layer before the first CCA, and one after it, so that what was read moves on.
    retro = {"cross_document": cross, "cca_layers": (2, 3)}
    config = small(num_layers=3, vocab_size=T + L * K * R, tied_embedding=False, encoder={"num_layers": 2}, retro=retro)
    batch = rows(B=1, T=T, L=L, segments=segments, first=first)
    batch = batch._replace(
        tokens=np.arange(T, dtype=np.int32)[None], neighbours=np.arange(T, T + L * K * R, dtype=np.int32).reshape(1, L, K, R)
    )
    graph, state = nnx.split(randomised(config))
    directions = np.random.default_rng(1).standard_normal((T, config.width)).astype(np.float32)
    by_id = np.asarray(gradients(graph, state, batch, np.eye(T, dtype=np.float32)[:, :, None] * directions[:, None]))
    touched = np.any(by_id != 0.0, axis=-1)  # [T, ids]
    neighbours = touched[:, T:].reshape(T, L, K, R)
    return segments, C if first is None else first[0], cross, touched[:, :T], neighbours, batch.neighbour_mask[0]


@jax.jit(static_argnums=0)
def gradients(graph, state, batch, cotangents):
    """The gradient of each cotangent's product with the hidden states by the embedding table."""
    pull = jax.vjp(lambda s: nnx.merge(graph, s)(batch)[0], state)[1]
    return jax.vmap(lambda row: pull(row)[0]["embedding"]["table"][...])(cotangents)


def chunk_read_by(i: int, segments: list[int], first: int, cross: bool) -> int | None:
    """The chunk whose neighbours token i reads."""
    chunk = (i - first + 1) // C
    if not 0 <= chunk < L or segments[i] == 0:
        return None
    return chunk if cross or segments[first - 1 + chunk * C] == segments[i] else None


def sources(i: int, segments: list[int]) -> list[int]:
    """The tokens that token i sees by self-attention."""
    return [] if segments[i] == 0 else [j for j in range(i + 1) if segments[j] == segments[i]]


def tokens_of(chunk: int, first: int) -> range:
    return range(first) if chunk == 0 else range(first + (chunk - 1) * C, first + chunk * C)


def test_neighbours_reach_their_readers_and_what_follows_in_the_document(influence):
    segments, first, cross, _, neighbours, mask = influence
    expected = np.zeros((T, L), bool)
    for i in range(T):
        for t in sources(i, segments):
            chunk = chunk_read_by(t, segments, first, cross)
            if chunk is not None:
                expected[i, chunk] = True
    # every valid token of both neighbours, and no masked one
    np.testing.assert_array_equal(neighbours, expected[:, :, None, None] & mask[None])


def test_tokens_see_their_documents_past_and_what_chunks_were_conditioned_on(influence):
    segments, first, cross, tokens, *_ = influence
    expected = np.zeros((T, T), bool)
    for i in range(T):
        expected[i, i] = True  # padding keeps its own embedding
        for t in sources(i, segments):
            expected[i, t] = True
            chunk = chunk_read_by(t, segments, first, cross)
            if chunk is not None:
                for c in tokens_of(chunk, first):
                    if cross or segments[c] == segments[t]:
                        expected[i, sources(c, segments)] = True
    np.testing.assert_array_equal(tokens, expected)
    assert not np.any(np.triu(tokens, 1)), "a token sees a later one"
    if not cross:
        documents = np.asarray(segments)
        assert not np.any(tokens[documents[:, None] != documents[None, :]]), "a document sees another one"
