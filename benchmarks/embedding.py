"""Embedding chunks with a sentence encoder: this project's `bert` embedder against transformers and sentence-transformers on
PyTorch, with the same weights, tokenizer and texts, from text to vectors of unit length.

The texts are those of Python's help topics, cut into pieces of --characters; their order is random. The rivals do what
sentence-transformers does: sort by length, 32 texts a batch, padded to the longest; `transformers` is that loop written out, with
attention by PyTorch's scaled_dot_product_attention (its default), and `sentence_transformers` is the library, if it is installed.
Rounds of all sides alternate in one process. Beside wall time stands the process's CPU time, which other programs on the machine
disturb less (PyTorch's threads spin while they wait, which counts). Vectors are compared before anything is timed.

    python -m benchmarks.embedding FOLDER [--texts 512] [--rounds 9]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import pydoc_data.topics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.timing import MATRIX, Timed, cpu_name, interleave, product, spread
from retro_jax.config import BertConfig, RetrievalConfig
from retro_jax.interop.bert import bert_shape
from retro_jax.retrieval.bert import BertEmbedder

PRODUCTS, RIVAL_BATCH = 40, 32
RESULTS = Path(__file__).parent / "results" / "embedding.json"
Embed = Callable[[list[str]], np.ndarray]


def main() -> None:
    """Measure every side, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a sentence encoder of BERT's form with mean pooling, in Hugging Face's format")
    parser.add_argument("--texts", type=int, default=512, help="texts a round")
    parser.add_argument("--characters", type=int, default=260, help="of a text: about a chunk of 64 tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()

    texts = pieces(given.texts, given.characters)
    facts = BertEmbedder.facts(RetrievalConfig(embedder="bert", bert=BertConfig(path=str(given.folder), pooling="mean")))
    ours = BertEmbedder.load(given.folder, facts)
    sides: dict[str, Embed] = {"ours": ours.embed, "transformers": by_transformers(given.folder, facts["max_length"])}
    if importlib.util.find_spec("sentence_transformers"):
        sides["sentence_transformers"] = by_sentence_transformers(given.folder)
    first = time.perf_counter()
    vectors = ours.embed(texts)
    first = time.perf_counter() - first
    differences = {name: float(np.abs(embed(texts) - vectors).max()) for name, embed in sides.items() if name != "ours"}
    assert max(differences.values()) < 5e-6, differences

    timed = {name: Timed(lambda embed=embed: embed(texts)) for name, embed in sides.items()}  # type: ignore[misc]
    timed["matmul"] = Timed(product(), PRODUCTS)
    interleave(timed, given.rounds)

    lengths = np.array([len(ids) for ids in ours.token_ids(texts)])
    done = flops(given.folder, lengths)
    ceiling = 2 * MATRIX**3 / np.array(timed["matmul"].wall)
    result = {
        "what": "texts a second from text to unit vectors, float32, one process, rounds of all sides alternating",
        "model": {"folder": given.folder.resolve().name, "dim": facts["dim"], "max_length": facts["max_length"]},
        "texts": {"count": len(texts), "tokens": spread(lengths), "gflop": round(done / 1e9, 1)},
        "rounds": given.rounds,
        "largest_difference": {name: float(f"{value:.1e}") for name, value in differences.items()},
        "ours": {
            **figures(timed["ours"], len(texts)),
            "first_call_seconds": round(first, 1),
            "share_of_matmul": spread(done / np.array(timed["ours"].wall) / ceiling),
        },
        **{name: rival(timed["ours"], timed[name], len(texts)) for name in differences},
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": cpu_name(),
            "load": [round(load, 1) for load in os.getloadavg()],
        },
        "versions": versions(),
    }
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{len(texts)} texts of {np.median(lengths):.0f} tokens; load of the machine {os.getloadavg()[0]:.1f}")
    for name in sides:
        told = result[name]
        ratio = "" if name == "ours" else f", ours is {told['ours_is_faster']['wall']['median']:.2f} times as fast"
        ratio += "" if name == "ours" else f" ({told['ours_is_faster']['cpu']['median']:.2f} by CPU time)"
        print(f"{name:<22} {told['texts_per_second']['median']:7.1f} texts/s{ratio}")


def by_transformers(folder: Path, max_length: int) -> Embed:
    """The loop of sentence-transformers' encode, with mean pooling."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def embed(texts: list[str]) -> np.ndarray:
        order = np.argsort([-len(text) for text in texts], kind="stable")
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        for start in range(0, len(texts), RIVAL_BATCH):
            batch = order[start : start + RIVAL_BATCH]
            given = tokenizer(
                [texts[i] for i in batch], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            with torch.inference_mode():
                states = model(**given).last_hidden_state
                weights = given["attention_mask"][:, :, None].float()
                mean = (states * weights).sum(1) / weights.sum(1)
                vectors[batch] = torch.nn.functional.normalize(mean).numpy()
        return vectors

    return embed


def by_sentence_transformers(folder: Path) -> Embed:
    """The library itself."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(
        texts, batch_size=RIVAL_BATCH, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
    )


def pieces(count: int, characters: int) -> list[str]:
    """Consecutive pieces of the help topics, in random order."""
    text = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    starts = np.random.default_rng(0).permutation(len(text) // characters)[:count] * characters
    assert len(starts) == count, f"the help topics are {len(text) // characters} pieces; give --texts no more"
    return [text[start : start + characters] for start in starts]


def flops(folder: Path, lengths_N: np.ndarray) -> float:
    """Multiplications and additions of the layers' matrix products for texts of these lengths, without padding."""
    shape = bert_shape(json.loads((folder / "config.json").read_text()))
    linear = 4 * shape.width**2 + 2 * shape.width * shape.ffn_dim
    return float(2 * shape.num_layers * (linear * lengths_N + 2 * shape.width * lengths_N**2).sum())


def figures(side: Timed, texts: int) -> dict:
    """Speed of one side."""
    return {
        "texts_per_second": spread(texts / np.array(side.wall)),
        "wall_seconds": spread(np.array(side.wall)),
        "cpu_seconds": spread(np.array(side.cpu)),
    }


def rival(ours: Timed, side: Timed, texts: int) -> dict:
    """A rival's figures, and how much faster ours is, round by round."""
    wall, cpu = (np.array(theirs) / np.array(mine) for theirs, mine in ((side.wall, ours.wall), (side.cpu, ours.cpu)))
    return {**figures(side, texts), "ours_is_faster": {"wall": spread(wall), "cpu": spread(cpu)}}


def versions() -> dict[str, str]:
    """Of what takes part."""
    packages = ("jax", "numpy", "tokenizers", "torch", "transformers", "sentence-transformers")
    found = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name.replace("-", "_"))}
    return {"python": platform.python_version(), **found}


if __name__ == "__main__":
    main()
