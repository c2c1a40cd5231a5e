"""What a layer keeps, by name, is what the traced layer keeps: in integers, for every kind, policy and division."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax.numpy as jnp
import pytest

from retro_jax.config import ChunkConfig, EncoderConfig, ModelConfig, RetroConfig
from retro_jax.config.recompute import ATTENTIONS, NAMES
from retro_jax.planning.activations import LayerKind, Place, kinds, layer_arrays, saved_bytes
from retro_jax.planning.program import SavedBytes
from tests.parallel.build import B, T, abstract_state, batch, prepared
from tests.planning.layers import named, traced_bytes
from tests.planning.traced import saved_by

KINDS: tuple[LayerKind, ...] = ("plain", "cca", "conditioned encoder", "encoder")
POLICIES = ("none", "selective", "full", "offload")
PLACE = Place(rows=3, tokens=32, chunks=8, neighbours=2, retrieved_len=8)
CHUNKS = ChunkConfig(chunk_len=4, num_neighbours=2, retrieved_len=8)


def model_of(policy: str, *exceptions: str, dropout: float = 0.0, **options: object) -> ModelConfig:
    retro = {key: options.pop(key) for key in ("conv_width", "null_key", "gate", "cca_positions") if key in options}
    encoder = EncoderConfig(num_layers=2, dropout=dropout, attention_dropout=dropout)
    default: dict[str, object] = {
        "vocab_size": 64, "width": 32, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "ffn_dim": 64, "activation": "swiglu",
        "dropout": dropout, "attention_dropout": dropout, "recompute": policy, "recompute_names": exceptions,
        "retro": RetroConfig(chunks=CHUNKS, cca_layers=(2, 4), encoder=encoder, **retro),  # type: ignore[arg-type]
    }  # fmt: skip
    return ModelConfig(**default | options)  # type: ignore[arg-type]


def of_formula(model: ModelConfig, kind: LayerKind, place: Place) -> SavedBytes:
    arrays = layer_arrays(model, kind, place)
    return SavedBytes(saved_bytes(arrays), saved_bytes(arrays, "offload"))


def divided(**sizes: int) -> Place:
    parts = sizes.get("sequence", 1)
    return dataclasses.replace(PLACE, tokens=PLACE.tokens // parts, chunks=PLACE.chunks // parts, **sizes)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_what_its_names_say(kind: LayerKind, policy: str) -> None:
    """With grouped queries; with as many key/value heads as heads, GELU and dropout; with all of CCA's options, in float32."""
    grouped, options = model_of(policy), model_of(policy, conv_width=3, null_key=0.5, gate="learned", rotary_fraction=0.5)
    dropped = model_of(policy, dropout=0.1, num_kv_heads=None, activation="gelu", cca_positions="none")
    for place in (PLACE, divided(tensor=2), divided(tensor=4), divided(sequence=2, tensor=2), divided(fsdp=2)):
        assert of_formula(grouped, kind, place) == traced_bytes(grouped, kind, place), place
    for place in (PLACE, divided(tensor=4)):
        with_dropout, wide = dataclasses.replace(place, dropout=True), dataclasses.replace(place, number_bytes=4)
        assert of_formula(dropped, kind, with_dropout) == traced_bytes(dropped, kind, with_dropout), place
        assert of_formula(options, kind, wide) == traced_bytes(options, kind, wide), place


@pytest.mark.parametrize("kind", [pytest.param("cca", marks=pytest.mark.slow), "conditioned encoder"])
def test_an_exception_changes_what_it_names(kind: LayerKind) -> None:
    """Each name of the layer computed again where the others are saved, and saved where the others are computed again."""
    place = divided(tensor=2)
    for name in parts_of(kind):
        for policy, action in (("selective", "recompute"), ("full", "save"), ("full", "offload")):
            model = model_of(policy, f"{name}={action}")
            assert of_formula(model, kind, place) == traced_bytes(model, kind, place), (policy, name, action)
            if not (policy == "selective" and name.endswith("_gathered")):  # they are computed again anyway
                assert of_formula(model, kind, place) != of_formula(model_of(policy), kind, place), (policy, name)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_name_stands_once_where_its_part_is(policy: str, tensor: int) -> None:
    """A name that is misspelt or left out in the model is missed here. "full" keeps no log-sum-exp: its forward pass has none."""
    seen: Counter[str] = Counter()
    for kind in KINDS:
        expected = [name for name in parts_of(kind) if not (policy == "full" and name.endswith("_lse"))]
        found = named(model_of(policy), kind, divided(tensor=tensor))
        assert found == Counter(expected), kind
        seen |= found
    assert set(seen) == {name for name in NAMES if not (policy == "full" and name.endswith("_lse"))}


def parts_of(kind: LayerKind) -> list[str]:
    """The names that a layer of this kind has."""
    has = {"plain": "attention", "cca": "cca", "conditioned encoder": "cross", "encoder": "attention"}[kind]
    absent = [part for part in ATTENTIONS if part not in ("attention", has)]
    without = [name for name in NAMES if name.split("_")[0] in absent]
    return [name for name in NAMES if name not in without and not (name == "after_cca" and has == "attention")]


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_a_scanned_stack_keeps_so_much_a_layer(policy: str) -> None:
    """Tables of rotary positions aside, which a stack holds once; here positions are learned."""

    def all_layers(count: int) -> int:
        model = model_of(policy, retro=None, positions="learned", max_positions=T, num_layers=count)
        form, optimizer = prepared(model)
        params = abstract_state(form, optimizer).params
        return saved_by(lambda params: jnp.sum(form.merge(params, {})(batch())), params)

    place = Place(rows=B, tokens=T, number_bytes=4)
    model = model_of(policy, retro=None, positions="learned", max_positions=T)
    assert all_layers(6) - all_layers(4) == 2 * saved_bytes(layer_arrays(model, "plain", place))


def test_kinds_of_layers() -> None:
    model = model_of("none")
    assert kinds(model) == list(KINDS) and kinds(dataclasses.replace(model, retro=None)) == ["plain"]
    assert model.retro is not None
    one = dataclasses.replace(model.retro, cca_layers=(1, 2, 3, 4), encoder=EncoderConfig(num_layers=1))
    assert kinds(dataclasses.replace(model, retro=one)) == ["cca", "conditioned encoder"]
    assert kinds(dataclasses.replace(model, retro=dataclasses.replace(one, gate=0.0))) == ["plain"]


def test_the_reference_implementation_is_not_counted() -> None:
    with pytest.raises(ValueError, match="implementation='reference' keeps what JAX asks for"):
        layer_arrays(model_of("none", implementation="reference"), "plain", PLACE)
