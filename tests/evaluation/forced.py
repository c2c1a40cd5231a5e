"""A model whose next byte is forced by the last one, and tasks that it must answer in a known way; also a program that a test
kills: ``python -m tests.evaluation.forced FOLDER [answers after which it kills itself]``."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from retro_jax.config import Config, DataConfig, EvalConfig, HarnessConfig, ModelConfig
from retro_jax.corpus.tokenizer import JsonTokenizer
from retro_jax.model import Retro

# After each of these bytes comes the next; after any other, and after the last, a line's end.
TEXT = "abc xyz"
SURE = 20.0
ROW = 64
WHOLE = ("abc xyz\n" * 3, "zz " + "abc xyz abc" * 12)
GENERATED = """
task: generated
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def byte_tokenizer() -> JsonTokenizer:
    """A token a byte, and the end of a document."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<eod>"])
    return JsonTokenizer(model, None, len(letters))


def forced_model(tokenizer: JsonTokenizer) -> Retro:
    """Blocks that add 0 between an embedding that is the identity and an output that points at the next byte."""
    size = 264
    config = ModelConfig(
        vocab_size=size,
        width=size,
        num_layers=1,
        num_heads=2,
        ffn_dim=8,
        final_norm=False,
        tied_embedding=False,
        retro=None,
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: Retro(config, key=jax.random.key(0))))
    model = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state))
    codes = tokenizer.encode_batch([TEXT])[0]
    after = np.full(size, tokenizer.encode_batch(["\n"])[0][0])
    after[codes[:-1]] = codes[1:]
    table_VD = np.zeros((size, size), np.float32)
    table_VD[after, np.arange(size)] = SURE
    model.embedding.table[...] = jnp.eye(size)
    assert model.output is not None
    model.output.table[...] = jnp.asarray(table_VD)
    return model


def log_probability(text: str, before: str = "\n") -> float:
    """What the model gives a text after the last byte of another."""
    follows = dict(itertools.pairwise(TEXT))
    pairs = zip(before[-1] + text, text, strict=False)
    misses = sum(follows.get(last, "\n") != byte for last, byte in pairs)
    return -SURE * misses - len(text) * float(np.log1p(263 * np.exp(-SURE)))


def write_tasks(folder: Path) -> list[str]:
    """A folder for each shape, and a task file of lm_eval's own kind; their names."""
    wrong = {"query": "abc", "choices": ["xyz", "xzy"], "gold": 1}
    documents: dict[str, list[dict[str, Any]]] = {
        "choice": [
            {"query": "abc", "choices": ["xyz", "zyx", "abc"], "gold": 0},
            {"query": "Question: abc?", "choices": ["cc", "xyz"], "gold": 1},
            {"query": "b", "choices": ["yyy", "xyz"], "gold": 1},
            wrong,
        ],
        "schema": [{"context_options": ["b", "abc"], "continuation": "xyz", "gold": gold} for gold in (1, 0)],
        "cloze": [{"context": "ab ab abc", "continuation": "xyz"}, {"context": "b", "continuation": "xyz"}],
        "whole": [{"text": text} for text in WHOLE],
    }
    for name, rows in documents.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = folder / "asked.jsonl"
    asked.write_text(
        "".join(json.dumps(row) + "\n" for row in [{"query": "a", "answer": "bc xyz"}, {"query": "a", "answer": "no"}])
    )
    (folder / "generated.yaml").write_text(GENERATED.format(file=asked))
    return [*(str(folder / name) for name in documents), str(folder / "generated.yaml")]


def config_of(tasks: list[str], **settings: Any) -> Config:
    return Config(
        data=DataConfig(seq_len=ROW),
        model=ModelConfig(retro=None),
        evaluation=EvalConfig(window=ROW, stride=ROW),
        harness=HarnessConfig(**{"tasks": tuple(tasks), "batch_size": 2, "bootstrap_samples": 50, **settings}),
    )


def main() -> None:
    from retro_jax.evaluation.harness_answers import Answers
    from retro_jax.evaluation.harness_models import Opened
    from retro_jax.evaluation.harness_run import evaluate_harness

    folder, left = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else -1
    add = Answers.add

    def add_and_die(self: Answers, answers: Mapping[Any, Any]) -> None:
        nonlocal left
        add(self, answers)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Answers.add = add_and_die  # type: ignore[method-assign]
    tokenizer = byte_tokenizer()
    config = config_of(json.loads((folder / "tasks.json").read_text()))
    evaluate_harness(Opened(config, tokenizer, {"gpt": (forced_model(tokenizer), 1)}, None), folder / "evaluation")


if __name__ == "__main__":
    main()
