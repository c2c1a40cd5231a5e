"""What retrieval gives, over several seeds: one config trained once a seed on the same data, and the spread of its results.

    python benchmarks/seeds.py --config quickstart --seeds 0 1 2 --output benchmarks/results/quickstart.json

With ``--equal-time`` the GPT is also trained for as many seconds as the Retro took. Run again to continue: each run is resumed,
or skipped where it is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    """Train, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a config, as for train.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of parameters, dropout and row order")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="CLASS.FIELD=VALUE", help="as for train.py"
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/seeds"), help="holds the data and one workdir a seed")
    parser.add_argument("--equal-time", action="store_true", help="also train the GPT as long as the Retro, in seconds")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    runs = [_run(arguments, seed) for seed in arguments.seeds]
    report = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "seeds": arguments.seeds,
        "summary": _summary(runs),
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    return 0


def _run(arguments: argparse.Namespace, seed: int) -> dict:
    """The result of one seed; with its seconds of training by model."""
    workdir = arguments.workdir / f"seed{seed}"
    seeded = [f"TrainConfig.seed={seed}", f"DataConfig.seed={seed}", *arguments.overrides]
    result = _train(arguments, workdir, seeded)
    run = {
        "seed": seed,
        "training_seconds": _training_seconds(workdir),
        **_picked(result),
    }
    if arguments.equal_time:
        seconds = run["training_seconds"]
        steps = round(_steps(workdir) * seconds["retro"] / seconds["gpt"])
        longer = [*seeded, "ModelConfig.retro=None", "TrainConfig.baselines=()", f"TrainConfig.steps={steps}"]
        result = _train(arguments, arguments.workdir / f"seed{seed}-equal-time", longer)
        run["equal_time"] = {"steps": steps, **_picked(result)}
    return run


def _train(arguments: argparse.Namespace, workdir: Path, overrides: list[str]) -> dict:
    sets = [part for override in [f"Config.data_dir={arguments.workdir / 'data'}", *overrides] for part in ("--set", override)]
    command = [sys.executable, "train.py", "--config", arguments.config, "--workdir", str(workdir.resolve()), *sets]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    (path,) = (workdir / "evaluation").glob("perplexity-*.json")
    return json.loads(path.read_text())


def _training_seconds(workdir: Path) -> dict[str, float]:
    lines = {path.parent.name: path.read_text().splitlines()[-1] for path in workdir.glob("models/*/timings.jsonl")}
    return {name: round(json.loads(line)["seconds"], 1) for name, line in sorted(lines.items())}


def _steps(workdir: Path) -> int:
    return json.loads((workdir / "models" / "retro" / "timings.jsonl").read_text().splitlines()[-1])["step"]


def _picked(result: Mapping) -> dict:
    kept = ("models", "differences", "bytes_share", "documents", "targets", "bytes", "python", "versions", "device", "in_words")
    return {name: result[name] for name in kept}


def _summary(runs: list[dict]) -> dict:
    """Bits per byte by model (and, below, by overlap): mean over seeds, and each seed's."""
    summary: dict = {"bits_per_byte": {}, "bits_per_byte_by_overlap": {}}
    for name, first in runs[0]["models"].items():
        values = [run["models"][name]["bits_per_byte"]["value"] for run in runs]
        summary["bits_per_byte"][name] = {"mean": round(statistics.mean(values), 4), "seeds": [round(v, 4) for v in values]}
        bands = {}
        for alpha in first["by_overlap"]:
            at = [run["models"][name]["by_overlap"][alpha]["value"] for run in runs]
            bands[alpha] = None if None in at else round(statistics.mean(at), 4)
        summary["bits_per_byte_by_overlap"][name] = bands
    if "equal_time" in runs[0]:
        values = [run["equal_time"]["models"]["gpt"]["bits_per_byte"]["value"] for run in runs]
        summary["bits_per_byte"]["gpt, equal time"] = {
            "mean": round(statistics.mean(values), 4),
            "seeds": [round(v, 4) for v in values],
        }
    return summary


if __name__ == "__main__":
    sys.exit(main())
