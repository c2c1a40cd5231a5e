"""Questions that only passages can answer, asked in every mode: closed book, passages in the prompt (RAG), in the encoder
(RETRO), the best in the prompt and the rest in the encoder (RETRO++).

Documents are random words on the chunk grid. A pair of chunks repeats a pair of another document, which retrieval finds, or one
that stands earlier in the same document; so a model learns to copy what followed, from its neighbours and from its own context. A
question is the first chunk of a pair that stands nowhere in training, its answer the first words of the second; it comes with the
passage that has both and with another one, in random order.

For each seed a GPT of two layers is trained, and a Retro that starts from it; both are asked through the code of
`python eval.py --task qa`.

    python -m benchmarks.planted_questions [--seeds 0 1 2] [--gpt-steps 1000] [--steps 2000]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.planted import CHUNK, CHUNKS, WORDS, planted_config, spoken
from benchmarks.timing import cpu_name
from retro_jax.config import QaConfig
from retro_jax.evaluation.trained import examine_trained
from retro_jax.prepare import prepare
from retro_jax.training.train import train_all

ANSWER = 4
TEMPLATE = (
    '[bare]\npassage = "{text}"\nseparator = ""\nquestion = "{question}"\nwith_passages = "{passages}{question}"\nstop = []\n'
)
RESULTS = Path(__file__).parent / "results" / "planted_questions.json"


def main() -> None:
    """Train and ask for each seed, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--gpt-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000, help="of the Retro, after the GPT's (default: 2000)")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    seeds = {}
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            seeds[str(seed)] = asked(Path(folder), seed, given)
    result = {
        "what": "exact match of planted questions by mode; every seed its own corpus, model and questions",
        "machine": cpu_name(),
        **{name: value for name, value in vars(given).items() if name not in ("seeds", "output")},
        "seeds": seeds,
    }
    given.output.write_text(json.dumps(result, indent=2) + "\n")


def asked(folder: Path, seed: int, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train both models in ``folder`` and ask them; exact match by model and mode, with its interval."""
    words_DLC = planted_documents(given.documents, seed)
    texts = [spoken(words) for words in words_DLC]
    config = planted_config(folder, texts, given.gpt_steps, test_fraction=0.0, seed=seed)
    write_questions(folder / "planted.jsonl", given.questions, seed)
    (folder / "templates.toml").write_text(TEMPLATE)
    prepared = prepare(config, folder / "data", lambda _: None)
    gpt = dataclasses.replace(config, model=dataclasses.replace(config.model, retro=None))
    start = str(folder / "gpt" / "models" / "gpt")
    retro = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=given.steps, start_from=start))
    qa = QaConfig(
        questions=(str(folder / "planted.jsonl"),),
        template="bare",
        templates=str(folder / "templates.toml"),
        num_passages=2,
        max_new_tokens=ANSWER,
    )
    figures: dict[str, dict[str, float]] = {}
    for config, workdir in ((gpt, folder / "gpt"), (retro, folder)):
        train_all(config, prepared, workdir)
        examine_trained(dataclasses.replace(config, qa=qa), prepared, folder / "data", workdir, Console(), "latest")
        result = json.loads((workdir / "evaluation" / "qa-planted.json").read_text())
        figures |= {row: figures["exact_match"] for row, figures in result["figures"].items()}
    return figures


def planted_documents(count: int, seed: int) -> np.ndarray:
    """Words, int [documents, chunks, chunk_len], four pairs of chunks a document: the first is its own, each other that one again
    or the first pair of another document."""
    random = np.random.default_rng(seed)
    words_DLC = random.integers(0, WORDS, (count, CHUNKS, CHUNK))
    for document in range(CHUNKS, count):
        others = random.choice(document, CHUNKS // 2, replace=False)
        for pair in range(1, CHUNKS // 2):
            source = document if random.random() < 0.5 else others[pair]
            words_DLC[document, 2 * pair : 2 * pair + 2] = words_DLC[source, :2]
    return words_DLC


def write_questions(path: Path, count: int, seed: int) -> None:
    """Pairs that stand nowhere in training."""
    random = np.random.default_rng((seed, 1))
    with open(path, "w") as file:
        for number in range(count):
            pair, other = random.integers(0, WORDS, (2, 2, CHUNK))
            passages = [spoken(pair), spoken(other)]
            if random.random() < 0.5:
                passages.reverse()
            fields = {"id": str(number), "context": spoken(pair[0]), "continuation": spoken(pair[1, :ANSWER]), "ctxs": passages}
            file.write(json.dumps(fields) + "\n")


if __name__ == "__main__":
    main()
