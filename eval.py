"""Evaluate the trained models of a workdir on held-out documents."""

import argparse
import sys

from retro_jax.cli import Run, argument_parser, exit_code, refuse_other_config, report_console, run_of
from retro_jax.errors import UserError


def main() -> int:
    """The command; returns its exit code."""
    parser = argument_parser(
        "python eval.py",
        "Evaluate the trained models of a workdir: loss, perplexity and bits per byte of whole held-out documents, with "
        "retrieval on, off and shuffled, and by overlap with the training text.",
        "python eval.py --config quickstart --workdir runs/quickstart --task perplexity --set EvalConfig.split=valid",
    )
    parser.add_argument("--task", choices=("perplexity",), default="perplexity", help="what to measure (default: perplexity)")
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|STEP", help="which checkpoint of each model (default: latest)"
    )
    arguments = parser.parse_args()
    return exit_code(lambda: execute(run_of(arguments), arguments))


def execute(run: Run, arguments: argparse.Namespace) -> None:
    """Build what data are missing, load the models, evaluate, print and write."""
    if not run.workdir.is_dir():
        raise UserError(f"--workdir {run.workdir} is not there; train first: python train.py --config {arguments.config}")
    # JAX and what else takes seconds to import comes after the arguments are checked.
    from retro_jax.evaluation.trained import evaluate_trained
    from retro_jax.host_memory import keep_freed_memory
    from retro_jax.prepare import prepare

    refuse_other_config(run)
    keep_freed_memory()
    prepared = prepare(run.config, run.data_dir, join=False)
    evaluate_trained(run.config, prepared, run.workdir, report_console(), arguments.checkpoint)
    print(f"written to {run.workdir}/evaluation")


if __name__ == "__main__":
    sys.exit(main())
