"""Where training starts: with the parameters of a checkpoint, and beside them new parts that at first change nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path as FilePath

import jax
import numpy as np

from retro_jax.config import ModelConfig, TrainConfig, resolved
from retro_jax.errors import UserError
from retro_jax.interop.checkpoints import Opened, kind_of, open_checkpoint
from retro_jax.interop.slots import names_by_path, one_array
from retro_jax.training.optimizer import is_retrieval
from retro_jax.training.resume import differences
from retro_jax.training.state import ModelForm, Path, TrainState

# What may differ from the checkpoint: how numbers are computed and drawn, and which positions are seen.
FREE = {("ModelConfig", name) for name in ("implementation", "recompute", "recompute_names", "rotary_scale")}
FREE |= {("ModelConfig", name) for name in ("dropout", "attention_dropout", "init_std", "vocab_multiple")}
FREE |= {("RetroConfig", name) for name in ("neighbour_dropout", "cca_init", "copy_strength")}
FREE |= {("EncoderConfig", name) for name in ("dropout", "attention_dropout", "division")}


def from_checkpoint(state: TrainState, form: ModelForm, config: TrainConfig) -> TrainState:
    """The state of step 0 with the parameters of ``config.start_from``, in float32 and laid out as those that they replace.

    Chunked cross-attention and encoder that the checkpoint does not have start as ``config.new_parts`` says; parts of a Retro
    that the model does not have are left out.

    Raises:
        UserError: the checkpoint is not there, is broken or is of another model; the message has the settings that it needs.
    """
    assert config.start_from is not None
    opened = open_start(config.start_from)
    refuse_other_start(opened, form.config, config.start_from)
    there = set(opened.source.facts)
    replaced: dict[Path, np.ndarray | float] = {}
    for path, names in names_by_path(form.config).items():
        if there.issuperset(names):
            replaced[path] = one_array(form.config, [opened.source.read(name) for name in names], path)
        else:
            assert is_retrieval(path), path
            if config.new_parts == "no_op" and _adds_to_stream(path, form):
                replaced[path] = 0.0

    def put(keys: tuple, old: jax.Array) -> jax.Array:
        path = tuple(key.key for key in keys)
        if path not in replaced:
            return old
        whole = np.broadcast_to(np.asarray(replaced[path], old.dtype), old.shape)
        return jax.make_array_from_callback(old.shape, old.sharding, lambda part: whole[part])

    params, frozen = (jax.tree_util.tree_map_with_path(put, tree) for tree in (state.params, state.frozen))
    return state._replace(params=params, frozen=frozen)


def open_start(start_from: str) -> Opened:
    """The checkpoint that a run starts from.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    path, which = FilePath(start_from), "latest"
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        path, which = path.parent.parent, path.name
    if not path.exists():
        raise UserError(f"TrainConfig.start_from={start_from!r} is not there; name a trained model's folder, or a converted one")
    return open_checkpoint(kind_of(path), path, None, which=which)


def refuse_other_start(opened: Opened, model: ModelConfig, start_from: str) -> None:
    """Refuse a checkpoint of a decoder that computes something else, or of another Retro.

    Raises:
        UserError: with all settings that differ, as they would have to be set.
    """
    wanted, config = _spelled_out(model), _spelled_out(opened.config)
    if model.vocab_size is None:  # known when the tokenizer is
        config = dataclasses.replace(config, vocab_size=None)
    if model.retro is None or config.retro is None:
        wanted, config = (dataclasses.replace(c, retro=None) for c in (wanted, config))
    free = FREE if model.positions == "learned" else FREE | {("ModelConfig", "max_positions")}
    if found := differences(ModelConfig, resolved(config), resolved(wanted), free):
        told = ", ".join(f"{name}={old!r} (not {new!r})" for name, old, new in found)
        raise UserError(f"a model cannot start from {start_from}, which needs {told}")


def _adds_to_stream(path: Path, form: ModelForm) -> bool:
    """Whether chunked cross-attention adds nothing where this parameter is 0; its bias starts at 0."""
    if "cca" not in path:
        return False
    retro = form.config.retro
    assert retro is not None
    return path[-1] == "gate" if retro.gate == "learned" else path[-2:] == ("out", "weight")


def _spelled_out(config: ModelConfig) -> ModelConfig:
    """With the sizes that None stands for."""
    return dataclasses.replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=config.heads_dim,
        ffn_dim=config.ffn_width,
        qkv_bias=config.linear_bias if config.qkv_bias is None else config.qkv_bias,
        retro=None if config.retro is None else dataclasses.replace(config.retro, cca_layers=config.cca_layers),
    )
