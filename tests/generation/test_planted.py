"""With live retrieval a model completes passages that stand only in a database; without, it cannot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.planted import CHUNK, CHUNKS, WORDS, planted_config, spoken
from retro_jax.config import Config, GenerateConfig
from retro_jax.generation.opening import open_engine
from retro_jax.generation.prompt import Completion, Prompt
from retro_jax.prepare import prepare, prepare_database
from retro_jax.training.train import train_all
from tests.test_planted_corpus import planted_documents

GREEDY = GenerateConfig(max_new_tokens=CHUNK, temperature=0.0, batch_size=16, end_of_document="never")


def asked(folder: Path, config: Config, prompts: list[Prompt], **how: object) -> list[Completion]:
    generation = dataclasses.replace(GREEDY, retrieval="none" if how.pop("without", False) else "live")
    opened = open_engine(dataclasses.replace(config, generation=generation), folder / "data", folder / "work", **how)  # type: ignore[arg-type]
    return opened.engine.complete(prompts)


def check_completions(folder: Path, documents: int, steps: int, count: int) -> None:
    """Of documents of another database than the one trained with: the first chunk is the prompt, the second is wanted."""
    texts, _ = planted_documents(documents, seed=0)
    config = planted_config(folder, texts, steps, baselines=("gpt",))
    train_all(config, prepare(config, folder / "data", lambda _: None), folder / "work")
    random = np.random.default_rng(1)
    new = [spoken(words) for words in random.integers(0, WORDS, (count, CHUNK * CHUNKS))]
    (folder / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in new))
    corpus = dataclasses.replace(config.corpus, sources=(str(folder / "new.jsonl"),), test_fraction=0.0)
    other = dataclasses.replace(config, corpus=corpus)
    database = prepare_database(other, folder / "other", lambda _: None)

    prompts = [Prompt(text=text[: 5 * CHUNK]) for text in new]
    wanted = [text[5 * CHUNK : 10 * CHUNK].split() for text in new]

    def right(**how: object) -> float:
        written = [done.text.split() for done in asked(folder, config, prompts, **how)]
        pairs = [pair for words in zip(written, wanted, strict=True) for pair in zip(*words, strict=False)]
        return sum(a == b for a, b in pairs) / (CHUNK * count)

    live = right(database=folder / "other")
    others = {
        "without": right(without=True, database=folder / "other"),
        "the database trained with": right(),
        "gpt": right(model="gpt"),
    }
    print({"live": live, **others})
    assert live > 0.9
    assert max(others.values()) < 0.05, others

    # What is found is what the database finds, the prompt's own chunk first.
    found = asked(folder, config, prompts[:3], database=folder / "other")
    ids_QK, distances_QK = database.nearest_chunks([prompt.text for prompt in prompts[:3]], 2)
    for completion, ids_K, distances_K, text in zip(found, ids_QK, distances_QK, new, strict=False):
        first, *_ = completion.retrieved
        assert first.end == CHUNK and first.query == text[: 5 * CHUNK]
        assert first.chunks == tuple(ids_K) and first.distances == pytest.approx(distances_K)
        assert first.distances[0] < first.distances[1]


@pytest.mark.slow
def test_passages_that_stand_only_in_the_database(tmp_path: Path) -> None:
    check_completions(tmp_path, documents=1200, steps=220, count=40)
