"""What all commands share: arguments, the workdir with its stored config, and errors as one line and an exit code.

Commands of their own stand at the top of the repository (train.py, eval.py); here is ``python -m retro_jax prepare``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from retro_jax.artefact import write_text
from retro_jax.config import Config
from retro_jax.errors import UserError
from retro_jax.gin_config import config_json, config_text, find_config, load_config
from retro_jax.interop import READ, WRITTEN

USER_ERROR, INTERRUPTED = 2, 130
TRACEBACK = "RETRO_JAX_TRACEBACK"
STORED_TEXT, STORED_JSON = "config.gin", "config.json"
# What may change between two starts in a workdir with checkpoints; all else decides what the parameters and the rows mean.
FREE_CLASSES = (
    "OptimizerConfig",
    "TrainConfig",
    "EvalConfig",
    "GenerateConfig",
    "QaConfig",
    "TextQualityConfig",
    "HarnessConfig",
    "MeshConfig",
    "ExecutorConfig",
)
FREE_FIELDS = (
    "Config.data_dir",
    "CorpusConfig.workers",
    "CorpusConfig.block_documents",
    "CorpusConfig.executor",
    "RetrievalConfig.workers",
    "RetrievalConfig.block_chunks",
    "RetrievalConfig.executor",
    "DataConfig.rows",
    "DataConfig.workers",
    "DataConfig.prefetch",
    "ModelConfig.implementation",
)


@dataclass(frozen=True)
class Run:
    """A config and the folder of its results."""

    config: Config
    workdir: Path

    @property
    def data_dir(self) -> Path:
        """Where the data artefacts are."""
        return Path(self.config.data_dir) if self.config.data_dir else self.workdir / "data"


def argument_parser(prog: str, what: str, example: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every command has; add the command's own to it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=what,
        epilog=f"example:\n  {example}\n\nA command that was interrupted is continued by running it again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="gin file, or the name of one in configs/ (quickstart)")
    parser.add_argument("--workdir", metavar="DIR", help="folder of all that the run writes (default: runs/<config's name>)")
    _add_overrides(parser)
    return parser


def add_processes(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that several processes run together."""
    group = parser.add_argument_group("several processes (one a host or a device), each started with the same command")
    group.add_argument(
        "--distributed", action="store_true", help="this is one of several; SLURM, Open MPI and Kubernetes say which"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where the first process listens, if nothing else says it")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


def run_of(arguments: argparse.Namespace) -> Run:
    """The run that the arguments of :func:`argument_parser` describe."""
    config = load_config([arguments.config], arguments.overrides)
    workdir = Path(arguments.workdir) if arguments.workdir else Path("runs") / find_config(arguments.config).stem
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder")
    return Run(config, workdir)


def refuse_other_config(run: Run) -> None:
    """Where another config is stored in the workdir, say what has changed since. (Of changes in FREE_CLASSES to a model with
    checkpoints, training tells.)

    Raises:
        UserError: the workdir holds checkpoints, and a setting that decides what they mean has changed.
    """
    path = run.workdir / STORED_TEXT
    changes = _changes(path.read_text(encoding="utf-8"), config_text(run.config)) if path.exists() else {}
    trained = any(run.workdir.glob("models/*/checkpoints/*"))
    fixed = [name for name in changes if not _is_free(name)]
    if fixed and trained:
        old, new = changes[fixed[0]]
        raise UserError(
            f"{run.workdir} holds checkpoints trained with {fixed[0]} = {old}, now {fixed[0]} = {new} is asked for; "
            f"use another --workdir, or delete {run.workdir / 'models'} to train anew"
        )
    for name, (old, new) in changes.items():
        if not trained or name.split(".")[0] not in FREE_CLASSES:
            print(f"{name} was {old} in the last run in {run.workdir}, now it is {new}")


def refuse_untrained(run: Run, config: str) -> None:
    """Raise a UserError where there is no run yet; ``config`` is what the user named."""
    if not run.workdir.is_dir():
        raise UserError(f"--workdir {run.workdir} is not there; train first: python train.py --config {config}")


def store_config(run: Run) -> None:
    """Write the resolved config to the workdir, as gin and as JSON."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    write_text(run.workdir / STORED_TEXT, config_text(run.config))
    write_text(run.workdir / STORED_JSON, config_json(run.config))


def same_arguments(run: Run, arguments: argparse.Namespace, *changes: str) -> str:
    """What to type for the same config and workdir again, with ``changes`` ("Class.field=value")."""
    changed = {change.split("=")[0].strip() for change in changes}
    overrides = [*(o for o in arguments.overrides if o.split("=")[0].strip() not in changed), *changes]
    settings = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["--config", arguments.config, "--workdir", str(run.workdir), *settings])


def report_console() -> Console:
    """Where tables are printed: as wide as the terminal, and wide enough for them in a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def exit_code(program: Callable[[], object]) -> int:
    """Run a command: 0; 2 and one line for what the user can mend; 130 when interrupted."""
    try:
        program()
    except UserError as error:
        return _told(str(error))
    except KeyboardInterrupt:
        again = shlex.join(sys.orig_argv)
        print(f"\ninterrupted; what is finished is kept, continue with: {again}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; let the interpreter's last flush go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _told(f"the disk is full{where}; free some space and run the same command again")
        if error.errno == errno.EFBIG:
            return _told(
                f"a file may not grow as large as it has to{where}; raise the limit (ulimit -f), or use another file system"
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _told(f"no permission{where}: {error.strerror}; choose another --workdir, or change the permissions")
        raise
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m retro_jax <command>``."""
    parser = argparse.ArgumentParser(
        prog="python -m retro_jax",
        description="retro_jax: retrieval-augmented pretraining of language models.",
        epilog="training and evaluation: python train.py --help, python eval.py --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    stages = argument_parser(
        "python -m retro_jax prepare",
        "Build the data alone: tokenizer, tokens, chunks and neighbours of every chunk. What is built is not built again.",
        "python -m retro_jax prepare --config wiki_small --set CorpusConfig.sources=wiki.jsonl",
    )
    stages.add_argument("--rebuild", metavar="STAGE", help="remove this artefact and those made from it first, then build them")
    stages.add_argument("--verify", action="store_true", help="check the checksums of what is built, and build nothing")
    stages.add_argument(
        "--join", action="store_true", help="also store training rows with their neighbours inline, for network file systems"
    )
    stages.add_argument(
        "--join-epochs", type=int, metavar="N", help="how many epochs of them (default: as many rows as TrainConfig.steps read)"
    )
    commands.add_parser(
        "prepare",
        parents=[stages],
        add_help=False,
        prog=stages.prog,
        help="build the data alone",
        description=stages.description,
        epilog=stages.epilog,
        formatter_class=stages.formatter_class,
    )
    _add_convert(commands)
    _add_settings(commands)
    _add_plan(commands)
    _add_retrieval(commands)
    _add_generate(commands)
    parsed = parser.parse_args(arguments)
    command = {
        "prepare": _prepare,
        "convert": _convert,
        "settings": _settings,
        "plan": _plan,
        "retrieval": _retrieval,
        "generate": _generate,
    }[parsed.command]
    return exit_code(lambda: command(parsed))


def _add_settings(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "settings",
        help="print a checkpoint's model as a config to start from",
        description="Print the settings of a checkpoint's model as a gin file that trains on from it: of a run, of Hugging Face, "
        "or one that convert wrote in our format.",
        epilog="example: python -m retro_jax settings llama-folder > llama.gin",
    )
    parser.add_argument("path", metavar="PATH", help="the checkpoint's folder")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a training step costs on GPUs that need not be there, and whether it fits",
        description="Count a training step: memory by kind, operations, bytes that devices exchange, the least time. "
        "Where it does not fit, the nearest mesh and recomputation that do are looked for.",
        epilog="example: python -m retro_jax plan --config instructretro_9500m --mesh data=2,fsdp=4,tensor=8 --target h100",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="gin file, or the name of one in configs/")
    _add_overrides(parser)
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="data, fsdp, sequence, tensor (default: the config's MeshConfig)")
    parser.add_argument("--target", choices=("a100", "h100", "h200"), default="h100", help="the GPU (default: h100)")
    parser.add_argument(
        "--compile", action="store_true", help="also let XLA compile the step for these GPUs, and show its memory and exchanges"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures too")
    parser.add_argument("--png", metavar="FILE", help="draw memory by kind")


def _add_retrieval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "retrieval",
        help="ask the database for the neighbours of a text, or check what is built",
        description="What a workdir's retrieval gives.",
        epilog='example: python -m retro_jax retrieval query --workdir runs/quickstart "how do I open a file?"',
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    asking = actions.add_parser(
        "query",
        help="print the nearest training chunks of a text",
        description="Print the training chunks nearest to each text: distance, document, the chunk and how its document goes on.",
        epilog='example: python -m retro_jax retrieval query --workdir runs/quickstart --k 3 "how do I open a file?"',
    )
    asking.add_argument("text", nargs="+", metavar="TEXT", help="what to look for; - reads texts from standard input, one a line")
    asking.add_argument("--k", type=int, default=5, metavar="N", help="neighbours a text (default: 5)")
    asking.add_argument("--json", action="store_true", help="print one JSON object a text")
    checking = actions.add_parser(
        "check",
        help="compute some stored blocks anew and compare them",
        description="Compute a random share of the blocks of vectors and neighbours anew, and compare them with what is stored.",
        epilog="example: python -m retro_jax retrieval check --workdir runs/quickstart --fraction 0.05",
    )
    checking.add_argument("--fraction", type=float, default=0.01, metavar="F", help="share of the blocks (default: 0.01)")
    checking.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of blocks (default: 0)")
    for action in (asking, checking):
        action.add_argument("--workdir", metavar="DIR", help="the run's folder (default: runs/<config's name>)")
        action.add_argument("--config", metavar="FILE", help="gin file, or the name of one in configs/ (default: the workdir's)")
        _add_overrides(action)


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="complete prompts with a trained model, its neighbours looked for while it writes",
        description="Complete prompts. How is set in GenerateConfig: --set GenerateConfig.max_new_tokens=64, temperature, top_k, "
        "top_p, repetition_penalty, stop, retrieval (live, given, none), and others.",
        epilog='example: python -m retro_jax generate --config quickstart --prompt "Open the file and" --show-neighbours',
    )
    parser.add_argument("--config", metavar="FILE", help="gin file, or the name of one in configs/ (default: the workdir's)")
    parser.add_argument("--workdir", metavar="DIR", help="the run's folder (default: runs/<config's name>)")
    _add_overrides(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a text to be completed; may be given again")
    parser.add_argument(
        "--prompts",
        metavar="FILE|-",
        help="a file of prompts, one a line; .jsonl: objects with prompt and perhaps passages and seed; -: standard input",
    )
    parser.add_argument("--model", metavar="NAME", help="of the run's models, for example gpt (default: the main one)")
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|STEP", help="which checkpoint of the model (default: latest)"
    )
    parser.add_argument("--database", metavar="DIR", help="data to search, made with the same tokenizer (default: the run's own)")
    parser.add_argument("--show-neighbours", action="store_true", help="also tell what was found and read")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write a line a completion; a file that was begun is gone on with")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="read and write checkpoints of Megatron and Hugging Face",
        description="Convert a checkpoint. Names, shapes and finiteness of all tensors are checked; nothing is half-written.",
        epilog="example: python -m retro_jax convert --from run --to huggingface --input runs/quickstart/models/gpt --output gpt",
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        choices=READ,
        help="run: a trained model's folder, runs/<config>/models/<name>; retro: our tensors as safetensors; huggingface: Llama, "
        "Mistral, Qwen2 or GPT-2; Megatron: core, core with Transformer Engine, or legacy (InstructRetro)",
    )
    parser.add_argument("--to", dest="target", required=True, choices=WRITTEN, help="as --from")
    parser.add_argument("--input", required=True, metavar="PATH", help="the checkpoint's folder, or its one file")
    parser.add_argument("--output", required=True, metavar="PATH", help="a folder that does not exist yet")
    parser.add_argument("--config", metavar="FILE", help="a config with the model's settings; needed to read Megatron's")
    _add_overrides(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="write in this dtype (default: as it is)")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks to write for Megatron (default: 1)")
    parser.add_argument("--checkpoint", default="latest", metavar="latest|best|STEP", help="of a run (default: latest)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a run's data/tokenizer, to stand beside a model of Hugging Face's format"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read PyTorch's pickles too, weights only (needs torch)")
    parser.add_argument("--verify", action="store_true", help="run both on the same tokens and compare before anything is kept")
    parser.add_argument("--report", action="store_true", help="print where every tensor came from and went")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="Class.field=value",
        help="change one setting, for example --set TrainConfig.steps=100; may be given again for others",
    )


def _plan(arguments: argparse.Namespace) -> None:
    config = load_config([arguments.config], arguments.overrides)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from retro_jax.planning.command import plan

    plan(config, arguments, report_console())


def _generate(arguments: argparse.Namespace) -> None:
    run = _stored_run(arguments)
    from retro_jax.generation.command import generate
    from retro_jax.host_memory import keep_freed_memory

    refuse_other_config(run)
    keep_freed_memory()
    generate(run.config, run.data_dir, run.workdir, arguments, Console(soft_wrap=True))


def _stored_run(arguments: argparse.Namespace) -> Run:
    """The run that is meant where ``--config`` may be left out for the one stored in the workdir."""
    if arguments.config is None:
        if arguments.workdir is None:
            raise UserError("neither --workdir nor --config is given; name the folder of a run that is prepared or trained")
        stored = Path(arguments.workdir) / STORED_TEXT
        if not stored.is_file():
            raise UserError(f"{stored} is not there; give the --config that the data were prepared with, or another --workdir")
        arguments.config = str(stored)
    return run_of(arguments)


def _retrieval(arguments: argparse.Namespace) -> None:
    run = _stored_run(arguments)
    if arguments.action == "query":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an encoder embeds a text as well without an accelerator
    from retro_jax.retrieval import command

    if arguments.action == "check":
        command.check(run.config, run.data_dir, arguments)
    else:
        command.query(run.config, run.data_dir, arguments, report_console())


def _settings(arguments: argparse.Namespace) -> None:
    from retro_jax.interop.command import start_config

    print(start_config(Path(arguments.path)), end="")


def _convert(arguments: argparse.Namespace) -> None:
    from retro_jax.interop.command import convert  # JAX is not needed for --help

    convert(arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    from retro_jax.prepare import prepare, remove_stage, verify  # faiss and scikit-learn are not needed for --help

    if arguments.join_epochs is not None and arguments.join_epochs < 1:
        raise UserError(f"--join-epochs {arguments.join_epochs} must be at least 1")
    if arguments.join or arguments.join_epochs or arguments.rebuild == "joined":
        arguments.overrides.append("DataConfig.rows=joined")
    run = run_of(arguments)
    if arguments.verify:
        verify(run.data_dir)
        return
    refuse_other_config(run)
    if arguments.rebuild:
        for stage in remove_stage(run.data_dir, arguments.rebuild):
            print(f"{stage:<11} removed")
    prepare(run.config, run.data_dir, join_epochs=arguments.join_epochs)
    store_config(run)
    print(f"ready in {run.data_dir}; train on it with: python train.py {same_arguments(run, arguments)}")


def _told(message: str) -> int:
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


def _changes(old: str, new: str) -> dict[str, tuple[str, str]]:
    """Settings whose values differ between two config texts; "unset" where a text has no such setting, and what an older version
    did not know yet had its default."""
    before, after, default = _values(old), _values(new), _values(config_text(Config()))
    names = [*after, *(name for name in before if name not in after)]
    pairs = {name: (before.get(name, default.get(name, "unset")), after.get(name, "unset")) for name in names}
    return {name: (was, now) for name, (was, now) in pairs.items() if was != now}


def _values(text: str) -> dict[str, str]:
    values = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            name, value = line.split(" = ", 1)
            values[name] = value
    return values


def _is_free(name: str) -> bool:
    return name in FREE_FIELDS or name.split(".")[0] in FREE_CLASSES
