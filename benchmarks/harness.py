"""Our adapter to lm-evaluation-harness beside lm_eval's own `hf` model: the same weights, tasks and requests.

The model is the trained Llama of 260 thousand weights in ../shared/data, read by `retro_jax.interop` on one side and by
transformers on the other, both in float32. For each task every log-likelihood is compared, and what lm_eval makes of them; times
are of the log-likelihoods alone, a task by one side after the same task by the other, after a first pass that compiles.

    python -m benchmarks.harness [--limit 200] [--data ../shared/data] [--tasks mc_arc_easy ...]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from benchmarks.stories260k import BOS, EOD, write_model, write_tokenizer
from benchmarks.timing import cpu_name
from retro_jax.config import TrainConfig
from retro_jax.corpus.tokenizer import JsonTokenizer
from retro_jax.evaluation.harness import RetroLM
from retro_jax.evaluation.harness_tasks import load_tasks
from retro_jax.evaluation.likelihood import Scorer
from retro_jax.interop.checkpoints import open_checkpoint
from retro_jax.interop.slots import form_of, slots, stacked
from retro_jax.model import Retro

TASKS = ("mc_arc_easy", "mc_piqa", "mc_winogrande", "mc_copa", "lm_lambada_openai")
ROW = 1024
RESULTS = Path(__file__).parent / "results" / "harness.json"


def main() -> None:
    """Compare, print a line a task, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=int, default=200, help="documents of a task (default: 200)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    os.environ["DISABLE_MULTIPROC"] = "1"
    with tempfile.TemporaryDirectory() as place:
        folder = write_tokenizer(write_model(Path(place)))
        ours = our_model(folder, given.batch)
        theirs = HFLM(
            pretrained=str(folder), dtype="float32", batch_size=given.batch, add_bos_token=True, device="cpu", max_length=ROW
        )
        tasks = {name: compared(ours, theirs, given.data / name, given.limit) for name in given.tasks}
    result = {
        "what": "our adapter beside lm_eval's hf model: a Llama of 260 thousand weights, float32, one machine, one process",
        "command": "python -m benchmarks.harness",
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": cpu_name(), "device": jax.devices()[0].device_kind},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "lm_eval", "torch", "transformers")},
        },
        "limit": given.limit,
        "batch": given.batch,
        "tasks": tasks,
    }
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, figures in tasks.items():
        difference, speed = figures["largest_difference"], figures["times_as_fast"]
        print(f"{name}: {figures['requests']} requests, largest difference {difference:.1e} nats, {speed:.1f} times as fast")
        print(f"  ours {figures['ours']}\n  hf   {figures['hf']}")


def our_model(folder: Path, batch: int) -> RetroLM:
    """The folder's model, by our reader."""
    opened = open_checkpoint("huggingface", folder, None)
    params = stacked(opened.config, {name: opened.source.read(name) for name in slots(opened.config)})
    graph, state = nnx.split(form_of(opened.config).merge(jax.tree.map(jnp.asarray, params), {}))
    model: Retro = nnx.merge(graph, state)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = JsonTokenizer(file, file.token_to_id(BOS), file.token_to_id(EOD))
    return RetroLM(Scorer(model, TrainConfig(), longest=ROW, batch_size=batch), tokenizer, batch_size=batch)


def compared(ours: RetroLM, theirs: HFLM, path: Path, limit: int) -> dict[str, Any]:
    """One task by both."""
    sides = {"ours": ours, "hf": theirs}
    found: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    metrics: dict[str, Mapping[str, float]] = {}
    for name, model in sides.items():  # compiles, and warms what is cached
        loaded = load_tasks((str(path),), fewshot=None, seed=0)
        told = evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
        (values,) = told["results"].values()
        metrics[name] = {
            key.split(",")[0]: round(value, 6) for key, value in values.items() if key.endswith(",none") and "stderr" not in key
        }
    (task,) = load_tasks((str(path),), fewshot=None, seed=0)["tasks"].values()
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    for name, model in sides.items():
        began = time.perf_counter()
        found[name] = np.array([nats for nats, _ in model.loglikelihood(task.instances)])
        seconds[name] = time.perf_counter() - began
    return {
        "requests": len(task.instances),
        "largest_difference": float(np.abs(found["ours"] - found["hf"]).max()),
        "largest": float(np.abs(found["hf"]).max()),
        **metrics,
        "requests_per_s": {name: round(len(task.instances) / value, 1) for name, value in seconds.items()},
        "times_as_fast": seconds["hf"] / seconds["ours"],
    }


if __name__ == "__main__":
    main()
