"""``python -m retro_jax plan``: what a config costs on devices that need not be there."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console

from retro_jax.artefact import write_text
from retro_jax.config import Config, MeshConfig, ModelConfig
from retro_jax.errors import UserError
from retro_jax.model import with_vocab
from retro_jax.parallel.axes import AXES
from retro_jax.planning.compiled import CompiledStep, compile_step
from retro_jax.planning.plan import Plan, make_plan
from retro_jax.planning.report import draw_plans, in_bytes, plan_json, print_plan
from retro_jax.planning.search import gathered_once, nearest_that_fits, on_mesh
from retro_jax.planning.target import TARGETS
from retro_jax.progress import progress_bar


def plan(config: Config, arguments: argparse.Namespace, console: Console) -> None:
    """Count a step of the config's model on the mesh that is asked for, and where it does not fit look for one that does.

    Args:
        config: as loaded.
        arguments: ``mesh``, ``target``, ``compile``, ``json`` and ``png``.
        console: takes the tables.

    Raises:
        UserError: the mesh is not understood or does not divide the model, or there is nothing to compile with.
    """
    target = TARGETS[arguments.target]
    if arguments.mesh is not None:
        try:
            config = on_mesh(config, mesh_of(arguments.mesh, config.mesh))
        except ValueError as error:
            raise UserError(str(error)) from None
    plans: list[tuple[Plan, CompiledStep | None]] = []

    def tell(plan: Plan) -> None:
        compiled = None
        if arguments.compile:
            with console.status(f"compiling for {plan.config.mesh.devices} x {target.name}"):
                compiled = compile_step(plan.config, plan.model, target)
        print_plan(plan, target, console, compiled)
        plans.append((plan, compiled))

    asked = make_plan(config, model_of(config))
    tell(asked)
    if asked.total_memory > target.memory:
        console.print("It does not fit; looking for the nearest that does")
        with progress_bar("candidates") as bar:
            found = nearest_that_fits(config, asked.model, target, lambda mesh, policy: bar.advance(1, f"{sizes(mesh)} {policy}"))
        if found is None:
            console.print("None of up to 4,096 devices does; use fewer rows a step (DataConfig.batch_size) or a smaller model")
        else:
            console.print(f"It fits with --mesh {sizes(found.config.mesh)} --set ModelConfig.recompute={found.model.recompute}:")
            tell(found)
    last = plans[-1][0]
    once = gathered_once(last, target)
    if once is not None:
        console.print(
            f"--set MeshConfig.fsdp_gather=step fits too, with {in_bytes(once.total_memory)}, and receives "
            f"{in_bytes(once.received('fsdp'))} over fsdp in place of {in_bytes(last.received('fsdp'))}"
        )
    if arguments.json is not None:
        write_text(
            Path(arguments.json), json.dumps([plan_json(each, target, compiled) for each, compiled in plans], indent=2) + "\n"
        )
    if arguments.png is not None:
        draw_plans([each for each, _ in plans], target, Path(arguments.png))


def mesh_of(text: str, now: MeshConfig) -> MeshConfig:
    """The mesh of "data=2,tensor=8"; axes that are not named have one device.

    Raises:
        UserError: it is not written so.
    """
    chosen = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.isdecimal():
            raise UserError(f"--mesh has {part!r}; write sizes of {', '.join(AXES)}, as in data=2,tensor=8")
        chosen[axis] = int(size)
    return dataclasses.replace(now, **chosen)  # type: ignore[arg-type]


def model_of(config: Config) -> ModelConfig:
    """The config's model with a vocabulary: its own, or the size that the tokenizer will be trained to.

    Raises:
        UserError: the tokenizer is a file, whose size is not known before it is loaded.
    """
    if config.model.vocab_size is None and config.tokenizer.kind != "train_bpe":
        raise UserError(
            f"the vocabulary of {config.tokenizer.path} is not known yet; give it with --set ModelConfig.vocab_size=SIZE"
        )
    return with_vocab(config.model, config.tokenizer.vocab_size if config.model.vocab_size is None else 1)


def sizes(mesh: MeshConfig) -> str:
    """As ``--mesh`` takes it."""
    return ",".join(f"{axis}={getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1) or "data=1"
