"""Decoding with a cache equals the full forward pass over the same grid and the same neighbours, token by token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import GenerateConfig, ModelConfig
from retro_jax.generation.engine import Engine
from retro_jax.generation.neighbours import chunks_of
from retro_jax.generation.prompt import Completion, Prompt
from retro_jax.model import Retro, unstacked
from tests.generation.build import RandomNeighbours, Words, text
from tests.generation.full_forward import logits_by_table
from tests.model.build import CHUNKS, C, gpt, randomised, rows, run, small

NEW = 11
GREEDY = GenerateConfig(max_new_tokens=NEW, temperature=0.0, end_of_document="never", batch_size=4, burst=4)
PROMPTS = (3, 4, 7, 8)
# Largest difference of log-probabilities seen, 3e-6 (float32).
TOLERANCE = 1e-4
# Of three layers, but for the first form.
FORMS: dict[str, dict[str, Any]] = {
    "two layers": {"num_layers": 2, "retro": {"cca_layers": (1, 2), "conv_width": 3, "null_key": 0.5}},
    "rotary, conditioned": {"retro": {"cca_layers": (2, 3)}},
    "Llama: grouped queries, swiglu, RMSNorm": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "activation": "swiglu",
        "norm": "rmsnorm",
        "linear_bias": False,
        "tied_embedding": False,
        "rotary_fraction": 0.5,
        "retro": {"cca_layers": (2, 3)},
    },
    "GPT: learned positions, CCA without positions": {
        "positions": "learned",
        "retro": {"cca_layers": (2,), "cca_positions": "none", "gate": "learned"},
        "encoder": {"positions": "learned"},
    },
    "not conditioned, padding attended": {
        "retro": {"cca_layers": (1, 3)},
        "encoder": {"conditioning": "none", "padding": "attended", "final_norm": True},
    },
    "conditioned, padding attended": {"retro": {"cca_layers": (2,)}, "encoder": {"padding": "attended"}},
}
SMALL = "two layers"
MARKED = [pytest.param(FORMS[form], id=form, marks=[] if form == SMALL else [pytest.mark.slow]) for form in FORMS]


def model_of(form: dict[str, Any]) -> Retro:
    form = {"num_layers": 3, "max_positions": 64, **form}
    return randomised(small(**form))


def prompts_of(seed: int, lengths: tuple[int, ...] = PROMPTS) -> list[Prompt]:
    random = np.random.default_rng(seed)
    return [Prompt(text=text(random, length), seed=number) for number, length in enumerate(lengths)]


def engine_of(model: Retro, config: GenerateConfig = GREEDY) -> tuple[Engine, RandomNeighbours]:
    found = RandomNeighbours(CHUNKS)
    return Engine(model, Words(), config, found), found


def check_by_full_forward(model: Retro, prompt: Prompt, completion: Completion, step: int, *, retrieves: bool = True) -> None:
    """The completion's log-probabilities are those of one full forward pass, and each token is the most probable one."""
    tokens = np.array([*map(int, prompt.text.split()), *completion.tokens], np.int32)
    start = len(tokens) - len(completion.tokens)
    found = RandomNeighbours(CHUNKS)
    ends = list(np.cumsum([len(chunk) for chunk in chunks_of(tokens[:start], C)]))
    sets = [(end, chunk) for end, chunk in zip(ends, chunks_of(tokens[:start], C), strict=True)]
    sets += [(end, tokens[max(0, end - C) : end]) for end in range(start + step, len(tokens) + 1, step)]
    logits_TV = logits_by_table(model, tokens, [(end, text, found.find_one(text)) for end, text in sets if retrieves])
    log_TV = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))
    expected = log_TV[np.arange(start - 1, len(tokens) - 1), tokens[start:]]
    np.testing.assert_allclose(completion.log_probabilities, expected, atol=TOLERANCE, rtol=0)
    allowed = log_TV[start - 1 : -1, : Words().eod_id]  # neither the end nor what fills up the table is drawn
    assert allowed.argmax(axis=1).tolist() == list(completion.tokens)


@pytest.mark.parametrize("form", MARKED)
@pytest.mark.parametrize("step", [C, 3])
def test_decoding_equals_the_full_forward_pass(form: dict[str, Any], step: int) -> None:
    model, prompts = model_of(form), prompts_of(1)
    engine, _ = engine_of(model, dataclasses.replace(GREEDY, retrieval_step=step))
    for prompt, completion in zip(prompts, engine.complete(prompts), strict=True):
        check_by_full_forward(model, prompt, completion, step)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_lengths_batches_and_steps(seed: int) -> None:
    random = np.random.default_rng(seed)
    model = model_of(FORMS[SMALL])
    prompts = prompts_of(seed, tuple(random.integers(1, 21, 7).tolist()))
    step = int(random.integers(1, C + 1))
    config = dataclasses.replace(
        GREEDY, retrieval_step=step, batch_size=int(random.integers(1, 6)), burst=int(random.integers(1, 9))
    )
    engine, _ = engine_of(model, config)
    for prompt, completion in zip(prompts, engine.complete(prompts), strict=True):
        check_by_full_forward(model, prompt, completion, step)


def test_rechunking_at_each_full_chunk_changes_nothing() -> None:
    """The papers' form, through the model's own forward pass: with a step of one chunk the grid stays where it is."""
    model, prompts = model_of(FORMS[SMALL]), prompts_of(2)
    engine, _ = engine_of(model)
    kept = engine.complete(prompts)
    slow = engine.complete(prompts, dataclasses.replace(GREEDY, grid="rechunked"))
    for one, other in zip(kept, slow, strict=True):
        assert one.tokens == other.tokens and one.retrieved == other.retrieved
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=TOLERANCE, rtol=0)


def test_rechunking_more_often_lays_the_grid_anew() -> None:
    model, prompts = model_of(FORMS[SMALL]), prompts_of(3, (5,))
    config = dataclasses.replace(GREEDY, grid="rechunked", retrieval_step=2, max_new_tokens=3)
    engine, found = engine_of(model, config)
    (completion,) = engine.complete(prompts)
    tokens = [*map(int, prompts[0].text.split()), *completion.tokens]
    # 5 tokens are chunks of 1 and 4, 7 tokens chunks of 3 and 4.
    assert found.asked == [tokens[:1], tokens[1:5], tokens[:3], tokens[3:7]]
    assert [place.end for place in completion.retrieved] == [3, 7]


@pytest.mark.parametrize("without", ["a GPT", pytest.param("retrieval none", marks=pytest.mark.slow)])
def test_without_neighbours(without: str) -> None:
    model, prompts = model_of(FORMS[SMALL]), prompts_of(4)
    if without == "a GPT":
        config: ModelConfig = gpt(model.config)
        model = randomised(config)
        engine = Engine(model, Words(), GREEDY)
    else:
        engine = Engine(model, Words(), dataclasses.replace(GREEDY, retrieval="none"))
    for prompt, completion in zip(prompts, engine.complete(prompts), strict=True):
        tokens = np.array([*map(int, prompt.text.split()), *completion.tokens], np.int32)
        logits_TV = logits_by_table(model, tokens, [])
        log_TV = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))[len(tokens) - NEW - 1 : -1]
        np.testing.assert_allclose(completion.log_probabilities, log_TV[range(NEW), completion.tokens], atol=TOLERANCE, rtol=0)


def test_a_row_alone_gives_what_it_gives_in_a_batch() -> None:
    """Drawn, not greedy: the draw belongs to the prompt's seed, and neither to its place nor to the rows beside it."""
    model, prompts = model_of(FORMS[SMALL]), prompts_of(5)
    engine, _ = engine_of(model, dataclasses.replace(GREEDY, temperature=1.0, top_k=20))
    together = engine.complete(prompts)
    for prompt, completion in list(zip(prompts, together, strict=True))[2:]:
        (alone,) = engine.complete([prompt])
        assert alone.tokens == completion.tokens and alone.retrieved == completion.retrieved
        np.testing.assert_allclose(alone.log_probabilities, completion.log_probabilities, atol=1e-5, rtol=0)
    turned = engine.complete(prompts[::-1])[::-1]
    assert [completion.tokens for completion in turned] == [completion.tokens for completion in together]


def test_neighbours_that_arrive_leave_what_was_computed_as_it_is() -> None:
    """Two databases that differ only in what they have for a text of the completion give the same bits before it is read."""
    model, prompts = model_of(FORMS[SMALL]), prompts_of(6)

    class Other(RandomNeighbours):
        searches = 0

        def find(self, queries: Any) -> Any:
            found, self.searches = super().find(queries), self.searches + 1
            if self.searches < 3:  # prompts, the first chunk of the completion, and then the second
                return found
            return found._replace(tokens_QKR=(found.tokens_QKR + 7) % 50)

    one = Engine(model, Words(), GREEDY, RandomNeighbours(CHUNKS)).complete(prompts)
    other = Engine(model, Words(), GREEDY, Other(CHUNKS)).complete(prompts)
    for a, b in zip(one, other, strict=True):
        # New token 2 C is drawn by the first token that reads the second chunk's neighbours.
        assert a.log_probabilities[: 2 * C] == b.log_probabilities[: 2 * C]
    assert any(a.log_probabilities[2 * C] != b.log_probabilities[2 * C] for a, b in zip(one, other, strict=True))


def test_passages_stand_in_for_neighbours() -> None:
    """A prompt's passages are read by every chunk, in whatever batch; more of them, and shorter ones, than neighbours."""
    model, prompts = model_of(FORMS[SMALL]), prompts_of(7)
    random = np.random.default_rng(0)
    passages = tuple(text(random, length) for length in (8, 3, 30))
    prompts[1] = dataclasses.replace(prompts[1], passages=passages)
    prompts[2] = dataclasses.replace(prompts[2], passages=())
    engine, found = engine_of(model)
    mixed = engine.complete(prompts)
    check_by_full_forward(model, prompts[0], mixed[0], C)
    check_by_full_forward(model, prompts[3], mixed[3], C)
    check_by_full_forward(model, prompts[2], mixed[2], C, retrieves=False)
    given = [dataclasses.replace(prompt, passages=prompt.passages or ()) for prompt in prompts]
    alone = engine.complete(given, dataclasses.replace(GREEDY, retrieval="given"))
    for one, other in [(mixed[1], alone[1]), (mixed[2], alone[2])]:
        assert one.tokens == other.tokens and not one.retrieved
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5, rtol=0)
    read = [tuple(map(int, passage.split()))[: CHUNKS.retrieved_len] for passage in passages]
    assert not [query for query in found.asked if tuple(query) in read]


@pytest.mark.slow
def test_half_precision_runs() -> None:
    model, prompts = model_of(FORMS[SMALL]), prompts_of(8)
    engine = Engine(model, Words(), dataclasses.replace(GREEDY, max_new_tokens=5), RandomNeighbours(CHUNKS), dtype=jnp.bfloat16)
    assert all(len(completion.tokens) == 5 for completion in engine.complete(prompts))


def test_unstacked_layers_are_the_model() -> None:
    model = randomised(small(num_layers=6, retro={"cca_layers": (2, 4, 6)}))
    single, batch = unstacked(model), rows()
    assert [stack.count for stack in model.decoder] == [1, 1, 2] and [stack.count for stack in single.decoder] == [1] * 6
    assert [layer.cca is not None for layer in single.layers()] == [False, True, False, True, False, True]
    np.testing.assert_array_equal(run(single, batch), run(model, batch))
