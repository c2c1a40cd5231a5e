"""Log-likelihoods against the model called on one unpadded row at a time, and what may not change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import TrainConfig
from retro_jax.data.batch import Batch
from retro_jax.errors import UserError
from retro_jax.evaluation.likelihood import Continuation, LogLikelihood, Scorer
from retro_jax.evaluation.remembered import RememberingRetriever
from retro_jax.generation.neighbours import Found
from retro_jax.model import Retro
from retro_jax.model.grid import trailing_first_chunk_len
from tests.model.build import CHUNKS, C, K, R, gpt, randomised, run, small

V, LONGEST = 64, 29
LookUp = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]]
CONFIG = TrainConfig(loss_chunk=48)


@pytest.fixture(scope="module")
def retro() -> Retro:
    return randomised(small(num_layers=1, max_positions=LONGEST, retro={"cca_layers": (1,), "conv_width": 2}))


@pytest.fixture(scope="module")
def plain() -> Retro:
    return randomised(gpt(small(num_layers=1, max_positions=LONGEST, retro={"cca_layers": (1,)})))


def neighbours_of(chunks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours that depend on every token of the chunk, the second one shorter; none for a chunk of one token."""
    tokens_NKR, mask_NKR = np.zeros((len(chunks), K, R), np.int32), np.zeros((len(chunks), K, R), bool)
    for number, chunk in enumerate(chunks):
        random = np.random.default_rng([len(chunk), *chunk])
        tokens_NKR[number] = random.integers(0, V, (K, R))
        mask_NKR[number] = len(chunk) > 1
        mask_NKR[number, 1, R // 2 :] = False
    return tokens_NKR, mask_NKR


def drawn(count: int, seed: int = 0) -> list[Continuation]:
    """Rows of two lengths, each compiled once, in contexts and continuations of all kinds of lengths."""
    random = np.random.default_rng(seed)
    made = []
    for length in random.choice((12, 30), count):
        tokens, cut = tuple(random.integers(0, V, length).tolist()), int(random.integers(max(1, length - 9), length))
        made.append(Continuation(tokens[:cut], tokens[cut:]))
    return made


def log_probabilities(model: Retro, one: Continuation, look_up: LookUp | None) -> np.ndarray:
    """Of every token of the vocabulary at each place of the continuation, [tokens, V]: the row alone, unpadded."""
    tokens = np.array((*one.context, *one.tokens)[:-1], np.int32)
    T, first = len(tokens), trailing_first_chunk_len(len(one.context), C)
    L, found = T // C + 1, []
    if look_up is not None:
        found = [look_up([tokens[max(0, end - C) : end]]) for end in range(first, T + 1, C)]
    shape = (1, L, found[0][0].shape[1] if found else K, R)
    neighbours, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for place, (here_1KR, shown_1KR) in enumerate(found):
        neighbours[:, place], mask[:, place] = here_1KR, shown_1KR
    batch = Batch(
        tokens=tokens[None],
        targets=tokens[None],
        segments=np.ones((1, T), np.int32),
        positions=np.arange(T, dtype=np.int32)[None],
        loss_mask=np.ones((1, T), np.float32),
        neighbours=neighbours,
        neighbour_mask=mask,
        first_chunk_len=np.array([first], np.int32),
    )
    hidden_BTD = run(model, batch, retrieval=look_up is not None)
    logits_TV = np.asarray(hidden_BTD[0], np.float64) @ np.asarray(model.output_table_VD(), np.float64).T
    logits_TV -= np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return logits_TV[-len(one.tokens) :]


def expected(model: Retro, one: Continuation, look_up: LookUp | None) -> LogLikelihood:
    found_TV = log_probabilities(model, one, look_up)
    nats = sum(found_TV[place, token] for place, token in enumerate(one.tokens))
    return LogLikelihood(float(nats), found_TV.argmax(-1).tolist() == list(one.tokens))


class Retrieves:
    """A retriever out of a function."""

    def __init__(self, look_up: LookUp) -> None:
        self._look_up = look_up

    def find(self, queries: Sequence[np.ndarray]) -> Found:
        tokens_QKR, mask_QKR = self._look_up(queries)
        return Found(tokens_QKR, mask_QKR, np.zeros((len(queries), K), np.int64), np.zeros((len(queries), K), np.float32))


def scorer(model: Retro, neighbours: LookUp | None = None, batch_size: int = 4) -> Scorer:
    retriever = None if neighbours is None else RememberingRetriever(Retrieves(neighbours))
    return Scorer(model, CONFIG, longest=LONGEST, batch_size=batch_size, retriever=retriever)


@pytest.mark.parametrize("look_up", [None, neighbours_of], ids=["without", "with neighbours"])
def test_equals_the_model_on_single_rows(retro: Retro, look_up: LookUp | None) -> None:
    asked = drawn(7)
    found = scorer(retro, neighbours=look_up)(asked)
    for one, likelihood in zip(asked, found, strict=True):
        wanted = expected(retro, one, look_up)
        assert likelihood.nats == pytest.approx(wanted.nats, rel=1e-5)  # measured 5e-7
        assert likelihood.greedy == wanted.greedy


def test_neighbours_matter_and_a_gpt_has_none(retro: Retro, plain: Retro) -> None:
    asked = drawn(7)
    with_them, without = (scorer(retro, neighbours=look_up)(asked) for look_up in (neighbours_of, None))
    assert all(abs(a.nats - b.nats) > 1e-3 for a, b in zip(with_them, without, strict=True) if len(a) > 1 and a != b)
    assert sum(a != b for a, b in zip(with_them, without, strict=True)) >= 5
    for one, found in list(zip(asked, scorer(plain, neighbours=neighbours_of)(asked), strict=True))[:3]:
        assert found.nats == pytest.approx(expected(plain, one, None).nats, rel=1e-5)  # measured 3e-7


def test_a_batch_changes_nothing(retro: Retro) -> None:
    asked = drawn(9, seed=1)
    together = scorer(retro, neighbours=neighbours_of)(asked)
    wide = scorer(retro, neighbours=neighbours_of, batch_size=16)(asked[::-1])[::-1]
    for one, first, second in zip(asked, together, wide, strict=True):
        (alone,) = scorer(retro, neighbours=neighbours_of)([one])
        assert first.greedy == second.greedy == alone.greedy
        assert [second.nats, alone.nats] == pytest.approx([first.nats] * 2, rel=1e-5)  # measured 4e-7


def test_all_tokens_together_have_probability_1_in_one_row(retro: Retro, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuations of one token after one context are one row, and exactly one of them is the likeliest."""
    (context,) = {one.context for one in drawn(1, seed=2)}
    model = scorer(retro, neighbours=neighbours_of)
    batches: list[Batch] = []
    computed = model._computed
    monkeypatch.setattr(model, "_computed", lambda rows, batch, by_row: (batches.append(batch), computed(rows, batch, by_row))[1])
    found = model([Continuation(context, (token,)) for token in range(V)])
    assert sum(np.exp(one.nats) for one in found) == pytest.approx(1.0, rel=1e-5)  # measured 2e-7
    assert sum(one.greedy for one in found) == 1
    assert [int((batch.segments > 0).any(1).sum()) for batch in batches] == [1]


def test_greedy_is_what_the_model_would_say(retro: Retro) -> None:
    context = drawn(1, seed=3)[0].context
    model, said = scorer(retro, neighbours=neighbours_of), ()
    for _ in range(2 * C):
        nats = [one.nats for one in model([Continuation(context, (*said, token)) for token in range(V)])]
        said = (*said, int(np.argmax(nats)))
    right, wrong = model([Continuation(context, said), Continuation(context, (*said[:-1], (said[-1] + 1) % V))])
    assert right.greedy and not wrong.greedy


def test_a_query_holds_nothing_that_it_helps_to_predict(retro: Retro) -> None:
    """Whatever the tokens are that a chunk's query is made of, they stand before all that reads its neighbours."""
    asked = Continuation(tuple(range(11)), tuple(range(20, 39)))
    chunks: list[tuple[int, ...]] = []

    def look_up(given: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        chunks.extend(tuple(chunk.tolist()) for chunk in given)
        return neighbours_of(given)

    scorer(retro, neighbours=look_up)([asked])
    # The context's last token ends a chunk; the continuation's last token is no part of any query.
    row = (*asked.context, *asked.tokens[:-1])
    assert chunks == [row[:3], row[3:7], row[7:11], row[11:15], row[15:19], row[19:23], row[23:27]]
    # Other tokens from the i-th on leave the likelihood of the first i as it is.
    whole = scorer(retro, neighbours=neighbours_of)
    for i in (1, C, C + 1, 2 * C):
        other = tuple((token + 7) % V for token in asked.tokens[i:])
        first = whole([Continuation(asked.context, asked.tokens[:i])])[0].nats
        places = log_probabilities(retro, Continuation(asked.context, (*asked.tokens[:i], *other)), neighbours_of)
        assert first == pytest.approx(sum(places[p, t] for p, t in enumerate(asked.tokens[:i])), rel=1e-5)  # measured 4e-7


def test_given_passages_stand_beside_every_chunk(retro: Retro) -> None:
    one = drawn(1, seed=4)[0]
    passages = (tuple(range(30)), (1, 2, 3), (4,))  # more than the model was trained with

    def look_up(chunks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = np.zeros((len(chunks), 3, R), np.int32), np.zeros((len(chunks), 3, R), bool)
        tokens[:, 0], mask[:, 0] = np.arange(R), True
        tokens[:, 1, :3], mask[:, 1, :3] = (1, 2, 3), True
        tokens[:, 2, 0], mask[:, 2, 0] = 4, True
        return tokens, mask

    given = Continuation(one.context, one.tokens, passages)
    (found,) = scorer(retro)([given])
    assert found.nats == pytest.approx(expected(retro, one, look_up).nats, rel=1e-5)  # measured 2e-7
    assert CHUNKS.num_neighbours == 2


def test_rows_are_cut_at_the_left_and_it_is_said_once(retro: Retro, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(5)
    asked = [Continuation(tuple(random.integers(0, V, n).tolist()), (1, 2, 3)) for n in (28, 49, 90)]
    model = scorer(retro, neighbours=neighbours_of)
    found = model(asked)
    model(asked)
    assert capsys.readouterr().err.count("lose their beginning") == 1
    for one, likelihood in zip(asked, found, strict=True):
        wanted = expected(retro, Continuation(one.context[-27:], one.tokens), neighbours_of)
        assert likelihood.nats == pytest.approx(wanted.nats, rel=1e-5)  # measured 4e-7


class Remembering:
    """Keeps results, and stops the pass after so many batches."""

    def __init__(self, batches: int) -> None:
        self.known: dict[Continuation, LogLikelihood] = {}
        self.left = batches

    def get(self, asked: Continuation) -> LogLikelihood | None:
        return self.known.get(asked)

    def add(self, computed) -> None:
        self.known.update(computed)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_stopped_pass_goes_on_to_the_same_numbers(retro: Retro) -> None:
    asked = drawn(14, seed=6)
    whole = scorer(retro, neighbours=neighbours_of)(asked)
    kept = Remembering(2)
    with pytest.raises(KeyboardInterrupt):
        scorer(retro, neighbours=neighbours_of)(asked, kept)
    kept.left = -1
    assert len(kept.known) == 8
    assert scorer(retro, neighbours=neighbours_of)(asked, kept) == whole  # to the last bit
    assert kept.left == -3  # two batches were left to do


def spoilt(model: Retro) -> Retro:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.at[...].set(np.nan), state))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Continuation((), (1,)), "a request has an empty context; give at least one token"),
        (Continuation((1,), ()), "a request has an empty continuation; give at least one token"),
        (Continuation((1,), (1,) * 30), "a continuation has 30 tokens, and a row at most 29; raise HarnessConfig.max_tokens"),
    ],
)
def test_refusals(retro: Retro, asked: Continuation, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scorer(retro)([asked])


def test_numbers_that_are_none_are_told(plain: Retro) -> None:
    model: Callable[[list[Continuation]], object] = scorer(spoilt(plain))
    with pytest.raises(UserError, match="the log-likelihood of 2 tokens after 1 is nan; .* evaluate an earlier --checkpoint"):
        model([Continuation((1,), (2, 3))])
