"""The proof that retrieval is learnt: text of random words that can be predicted through neighbours and in no other way.

Documents are random words on the chunk grid. A pair of chunks in a document repeats a pair of another document, so that the first
of the pair finds that passage as its neighbour, and the second stands there word for word as the continuation.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.planted import CHUNK, CHUNKS, WORDS, planted_config, spoken
from retro_jax.config import Config
from retro_jax.corpus.split import split_of_text
from retro_jax.data.held_out import held_out_batches, held_out_rows, shuffled_donors, target_chunks
from retro_jax.data.reader import RowReader
from retro_jax.evaluation.scores import loss_step
from retro_jax.prepare import Prepared, prepare
from retro_jax.training.train import train_all
from retro_jax.training.trained import load_trained

PLANTED_SHARE = 0.5


def planted_documents(count: int, seed: int) -> tuple[list[str], list[dict[int, int]]]:
    """Texts, and for each document {chunk that continues a repeated passage: the document it stands in}."""
    random = np.random.default_rng(seed)
    words_DLC = random.integers(0, WORDS, (count, CHUNKS, CHUNK))
    planted: list[dict[int, int]] = [{} for _ in range(count)]
    for document in range(CHUNKS, count):
        # Passages of the documents' own, and each source once in a document, so that nothing repeats within it.
        sources = random.choice(document, CHUNKS // 2, replace=False)
        chunk = 0
        for source in sources:
            place = random.integers(0, CHUNKS - 1)
            own = not {place - 1, place, place + 1, place + 2} & planted[source].keys()
            if chunk + 1 < CHUNKS and own and random.random() < PLANTED_SHARE:
                words_DLC[document, chunk : chunk + 2] = words_DLC[source, place : place + 2]
                planted[document][chunk + 1] = int(source)
                chunk += 1
            chunk += 1
    return [spoken(words) for words in words_DLC], planted


def planted_losses(
    config: Config, prepared: Prepared, model, predictable: np.ndarray, *, retrieval: bool, donors=None
) -> np.ndarray:
    """Mean loss of the predictable chunks by place in the chunk, [C], in units of log V."""
    table = prepared.tables["test"]
    reader = RowReader(
        queries=table,
        database=prepared.tables["train"],
        neighbours=prepared.neighbours["test"],
        chunks=config.chunks,
        donors=donors,
    )
    rows = held_out_rows(table, window=config.evaluation.window, stride=config.evaluation.stride)
    step, losses = loss_step(model, config.training, retrieval=retrieval), []
    for batch, ids_BL in held_out_batches(rows, reader, 16):
        chunks_BT = target_chunks(ids_BL, table)
        chosen = (
            (batch.loss_mask > 0)
            & (chunks_BT >= 0)
            & predictable[np.maximum(chunks_BT, 0)]
            & (batch.targets != prepared.tokenizer.eod_id)
        )
        place_BT = np.broadcast_to((np.arange(chunks_BT.shape[1]) + 1) % CHUNK, chunks_BT.shape)
        losses.append(np.stack([place_BT[chosen], np.asarray(step(batch))[chosen]]))
    place_N, loss_N = np.concatenate(losses, axis=1)
    return np.asarray([loss_N[place_N == place].mean() for place in range(CHUNK)]) / math.log(WORDS)


def check_planted(folder: Path, documents: int, steps: int, *, baselines: tuple[str, ...] = ()) -> None:
    texts, planted = planted_documents(documents, seed=0)
    config = planted_config(folder, texts, steps, baselines=baselines)
    prepared = prepare(config, folder / "data")
    train_all(config, prepared, folder / "work")
    trained = load_trained(config, prepared.tokenizer.vocab_size, folder / "work")

    splits = [split_of_text(text, "", config.corpus) for text in texts]
    held_out = [d for d in range(documents) if splits[d] == "test"]
    table = prepared.tables["test"]
    assert table.num_chunks == len(held_out) * CHUNKS
    predictable = np.asarray([c in planted[d] and splits[planted[d][c]] == "train" for d in held_out for c in range(CHUNKS)])
    assert predictable.sum() > 50

    def losses(name: str, **how) -> np.ndarray:
        return planted_losses(config, prepared, trained[name][0], predictable, **{"retrieval": True, **how})

    on = losses("retro")
    off = losses("retro", retrieval=False)
    shuffled = losses("retro", donors=shuffled_donors(table, prepared.neighbours["test"], 2, seed=0))
    ids = np.arange(table.num_chunks)
    late = losses("retro", donors=np.where(ids % CHUNKS > 0, ids - 1, -1))
    early = losses("retro", donors=np.where(ids % CHUNKS < CHUNKS - 1, ids + 1, -1))
    controls = {"off": off, "shuffled": shuffled, "a chunk late": late, "a chunk early": early}
    controls |= {name: losses(name) for name in baselines}
    print({"on": on.mean(), **{name: control.mean() for name, control in controls.items()}})
    # The loss of every place in the chunk counts: its first token is predicted by the last token of the chunk before, and a
    # CCA that is off by one token would miss it.
    assert on.mean() < 0.2 and on.max() < 0.35, on
    for name, control in controls.items():
        assert control.mean() > 0.9, (name, control)


def test_retrieval_is_learnt(tmp_path: Path) -> None:
    check_planted(tmp_path, documents=1200, steps=170)


@pytest.mark.slow
def test_retrieval_is_learnt_at_length(tmp_path: Path) -> None:
    check_planted(tmp_path, documents=6000, steps=400, baselines=("gpt",))


def test_the_predictable_words_stand_nowhere_else() -> None:
    """In the documents themselves: a planted chunk's words follow nothing in their own document that tells them."""
    texts, planted = planted_documents(50, seed=1)
    for text, chunks in zip(texts, planted, strict=True):
        words = np.asarray(text.split()).reshape(CHUNKS, CHUNK)
        for chunk in chunks:
            others = np.delete(words, chunk, axis=0).tolist()
            assert words[chunk].tolist() not in others
