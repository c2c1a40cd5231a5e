"""Decoding with a cache beside a full forward pass per token, time per token by the length of what is written, and what live
retrieval takes.

Shape: 4 layers, width 256, 8 heads, feed-forward 1024, CCA in 2 and 4, 2 encoder layers, chunks of 64, 2 neighbours of 128
tokens, 8192 words, untied, float32, random weights; greedy. The database is of text whose words have Zipf's frequencies, searched
by the default embedder (hashed TF-IDF, exact); prompts are pieces of such text of other seeds.

- `cached` and `recomputed` complete the same prompt with one neighbour set, a round of one after a round of the other; the
  second is `GenerateConfig.grid = "rechunked"`, which runs the training forward pass over the whole row for every token. The
  tokens of both are compared.
- `flat` is the time per token of the last quarter of what is written over that of the first quarter, from the moments at which
  text comes.
- `live` completes several groups of prompts: `share` is the part of the wall time in which nothing could be decoded because
  neighbours were awaited, with one group at a time and with two in turn; `searching` is the search's own part of the wall time.

    python -m benchmarks.generation [--chunks 100000] [--rounds 3] [--folder FOLDER]
    python -m benchmarks.generation --parts cached --cached-batch 8 --rounds 1 --output generation_batch8.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.timing import Timed, cpu_name, interleave, spread
from benchmarks.train_step import CHUNKS, GPT, RETRO
from retro_jax.config import Config, CorpusConfig, GenerateConfig, ModelConfig, RetrievalConfig, TokenizerConfig
from retro_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from retro_jax.generation.engine import Engine
from retro_jax.generation.neighbours import DatabaseRetriever, Found, Retriever
from retro_jax.generation.prompt import Prompt
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import Retro
from retro_jax.prepare import prepare_database

WORDS, DOCUMENT = 30_000, 800
RESULTS = Path(__file__).parent / "results" / "generation.json"
PARTS = ("cached", "flat", "live")
MODELS = {"gpt": GPT, "retro": RETRO}
GREEDY = GenerateConfig(temperature=0.0, end_of_document="never", burst=16)


class OneAnswer:
    """A retriever that has the same answer for all texts at once."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def find(self, queries: Sequence[np.ndarray]) -> Found:
        """See :class:`retro_jax.generation.neighbours.Retriever`."""
        return Found(*(np.repeat(one[:1], len(queries), axis=0) for one in self._found))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=100_000, help="of the database (default: 100,000)")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cached-batch", type=int, default=1, help="prompts at a time of `cached` (default: 1)")
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time of the others (default: 8)")
    parser.add_argument("--groups", type=int, default=4, help="groups of prompts with live retrieval (default: 4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps the database for another time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as place:
        folder = given.folder or Path(place)
        config = database_config(folder, given.chunks)
        database = prepare_database(config, folder / "data")
        tokenizer = load_tokenizer(folder / "data" / "tokenizer")
        retriever = DatabaseRetriever(database, tokenizer, CHUNKS)
        result = {
            "what": "generation: cached decoding beside full recomputation, flatness, live retrieval's share of the time",
            "command": " ".join(["python -m benchmarks.generation", *sys.argv[1:]]),
            "machine": {"cores": len(os.sched_getaffinity(0)), "processor": cpu_name(), "device": jax.devices()[0].device_kind},
            "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in ("jax", "flax")}},
            "shape": {name: value for name, value in vars(given).items() if name not in ("folder", "output", "parts")},
            "database_chunks": int(database.table.num_chunks),
        }
        if "cached" in given.parts:
            result["cached"] = {name: beside_recomputed(made(of), tokenizer, retriever, given) for name, of in MODELS.items()}
        if "flat" in given.parts:
            result["flat"] = {name: flatness(made(of), tokenizer, retriever, given) for name, of in MODELS.items()}
        if "live" in given.parts:
            result["live"] = live(made(RETRO), tokenizer, retriever, given)
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    report(result)


def made(config: ModelConfig) -> Retro:
    """The model with random weights."""
    return Retro(dataclasses.replace(config, max_positions=4096), key=jax.random.key(0))


def beside_recomputed(model: Retro, tokenizer: Tokenizer, retriever: Retriever, given: argparse.Namespace) -> dict:
    """Tokens a second of both, and how many times as fast the cached form is. Neighbours are one answer, found before."""
    prompts = prompts_of(tokenizer, given.cached_batch, given.prompt_tokens, seed=1)
    answer = OneAnswer(retriever.find(tokenizer.encode_batch([prompts[0].text])[0][None, :64]))
    config = dataclasses.replace(GREEDY, max_new_tokens=given.new_tokens, batch_size=given.cached_batch)
    engine = Engine(model, tokenizer, config, answer)
    slow = dataclasses.replace(config, grid="rechunked")
    found: dict[str, np.ndarray] = {}

    def side(name: str, mode: GenerateConfig) -> Timed:
        def call() -> None:
            found[name] = np.array([completion.tokens for completion in engine.complete(prompts, mode)])

        return Timed(call)

    sides = {"cached": side("cached", config), "recomputed": side("recomputed", slow)}
    interleave(sides, given.rounds)
    same = np.mean(found["cached"] == found["recomputed"])
    assert same > 0.99, f"only {same:.1%} of the greedy tokens of both forms are the same"
    tokens, walls = found["cached"].size, {name: np.array(side.wall) for name, side in sides.items()}
    return {
        "same_tokens": float(same),
        **{f"{name}_tokens_per_s": spread(tokens / wall) for name, wall in walls.items()},
        "times_as_fast": spread(walls["recomputed"] / walls["cached"]),
    }


def flatness(model: Retro, tokenizer: Tokenizer, retriever: Retriever, given: argparse.Namespace) -> dict:
    """Milliseconds a step, one new token of every row, in the first quarter of four times ``new_tokens``, and how many times that
    in the last."""
    new = 4 * given.new_tokens
    prompts = prompts_of(tokenizer, given.batch, given.prompt_tokens, seed=2)
    answer = OneAnswer(retriever.find(tokenizer.encode_batch([prompts[0].text])[0][None, :64]))
    engine = Engine(model, tokenizer, dataclasses.replace(GREEDY, max_new_tokens=new, batch_size=given.batch), answer)
    quarters = []
    for _ in range(given.rounds + 1):
        moments = [time.perf_counter() for prompt, *_ in engine.stream(prompts) if prompt == 0]
        quarter = (len(moments) - 1) // 4
        quarters.append((moments[1 + quarter] - moments[1], moments[-1] - moments[-1 - quarter]))
    firsts, lasts = np.array(quarters[1:]).T
    return {
        "new_tokens": new,
        "first_quarter_ms_a_step": spread(1000 * firsts / (new / 4)),
        "last_over_first": spread(lasts / firsts),
    }


def live(model: Retro, tokenizer: Tokenizer, retriever: Retriever, given: argparse.Namespace) -> dict:
    """Where the wall time goes, with one group of prompts at a time and with two in turn."""
    prompts = prompts_of(tokenizer, given.batch * given.groups, given.prompt_tokens, seed=3)
    config = dataclasses.replace(GREEDY, max_new_tokens=given.new_tokens, batch_size=given.batch)
    engine = Engine(model, tokenizer, config, retriever)
    modes = {
        "alone": dataclasses.replace(config, in_flight=1),
        "in_turn": dataclasses.replace(config, in_flight=2),
        "without": dataclasses.replace(config, retrieval="none"),
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
    for number in range(given.rounds + 1):
        for name, mode in modes.items():
            before, began = vars(engine.seconds).copy(), time.perf_counter()
            engine.complete(prompts, mode)
            wall = time.perf_counter() - began
            spent = {part: (value - before[part]) / wall for part, value in vars(engine.seconds).items()}
            if number:
                rounds[name].append({"tokens_per_s": len(prompts) * given.new_tokens / wall, **spent})
    parts = {"tokens_per_s": "tokens_per_s", "searching": "searching", "waiting": "share"}
    return {
        name: {told: spread(np.array([one[part] for one in measured])) for part, told in parts.items()}
        for name, measured in rounds.items()
    }


def database_config(folder: Path, chunks: int) -> Config:
    """Write a corpus of about so many chunks, and give the config of its database."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts = zipf_texts(seed=0)
        # The tokenizer makes about 1.2 tokens of a word.
        count = -(-chunks * CHUNKS.chunk_len * 5 // (6 * DOCUMENT))
        with open(corpus, "w") as file:
            file.writelines(json.dumps({"text": next(texts)}) + "\n" for _ in range(count))
    return Config(
        corpus=CorpusConfig(sources=(str(corpus),), valid_fraction=0.0, test_fraction=0.0),
        tokenizer=TokenizerConfig(vocab_size=RETRO.vocab_size),
        chunks=CHUNKS,
        retrieval=RetrievalConfig(),
        model=RETRO,
    )


def zipf_texts(seed: int) -> Iterator[str]:
    """Documents of ``DOCUMENT`` words whose frequencies fall with their rank; the words are the same for every seed."""
    letters = np.random.default_rng(0)
    words = np.array(["".join(letters.choice(list("aeioulnrstmkdp"), size)) for size in letters.integers(2, 9, WORDS)])
    share = 1 / np.arange(1, WORDS + 1)
    random, upto = np.random.default_rng((seed, 1)), np.cumsum(share / share.sum())
    while True:
        yield " ".join(words[np.searchsorted(upto, random.random(DOCUMENT), side="right").clip(0, WORDS - 1)])


def prompts_of(tokenizer: Tokenizer, count: int, tokens: int, seed: int) -> list[Prompt]:
    """Texts of about so many tokens."""
    texts = zipf_texts(seed)
    rows = tokenizer.encode_batch([next(texts) for _ in range(count)])
    return [Prompt(text=text) for text in tokenizer.decode_batch([row[:tokens] for row in rows])]


def report(result: dict) -> None:
    """The medians."""
    for name, figures in result.get("cached", {}).items():
        print(
            f"{name}: {figures['cached_tokens_per_s']['median']:,.0f} tokens/s with a cache, "
            f"{figures['times_as_fast']['median']:.1f} times the {figures['recomputed_tokens_per_s']['median']:,.0f} of a full "
            f"forward pass per token; {100 * figures['same_tokens']:.1f}% of the tokens are the same"
        )
    for name, figures in result.get("flat", {}).items():
        print(
            f"{name}: {figures['first_quarter_ms_a_step']['median']:.2f} ms a step at first, "
            f"{figures['last_over_first']['median']:.2f} times that in the last quarter of {figures['new_tokens']:,}"
        )
    for name, figures in result.get("live", {}).items():
        speed, searching, share = (figures[part]["median"] for part in ("tokens_per_s", "searching", "share"))
        print(f"live, {name}: {speed:,.0f} tokens/s; searching {searching:.1%} of the time, waiting for it {share:.1%}")


if __name__ == "__main__":
    main()
