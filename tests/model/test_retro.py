"""The whole model: what the rows, the neighbours and the switches do to the hidden states."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.model import Retro, count_parameters, with_vocab
from tests.kernels.tolerance import assert_as_good_as
from tests.model.build import C, K, R, gpt, randomised, rows, run, small

PACKED = [1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2]


@pytest.fixture(scope="module")
def model():
    return randomised(small())


def changed(model: Retro, **retro) -> Retro:
    """The same parameters under other settings of RetroConfig."""
    config = dataclasses.replace(model.config, retro=dataclasses.replace(model.config.retro, **retro))
    graph = nnx.split(nnx.eval_shape(lambda: Retro(config, key=jax.random.key(0))))[0]
    return nnx.merge(graph, nnx.split(model)[1])


def test_a_packed_row_gives_what_its_documents_give_alone(model):
    packed = rows(1, segments=PACKED)
    together = run(model, packed)
    for where, chunks in ((slice(0, 6), slice(0, 2)), (slice(8, 12), slice(2, 3))):
        n, c = where.stop - where.start, chunks.stop - chunks.start
        alone = jax.tree.map(np.zeros_like, packed)
        for name in ("tokens", "positions"):
            getattr(alone, name)[:, :n] = getattr(packed, name)[:, where]
        alone.segments[:, :n] = 1
        alone.neighbours[:, :c], alone.neighbour_mask[:, :c] = packed.neighbours[:, chunks], packed.neighbour_mask[:, chunks]
        np.testing.assert_allclose(run(model, alone)[:, :n], together[:, where], atol=1e-5)  # measured 1e-6


def test_missing_neighbours_are_as_no_retrieval(model):
    batch = rows(2)
    off = run(model, batch, retrieval=False)
    nothing = run(model, batch._replace(neighbour_mask=np.zeros_like(batch.neighbour_mask)))
    np.testing.assert_array_equal(nothing, off)
    none_given = run(model, batch._replace(neighbours=batch.neighbours[:, :, :0], neighbour_mask=batch.neighbour_mask[:, :, :0]))
    np.testing.assert_array_equal(none_given, off)
    np.testing.assert_array_equal(run(changed(model, gate=0.0), batch), off)
    assert any(path[-2:] == ("out", "bias") and "cca" in path for path, _ in nnx.to_flat_state(nnx.state(model)))
    assert np.abs(run(model, batch) - off).max() > 0.1


def test_tokens_that_read_nothing_get_what_the_plain_decoder_gives(model):
    batch = rows(3, segments=PACKED)
    with_neighbours, off = run(model, batch)[0], run(model, batch, retrieval=False)[0]
    # Document 1 reads from its 4th token on. Document 2 is one chunk: only its last token reads.
    same = [0, 1, 2, 8, 9, 10]
    np.testing.assert_array_equal(with_neighbours[same], off[same])
    assert np.all(np.abs(with_neighbours - off)[[3, 4, 5, 11]].max(-1) > 0.01)
    mask = batch.neighbour_mask.copy()
    mask[:, 2] = False
    without_the_second = run(model, batch._replace(neighbour_mask=mask))[0]
    np.testing.assert_array_equal(without_the_second[8:], off[8:])
    np.testing.assert_array_equal(without_the_second[:6], with_neighbours[:6])


def test_what_stands_under_a_mask_does_not_matter(model):
    batch = rows(4, segments=PACKED)
    other = batch._replace(
        neighbours=np.where(batch.neighbour_mask, batch.neighbours, 5), tokens=np.where(batch.segments > 0, batch.tokens, 7)
    )
    valid = batch.segments > 0
    np.testing.assert_array_equal(run(model, batch)[valid], run(model, other)[valid])


def test_the_order_of_neighbours_does_not_matter(model):
    batch = rows(5)
    turned = batch._replace(neighbours=batch.neighbours[:, :, ::-1], neighbour_mask=batch.neighbour_mask[:, :, ::-1])
    np.testing.assert_allclose(run(model, turned), run(model, batch), atol=1e-5)


def test_a_full_first_chunk_is_a_row_on_the_grid(model):
    batch = rows(6)
    np.testing.assert_allclose(run(model, batch._replace(first_chunk_len=np.full(2, C, np.int32))), run(model, batch), atol=1e-5)


def test_rows_keep_their_own_first_chunk_length(model):
    """A batch of rows with different grids gives each row what it gives in a batch of its own."""
    batch = rows(7, first=[1, 3])
    together = run(model, batch)
    for row in range(2):
        alone = jax.tree.map(lambda a, row=row: np.repeat(a[row : row + 1], 2, axis=0), batch)
        np.testing.assert_allclose(run(model, alone)[0], together[row], atol=1e-5)
    assert np.abs(together - run(model, rows(7, first=[2, 3]))).max(axis=(1, 2))[0] > 0.01


def test_the_gpt_twin_is_the_decoder_without_the_retrieval_path(model):
    twin_graph = nnx.split(nnx.eval_shape(lambda: Retro(gpt(model.config), key=jax.random.key(0))))[0]
    # The twin's layers are one run of two; the Retro's are two runs of one.
    layers = [nnx.split(stack.group.layers[0])[1] for stack in model.decoder]
    plain = [nnx.State({k: v for k, v in layer.items() if k not in ("cca", "norm_cca")}) for layer in layers]
    twin_state = nnx.State(
        {
            "decoder": {0: {"group": {"layers": {0: jax.tree.map(lambda *a: jnp.concatenate(a), *plain)}}}},
            "embedding": nnx.split(model.embedding)[1],
            "final_norm": nnx.split(model.final_norm)[1],
        }
    )
    batch = rows(8)
    np.testing.assert_allclose(run(nnx.merge(twin_graph, twin_state), batch), run(model, batch, retrieval=False), atol=1e-5)


def test_a_gate_is_a_factor_on_what_cca_adds():
    """With one CCA layer and nothing after it (the feed-forward zeroed, no final norm), the output is linear in the gate."""
    batch = rows(9)
    one = randomised(small(num_layers=1, retro={"cca_layers": (1,)}, final_norm=False))
    graph, state = nnx.split(one)
    down = state["decoder"][0]["group"]["layers"][0]["ffn"]["down"]
    model = nnx.merge(graph, jax.tree.map(lambda p: p, state))
    for name in ("weight", "bias"):
        getattr(model.decoder[0].group.layers[0].ffn.down, name)[...] = jnp.zeros(down[name].shape)  # no feed-forward
    off = run(model, batch, retrieval=False)
    on, half = run(model, batch), run(changed(model, gate=0.5), batch)
    np.testing.assert_allclose(half, (on + off) / 2, atol=1e-5)
    assert np.abs(on - off).max() > 0.1


def test_gate_zero_computes_nothing_of_the_retrieval_path(model):
    batch = rows(10)

    def products(model, **keywords):
        graph, state = nnx.split(model)
        text = str(jax.make_jaxpr(lambda s: nnx.merge(graph, s)(batch, **keywords))(state))
        return text.count("dot_general")

    assert products(changed(model, gate=0.0)) == products(model, retrieval=False) < products(model)


def test_a_learned_gate_of_one_is_no_gate(model):
    batch = rows(11)
    graph, state = nnx.split(nnx.eval_shape(lambda: Retro(small(retro={"gate": "learned"}), key=jax.random.key(0))))
    flat = dict(nnx.to_flat_state(nnx.split(model)[1]))
    filled = [(p, v.replace(jnp.ones(v.shape)) if p[-1] == "gate" else flat[p]) for p, v in nnx.to_flat_state(state)]
    gated = nnx.merge(graph, nnx.from_flat_state(filled))
    np.testing.assert_array_equal(run(gated, batch), run(model, batch))
    gated.decoder[1].group.layers[0].cca.gate[...] = jnp.zeros((1,))
    assert np.abs(run(gated, batch) - run(model, batch)).max() > 0.1


def test_neighbour_dropout_hides_its_share_of_chunks(model):
    hiding = changed(model, neighbour_dropout=0.3)
    batch = rows(12, B=96)
    off, on = run(hiding, batch, retrieval=False), run(hiding, batch)
    np.testing.assert_array_equal(on, run(model, batch))  # no key: nothing is hidden
    drawn = run(hiding, batch, dropout_key=jax.random.key(0, impl="unsafe_rbg"))
    # The fourth token reads chunk 0 only: it is either as without retrieval or as with it.
    hidden = np.all(drawn[:, 3] == off[:, 3], axis=-1)
    np.testing.assert_allclose(drawn[~hidden, 3], on[~hidden, 3], atol=1e-6)
    assert abs(hidden.mean() - 0.3) < 0.15  # a standard error is 0.05
    again, other = (run(hiding, batch, dropout_key=jax.random.key(seed, impl="unsafe_rbg")) for seed in (0, 1))
    np.testing.assert_array_equal(again, drawn)
    assert np.any(other != drawn)


def test_dropout_needs_a_key_and_changes_the_result():
    config = small(dropout=0.2, attention_dropout=0.1, encoder={"dropout": 0.2, "attention_dropout": 0.1})
    dropping, batch = randomised(config), rows(13)
    plain = run(randomised(small()), batch)
    np.testing.assert_array_equal(run(dropping, batch), plain)
    a, b = (run(dropping, batch, dropout_key=jax.random.key(seed, impl="unsafe_rbg")) for seed in (0, 1))
    assert np.isfinite(a).all() and np.abs(a - plain).max() > 0.1 and np.abs(a - b).max() > 0.1


LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "linear_bias": False, "num_heads": 4, "num_kv_heads": 2}


@pytest.mark.parametrize(
    "form", [{}, *(pytest.param(form, marks=pytest.mark.slow) for form in (LLAMA, {"positions": "learned", "num_layers": 4}))]
)
def test_bfloat16_logits_are_as_good_as_the_references(form):
    """Against the same numbers in float64. Measured: the ratio of the errors is 0.75 to 0.94."""
    config = small(**form)
    reference = dataclasses.replace(config, implementation="reference")
    batch, narrow = rows(14), {}
    for name, chosen in (("ours", config), ("reference", reference)):
        narrow[name] = logits(randomised(chosen, dtype=jnp.bfloat16), batch)
        assert narrow[name].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        rounded = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), nnx.split(randomised(reference, dtype=jnp.bfloat16))[1])
        exact = logits(nnx.merge(nnx.split(randomised(reference))[0], rounded), batch)
    assert exact.dtype == np.float64
    assert_as_good_as(narrow["ours"], narrow["reference"], exact, factor=2, name="logits")


def logits(model, batch):
    hidden_BTD = jnp.asarray(run(model, batch))
    return np.asarray(jnp.einsum("btd,vd->btv", hidden_BTD, model.output_table_VD()))


@pytest.mark.slow
def test_numpy_batches_and_eager_calls(model):
    batch = rows(15)
    np.testing.assert_allclose(model(batch), run(model, batch), atol=1e-5)


def test_copy_start_needs_square_projections():
    with pytest.raises(ValueError, match="cca_init='copy' needs"):
        nnx.eval_shape(lambda: Retro(small(num_kv_heads=1, retro={"cca_init": "copy"}), key=jax.random.key(0)))


def test_what_does_not_fit_is_named(model):
    batch = rows(16)
    with pytest.raises(
        ValueError, match=r"12 tokens and neighbours of 2 chunks of ChunkConfig.chunk_len=4; give Batch.first_chunk_len"
    ):
        model(batch._replace(neighbours=batch.neighbours[:, :2], neighbour_mask=batch.neighbour_mask[:, :2]))
    learned = randomised(small(positions="learned", max_positions=8))
    with pytest.raises(ValueError, match=r"rows of 12 tokens do not fit ModelConfig.max_positions=8"):
        learned(batch)
    own = randomised(small(encoder={"positions": "learned"}))
    longer = np.zeros((2, 3, K, R + C), np.int32)
    with pytest.raises(ValueError, match=r"neighbours of 12 tokens do not fit ChunkConfig.retrieved_len=8"):
        own(batch._replace(neighbours=longer, neighbour_mask=longer > 0))
    with pytest.raises(ValueError, match=r"vocab_size is None"):
        Retro(small(vocab_size=None), key=jax.random.key(0))


def test_with_vocab():
    assert with_vocab(small(vocab_size=None), 1000).vocab_size == 1024
    assert with_vocab(small(vocab_size=None, vocab_multiple=1), 1000).vocab_size == 1000
    assert with_vocab(small(vocab_size=1000), 1000).vocab_size == 1000
    with pytest.raises(ValueError, match=r"vocab_size=999 is below the tokenizer's 1000"):
        with_vocab(small(vocab_size=999), 1000)


def test_count_parameters_is_the_sum_by_hand():
    D, F, V = 16, 24, 64
    norm, attention, ffn = 2 * D, 4 * D * D + 4 * D, 2 * D * F + D + F
    plain = 2 * norm + attention + ffn
    crossed = plain + norm + attention
    assert count_parameters(gpt(small())) == V * D + 2 * plain + norm
    assert count_parameters(small()) == V * D + 2 * crossed + norm + crossed  # the encoder's layer is as one with CCA
    assert count_parameters(small(tied_embedding=False)) == count_parameters(small()) + V * D


def test_tied_and_untied_output_tables():
    tied, untied = randomised(small()), randomised(small(tied_embedding=False))
    assert tied.output_table_VD() is tied.embedding.table[...] or np.array_equal(
        tied.output_table_VD(), tied.embedding.table[...]
    )
    assert not np.array_equal(untied.output_table_VD(), untied.embedding.table[...])
    assert untied.output_table_VD().shape == (64, 16)
