"""What retrieval gives, over several seeds: one config trained once a seed on the same data, and the spread of its results.

    python -m benchmarks.seeds --config quickstart --seeds 0 1 2 --output benchmarks/results/quickstart.json

With ``--equal-time`` the GPT is also trained for as long as the Retro, on as many more rows: as many steps more as its step is
shorter, measured first, side by side. Run again to continue: each run is resumed, or skipped where it is done.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.step_time import step_ratio
from retro_jax.evaluation.perplexity import evaluate_perplexity
from retro_jax.gin_config import load_config
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import with_vocab
from retro_jax.prepare import prepare
from retro_jax.training.trained import load_trained
from retro_jax.training.twins import gpt_twin

REPOSITORY = Path(__file__).resolve().parent.parent
EQUAL_TIME = "gpt_equal_time"
KEPT = ("models", "differences", "bytes_share", "documents", "targets", "bytes", "python", "versions", "device", "in_words")


def main() -> int:
    """Train, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a config, as for train.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of parameters, dropout and row order")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="CLASS.FIELD=VALUE", help="as for train.py"
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/seeds"), help="holds the data and one workdir a seed")
    parser.add_argument("--equal-time", action="store_true", help="also train the GPT for as long as the Retro")
    parser.add_argument("--corpus", default="", help="what the corpus is and where it comes from, for the record")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    keep_freed_memory()
    ratio = _step_ratio(arguments) if arguments.equal_time else None
    runs = [_run(arguments, seed, ratio) for seed in arguments.seeds]
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.seeds", *sys.argv[1:]]),
        **({"corpus": arguments.corpus} if arguments.corpus else {}),
        "seeds": arguments.seeds,
        **({} if ratio is None else {"step_time_retro_over_gpt": ratio}),
        "summary": _summary(runs),
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    return 0


def _run(arguments: argparse.Namespace, seed: int, ratio: float | None) -> dict:
    """The result of one seed; with its seconds of training by model."""
    workdir = arguments.workdir / f"seed{seed}"
    overrides = [
        f"Config.data_dir={arguments.workdir / 'data'}",
        f"TrainConfig.seed={seed}",
        f"DataConfig.seed={seed}",
        *arguments.overrides,
    ]
    _train(arguments.config, workdir, overrides)
    seconds = _last_timings(workdir, "seconds")
    run: dict = {"seed": seed, "training_seconds": {name: round(value, 1) for name, value in seconds.items()}}
    if ratio is not None:
        steps = round(_last_timings(workdir, "step")["retro"] * ratio)
        longer = _changed(overrides, "ModelConfig.retro=None", "TrainConfig.baselines=()", f"TrainConfig.steps={steps}")
        longer_workdir = arguments.workdir / f"seed{seed}-equal-time"
        _train(arguments.config, longer_workdir, longer)
        _evaluate_together(arguments.config, (workdir, overrides), (longer_workdir, longer))
        run["equal_time_steps"] = steps
    (path,) = (workdir / "evaluation").glob("perplexity-*.json")
    result = json.loads(path.read_text())
    return run | {name: result[name] for name in KEPT}


def _step_ratio(arguments: argparse.Namespace) -> float:
    """Measured once, and kept for the runs to come."""
    path = arguments.workdir / "step_ratio.json"
    if not path.exists():
        config = load_config([arguments.config], arguments.overrides)
        model = with_vocab(config.model, config.tokenizer.vocab_size)
        ratio = step_ratio(model, gpt_twin(model), rows=config.data.batch_size, length=config.data.seq_len)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(round(ratio, 3)) + "\n")
    return json.loads(path.read_text())


def _changed(overrides: list[str], *changes: str) -> list[str]:
    changed = {change.split("=")[0] for change in changes}
    return [*(override for override in overrides if override.split("=")[0] not in changed), *changes]


def _train(config: str, workdir: Path, overrides: list[str]) -> None:
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "train.py", "--config", config, "--workdir", str(workdir.resolve()), *sets]
    subprocess.run(command, check=True, cwd=REPOSITORY)


def _evaluate_together(name: str, main_run: tuple[Path, list[str]], longer_run: tuple[Path, list[str]]) -> None:
    """Score the longer-trained GPT beside the main run's models, so that differences are paired by document."""
    config = load_config([name], main_run[1])
    assert config.data_dir is not None
    prepared = prepare(config, Path(config.data_dir), join=False)
    size = prepared.tokenizer.vocab_size
    trained = load_trained(config, size, main_run[0])
    trained[EQUAL_TIME] = load_trained(load_config([name], longer_run[1]), size, longer_run[0])["gpt"]
    models, steps = {n: model for n, (model, _) in trained.items()}, {n: step for n, (_, step) in trained.items()}
    evaluate_perplexity(config, prepared, models, main_run[0] / "evaluation", steps=steps)


def _last_timings(workdir: Path, field: str) -> dict[str, float]:
    lines = {path.parent.name: path.read_text().splitlines()[-1] for path in workdir.glob("models/*/timings.jsonl")}
    return {name: json.loads(line)[field] for name, line in sorted(lines.items())}


def _summary(runs: list[dict]) -> dict:
    """Means over seeds with each seed's value: bits per byte by model, below by overlap, and differences with their intervals."""
    models, differences = ([run[kind] for run in runs] for kind in ("models", "differences"))
    return {
        "bits_per_byte": {name: _over_seeds([of[name]["bits_per_byte"] for of in models]) for name in models[0]},
        "bits_per_byte_by_overlap": {name: _means([of[name]["by_overlap"] for of in models]) for name in models[0]},
        "differences": {
            name: {
                **_over_seeds([of[name]["bits_per_byte"] for of in differences]),
                "intervals": [_interval(of[name]["bits_per_byte"]) for of in differences],
                "by_band": _means([of[name]["by_band"] for of in differences]),
            }
            for name in differences[0]
        },
    }


def _over_seeds(figures: list[Mapping]) -> dict:
    return {"mean": _mean(figures), "seeds": [round(figure["value"], 4) for figure in figures]}


def _means(tables: list[Mapping]) -> dict:
    return {key: _mean([table[key] for table in tables]) for key in tables[0]}


def _mean(figures: list[Mapping]) -> float | None:
    values = [figure["value"] for figure in figures]
    return None if None in values else round(statistics.mean(values), 4)


def _interval(figure: Mapping) -> list[float]:
    return [round(figure["low"], 4), round(figure["high"], 4)]


if __name__ == "__main__":
    sys.exit(main())
