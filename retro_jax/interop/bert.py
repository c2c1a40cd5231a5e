"""Encoders of BERT's form (BERT, MiniLM, E5, BGE, Contriever) in Hugging Face's format: names, layouts and config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from retro_jax.errors import UserError
from retro_jax.interop.convert import finite, refuse_misfit, shapes_there
from retro_jax.interop.files import Source
from retro_jax.interop.format import Entry
from retro_jax.interop.huggingface import require
from retro_jax.interop.layouts import FLAT, KEY_AND_VALUE, SAME, matrix
from retro_jax.model.bert import BertEncoder, BertShape
from retro_jax.training.state import Tree

# Their names of the activations that we compute.
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def _norm(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return (
        Entry((f"{ours}.scale",), (f"{theirs}.LayerNorm.weight",), SAME),
        Entry((f"{ours}.bias",), (f"{theirs}.LayerNorm.bias",), SAME),
    )


MODEL = (
    Entry(("embedding.table",), ("embeddings.word_embeddings.weight",), SAME),
    Entry(("position.table",), ("embeddings.position_embeddings.weight",), SAME),
    Entry(("token_type.table",), ("embeddings.token_type_embeddings.weight",), SAME),
    *_norm("norm_embedding", "embeddings"),
)
POOLER = (
    Entry(("pooler.weight",), ("pooler.dense.weight",), matrix(1)),
    Entry(("pooler.bias",), ("pooler.dense.bias",), SAME),
)
# Within a layer: ours is layers.<i>., theirs encoder.layer.<i>.
LAYER = (
    Entry(("attention.query.weight",), ("attention.self.query.weight",), matrix(1)),
    Entry(("attention.query.bias",), ("attention.self.query.bias",), FLAT),
    Entry(("attention.key_value.weight",), ("attention.self.key.weight", "attention.self.value.weight"), KEY_AND_VALUE),
    Entry(("attention.key_value.bias",), ("attention.self.key.bias", "attention.self.value.bias"), KEY_AND_VALUE),
    Entry(("attention.out.weight",), ("attention.output.dense.weight",), matrix(2)),
    Entry(("attention.out.bias",), ("attention.output.dense.bias",), SAME),
    *_norm("norm_attention", "attention.output"),
    Entry(("ffn.up.weight",), ("intermediate.dense.weight",), matrix(1)),
    Entry(("ffn.up.bias",), ("intermediate.dense.bias",), SAME),
    Entry(("ffn.down.weight",), ("output.dense.weight",), matrix(1)),
    Entry(("ffn.down.bias",), ("output.dense.bias",), SAME),
    *_norm("norm_ffn", "output"),
)
# What checkpoints hold beside the encoder: a buffer, heads of pretraining, and the pooler where none is wanted.
NOT_WEIGHTS = re.compile(r"embeddings\.position_ids|cls\..*|pooler\..*")


def bert_shape(theirs: Mapping[str, Any], *, pooler: bool = False) -> BertShape:
    """The encoder's shape from its ``config.json``.

    Args:
        theirs: the settings.
        pooler: whether the projection of the first token is wanted, which vectors of sentences do without.

    Raises:
        UserError: a setting is missing, or asks for something that we do not compute; the message names it.
    """
    if (kind := theirs.get("model_type")) != "bert":
        raise UserError(f"config.json has model_type={kind!r}; only 'bert' can be read as an encoder")
    for name, value in (("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
        require(theirs, name, value)
    for name in ("pruned_heads", "quantization_config"):
        if given := theirs.get(name):
            raise UserError(f"config.json has {name}={given!r}; only encoders without it can be read")
    try:
        if (activation := theirs["hidden_act"]) not in ACTIVATIONS:
            raise UserError(f"config.json has hidden_act={activation!r}; those that can be read are {', '.join(ACTIVATIONS)}")
        width, heads = theirs["hidden_size"], theirs["num_attention_heads"]
        if width % heads:
            raise UserError(f"config.json has hidden_size={width}, which num_attention_heads={heads} does not divide")
        return BertShape(
            vocab_size=theirs["vocab_size"],
            width=width,
            num_layers=theirs["num_hidden_layers"],
            num_heads=heads,
            ffn_dim=theirs["intermediate_size"],
            max_positions=theirs["max_position_embeddings"],
            token_types=theirs["type_vocab_size"],
            activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
            norm_eps=theirs["layer_norm_eps"],
            pooler=pooler,
        )
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]}") from error


def bert_entries(shape: BertShape) -> list[Entry]:
    """All correspondences between the encoder's parameters and their tensors."""
    layers = [
        Entry(_within(f"layers.{i}.", entry.ours), _within(f"encoder.layer.{i}.", entry.theirs), entry.layout)
        for i in range(shape.num_layers)
        for entry in LAYER
    ]
    return [*MODEL, *layers, *(POOLER if shape.pooler else ())]


def bert_graph(shape: BertShape) -> nnx.GraphDef:
    """The encoder without its numbers, to be merged with :func:`read_bert`'s."""
    return nnx.split(_abstract(shape))[0]


def read_bert(source: Source, shape: BertShape) -> Tree:
    """The parameters as the nested dict that the encoder is merged with, in the dtypes of the checkpoint. Names may begin with
    ``bert.``, and norms may have the ``gamma`` and ``beta`` of the first release.

    Raises:
        UserError: tensors are missing, unexpected, of another shape, or not finite; the message lists them.
    """
    stored = {_plain(name): name for name in source.facts}
    facts = {name: source.facts[given] for name, given in stored.items()}
    places = {tuple(path): variable.shape for path, variable in nnx.to_flat_state(nnx.split(_abstract(shape))[1])}
    shapes = {".".join(map(str, path)): size for path, size in places.items()}
    entries = bert_entries(shape)
    wanted = shapes_there(entries, shapes)
    unexpected = [stored[name] for name in facts if name not in wanted and not NOT_WEIGHTS.fullmatch(name)]
    refuse_misfit(facts, wanted, unexpected, "the weights do not fit config.json as those of a BERT encoder")
    values: dict[str, np.ndarray] = {}
    for entry in entries:
        tensors = [finite(stored[name], source.read(stored[name])) for name in entry.theirs]
        unpacked = entry.layout.unpack(tensors, [shapes[name] for name in entry.ours])
        values.update(zip(entry.ours, unpacked, strict=True))
    return _nested({path: values[".".join(map(str, path))] for path in places})


def _abstract(shape: BertShape) -> BertEncoder:
    return nnx.eval_shape(lambda: BertEncoder(shape, key=jax.random.key(0)))


def _within(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


def _plain(name: str) -> str:
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _nested(flat: Mapping[tuple, np.ndarray]) -> Tree:
    tree: Tree = {}
    for path, value in flat.items():
        place = tree
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    return tree
