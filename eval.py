"""Evaluate the trained models of a workdir on held-out documents, or its database on questions."""

import argparse
import sys

from retro_jax.cli import (
    STORED_TEXT,
    Run,
    argument_parser,
    exit_code,
    refuse_other_config,
    refuse_untrained,
    report_console,
    run_of,
    store_config,
)


def main() -> int:
    """The command; returns its exit code."""
    parser = argument_parser(
        "python eval.py",
        "perplexity: the trained models of a workdir by loss, perplexity and bits per byte of whole held-out documents, with "
        "retrieval on, off and shuffled, and by overlap with the training text. retrieval: how often the passage that answers a "
        "question of EvalConfig.questions is among the nearest; no model is needed. harness: the models on HarnessConfig.tasks, "
        "by lm-evaluation-harness.",
        "python eval.py --config quickstart --workdir runs/quickstart --task perplexity --set EvalConfig.split=valid",
    )
    tasks = ("perplexity", "retrieval", "harness")
    parser.add_argument("--task", choices=tasks, default="perplexity", help="what to measure (default: perplexity)")
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|STEP", help="which checkpoint of each model (default: latest)"
    )
    arguments = parser.parse_args()
    return exit_code(lambda: execute(run_of(arguments), arguments))


def execute(run: Run, arguments: argparse.Namespace) -> None:
    """Build what data are missing, load the models, evaluate, print and write."""
    {"perplexity": perplexity, "retrieval": retrieval, "harness": harness}[arguments.task](run, arguments)
    print(f"written to {run.workdir}/evaluation")


def perplexity(run: Run, arguments: argparse.Namespace) -> None:
    """Of trained models."""
    refuse_untrained(run, arguments.config)
    # JAX and what else takes seconds to import comes after the arguments are checked.
    from retro_jax.evaluation.trained import evaluate_trained
    from retro_jax.host_memory import keep_freed_memory
    from retro_jax.prepare import prepare

    refuse_other_config(run)
    keep_freed_memory()
    prepared = prepare(run.config, run.data_dir, join=False)
    evaluate_trained(run.config, prepared, run.workdir, report_console(), arguments.checkpoint)


def retrieval(run: Run, arguments: argparse.Namespace) -> None:
    """Of the database, which is built where it is missing, without neighbours."""
    from retro_jax.evaluation.retrieval import evaluate_retrieval, print_recall, read_questions
    from retro_jax.prepare import prepare_database

    sets = read_questions(run.config.evaluation.questions)
    refuse_other_config(run)
    database = prepare_database(run.config, run.data_dir)
    if not (run.workdir / STORED_TEXT).exists():
        store_config(run)
    print_recall(evaluate_retrieval(run.config, database, sets, run.workdir / "evaluation"), report_console())


def harness(run: Run, arguments: argparse.Namespace) -> None:
    """Of trained models, on tasks of lm-evaluation-harness."""
    from retro_jax.evaluation.harness_tasks import refuse_without_lm_eval

    refuse_without_lm_eval()
    refuse_untrained(run, arguments.config)
    from retro_jax.evaluation.harness_run import evaluate_run
    from retro_jax.host_memory import keep_freed_memory

    refuse_other_config(run)
    keep_freed_memory()
    evaluate_run(run.config, run.workdir, run.data_dir, report_console(), arguments.checkpoint)


if __name__ == "__main__":
    sys.exit(main())
