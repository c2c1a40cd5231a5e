"""Train the models of a config, from raw text to a table: data, model and baselines, evaluation."""

import argparse
import sys

from retro_jax.cli import (
    Run,
    add_processes,
    argument_parser,
    exit_code,
    refuse_other_config,
    report_console,
    run_of,
    same_arguments,
    store_config,
)
from retro_jax.gin_config import config_text


def main() -> int:
    """The command; returns its exit code."""
    parser = argument_parser(
        "python train.py",
        "Train the model of a config and its baselines on data that is built where it is missing, then evaluate all of them.",
        "python train.py --config quickstart --set TrainConfig.steps=2000",
    )
    parser.add_argument("--print-config", action="store_true", help="print every setting, default or not, and do nothing else")
    parser.add_argument("--dry-run", action="store_true", help="say what would be built and trained, and write nothing")
    add_processes(parser)
    arguments = parser.parse_args()
    return exit_code(lambda: execute(run_of(arguments), arguments))


def execute(run: Run, arguments: argparse.Namespace) -> None:
    """Data, training, evaluation, and what to try next."""
    if arguments.print_config:
        print(config_text(run.config), end="")
        return
    # JAX and what else takes seconds to import comes after the arguments are checked.
    from retro_jax.dry_run import describe_run
    from retro_jax.evaluation.trained import evaluate_trained
    from retro_jax.host_memory import keep_freed_memory
    from retro_jax.parallel.processes import are_several, is_first, join_processes
    from retro_jax.prepare import prepare
    from retro_jax.training.train import check_run, train_all

    if arguments.dry_run:
        print(describe_run(run))
        return
    join_processes(arguments)
    refuse_other_config(run)
    keep_freed_memory()
    check_run(run.config, run.workdir)
    prepared = prepare(run.config, run.data_dir, build=not are_several())
    if is_first():
        store_config(run)
    print(config_text(run.config))
    train_all(run.config, prepared, run.workdir, config_text=config_text(run.config))
    if not are_several():  # else eval.py does it, in one process
        evaluate_trained(run.config, prepared, run.data_dir, run.workdir, report_console())
    print(closing_words(run, arguments))


def closing_words(run: Run, arguments: argparse.Namespace) -> str:
    """Where the results lie, and commands that go on from them."""
    again = same_arguments(run, arguments)
    longer = same_arguments(run, arguments, f"TrainConfig.steps={2 * run.config.training.steps}")
    return f"""
settings      {run.workdir}/config.gin
loss curves   {run.workdir}/curves.png
results       {run.workdir}/evaluation

next:
  python train.py {longer}    # go on training
  python eval.py {again} --task perplexity --checkpoint best    # the checkpoint with the best validation loss
  python train.py --config wiki_small --set CorpusConfig.sources=YOUR.jsonl    # your own text
  tensorboard --logdir {run.workdir}/models"""


if __name__ == "__main__":
    sys.exit(main())
