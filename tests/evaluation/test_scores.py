"""Sums of losses by chunk, against numbers worked out by hand for a model that predicts its neighbour's first token."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ChunkConfig, ModelConfig, TrainConfig
from retro_jax.data.held_out import held_out_rows
from retro_jax.data.reader import RowReader
from retro_jax.evaluation import scores as scores_module
from retro_jax.evaluation.scores import load_scores, loss_step, score_chunks
from tests.data.memory import EOD, MemoryChunks, MemoryNeighbours

V, C, SCALE = 100, 4, 3.0
UNIFORM = np.log(V)
WRONG = np.log(np.exp(SCALE) + V - 1)
RIGHT = WRONG - SCALE


class FirstNeighbourToken(nnx.Module):
    """Puts ``SCALE`` more on the first token of each chunk's first neighbour; the same logit everywhere without."""

    def __init__(self) -> None:
        self.table, self.config = nnx.Param(jnp.eye(V)), ModelConfig(retro=None)

    def __call__(self, batch, *, retrieval=True):
        if not retrieval:
            return jnp.zeros((*batch.tokens.shape, V))
        there = batch.neighbour_mask[:, :, 0, :1]
        shown = jnp.where(there, SCALE * jax.nn.one_hot(batch.neighbours[:, :, 0, 0], V), 0.0)
        return jnp.repeat(shown, C, axis=1)

    def output_table_VD(self):
        return self.table[...]


# Held out: document 0 = 7 7 7 7 | 8 8, document 1 = 9 9 9 9. Train: one chunk of 7s, one of 8s, one of 9s.
HELD_OUT = MemoryChunks([[7, 7, 7, 7, 8, 8], [9, 9, 9, 9]], C)
TRAIN = MemoryChunks([[7] * 4, [8] * 4, [9] * 4], C)
NEIGHBOURS = MemoryNeighbours([[0], [1], [2]])
BYTES = np.full(V, 2)
BYTES[8], BYTES[EOD] = 5, 0


def tokenizer(bos_id=None, prefix_bytes=0):
    return SimpleNamespace(token_bytes=lambda: BYTES, bos_id=bos_id, prefix_bytes=prefix_bytes)


def score(tmp_path, retrieval=True, donors=None, window=8, stride=4, batch_size=2, key="k", **of_tokenizer):
    reader = RowReader(
        queries=HELD_OUT,
        database=TRAIN,
        neighbours=NEIGHBOURS if retrieval else None,
        chunks=ChunkConfig(chunk_len=C, num_neighbours=1, retrieved_len=8),
        donors=donors,
    )
    rows = held_out_rows(HELD_OUT, window=window, stride=stride)
    step = loss_step(FirstNeighbourToken(), TrainConfig(), retrieval=retrieval)
    return score_chunks(
        step, rows, reader, tokenizer(**of_tokenizer), batch_size, partial=tmp_path / "p.npz", key=key, name="toy"
    )


def test_with_neighbours(tmp_path):
    found = score(tmp_path)
    # Chunk 0 holds targets 7 7 7 (right); its last token predicts 8, which belongs to chunk 1, wrongly; then 8 right, EOD wrong.
    np.testing.assert_allclose(found.nats_N, [3 * RIGHT, WRONG + RIGHT + WRONG, 3 * RIGHT + WRONG], rtol=1e-6)
    np.testing.assert_array_equal(found.targets_N, [3, 3, 4])
    np.testing.assert_array_equal(found.bytes_N, [6, 10, 6])


def test_without_and_with_anothers(tmp_path):
    found = score(tmp_path, retrieval=False)
    np.testing.assert_allclose(found.nats_N, [3 * UNIFORM, 3 * UNIFORM, 4 * UNIFORM], rtol=1e-6)
    found = score(tmp_path, donors=np.array([2, 0, 1]))
    np.testing.assert_allclose(found.nats_N, [3 * WRONG, 3 * WRONG, 4 * WRONG], rtol=1e-6)


def test_windows_and_batches_do_not_change_what_is_counted(tmp_path):
    whole = score(tmp_path)
    for settings in ({"window": 4, "stride": 4}, {"window": 12}, {"batch_size": 1}, {"batch_size": 5}):
        found = score(tmp_path, **settings)
        np.testing.assert_allclose(found.nats_N, whole.nats_N, rtol=1e-6)
        np.testing.assert_array_equal(found.bytes_N, whole.bytes_N)


def test_bytes_that_the_tokenizer_put_before_a_document_are_not_counted(tmp_path):
    # With BOS the first token is a target: here 7 7 stands for BOS and the first token.
    np.testing.assert_array_equal(score(tmp_path, bos_id=7, prefix_bytes=1).bytes_N, [5, 10, 5])
    np.testing.assert_array_equal(score(tmp_path, bos_id=None, prefix_bytes=1).bytes_N, [6, 10, 6])


def test_a_killed_pass_continues_with_the_same_sums(tmp_path, monkeypatch):
    whole = score(tmp_path, window=4, batch_size=1)
    monkeypatch.setattr(scores_module, "SECONDS_BETWEEN_SAVES", 0.0)
    seen = []

    class Killed(BaseException):
        pass

    def dies(scores, batches):
        seen.append(batches)
        if batches == 2:
            raise Killed

    save = scores_module.save_scores
    monkeypatch.setattr(scores_module, "save_scores", lambda path, key, s, n: (save(path, key, s, n), dies(s, n)))
    with pytest.raises(Killed):
        score(tmp_path, window=4, batch_size=1)
    assert load_scores(tmp_path / "p.npz", "k")[1] == 2
    assert load_scores(tmp_path / "p.npz", "other") is None
    read = []
    batches = scores_module.held_out_batches
    monkeypatch.setattr(scores_module, "held_out_batches", lambda *a, **k: (read.append(k["first_batch"]), batches(*a, **k))[1])
    found = score(tmp_path, window=4, batch_size=1)
    assert read == [2] and seen == [1, 2, 3]
    for name in ("nats_N", "targets_N", "bytes_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    monkeypatch.undo()
    monkeypatch.setattr(scores_module, "held_out_batches", lambda *a, **k: (read.append(k["first_batch"]), batches(*a, **k))[1])
    score(tmp_path, window=4, batch_size=1, key="other")
    assert read == [2, 0]
