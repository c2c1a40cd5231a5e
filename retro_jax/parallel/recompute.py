"""Recomputation of a layer in its backward pass, by a policy over the names in :mod:`retro_jax.config.recompute`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

from retro_jax.config.recompute import Recompute

Result = TypeVar("Result")


def recomputed(layer: Callable[..., Result], recompute: Recompute) -> Callable[..., Result]:
    """The layer, of which the backward pass finds its arguments and what the policy saves or offloads, and computes the rest."""
    if recompute.actions is None:
        return layer
    saved, offloaded = recompute.names("save"), recompute.names("offload")
    policies = jax.checkpoint_policies
    if offloaded:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=saved,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*saved)
    return jax.checkpoint(layer, policy=policy)
