"""How often each embedder finds the passage that answers a question, beside plain TF-IDF of whole passages.

The passages are Wikipedia's with their titles, in chunks of 64 tokens; a passage ranks by its best chunk, k counts different
passages, and the question alone searches. Plain TF-IDF (scikit-learn's TfidfVectorizer, sublinear, 1-2-grams of title and text,
its whole vocabulary, no chunks) is computed in the same run. What is built and searched is kept under --workdir: a run that was
stopped goes on.

    python -m benchmarks.retrieval_recall ../shared/data [--encoder models/all-MiniLM-L6-v2] [--workdir runs/retrieval_recall]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer

from retro_jax.config import BertConfig, ChunkConfig, Config, CorpusConfig, EvalConfig, ModelConfig, RetrievalConfig, RetroConfig
from retro_jax.evaluation.retrieval import KS, Questions, evaluate_retrieval, read_questions, recall
from retro_jax.prepare import prepare_database

CORPUS, SETS = "corpus_wiki_passages", ("qa_nq_open_gold", "qa_qed_dev", "qa_xquad_en")
CORPUS_STAGES = ("tokenizer", "tokens", "chunks")
CONTEXTS = ("none", "title", "before", "title_and_before")
LSA_DIMS = (256, 1024, 4096)
QUESTIONS_AT_ONCE = 128
RESULTS = Path(__file__).parent / "results" / "retrieval_recall.json"


def main() -> None:
    """Measure every row, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help=f"the folder that holds {CORPUS} and {', '.join(SETS)}")
    parser.add_argument("--encoder", type=Path, help="a sentence encoder of BERT's form in Hugging Face's format")
    parser.add_argument("--lsa", type=int, nargs="*", default=LSA_DIMS, metavar="DIM", help="dimensions of lsa")
    parser.add_argument("--workdir", type=Path, default=Path("runs/retrieval_recall"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()

    sets = read_questions([str(given.data / name / "items.jsonl") for name in SETS])
    rows = {"plain TF-IDF, whole passages": plain_tfidf(given.data / CORPUS / "items.jsonl", sets)}
    facts: dict = {}
    for name, retrieval in settings(given.encoder, given.lsa):
        config = configured(given.data, retrieval)
        folder = given.workdir / name.replace(" ", "-").replace(",", "")
        take_corpus(given.workdir, folder)
        database = prepare_database(config, folder / "data")
        results = evaluate_retrieval(config, database, sets, folder / "evaluation")
        rows[name] = {short(result["questions"]): result["recall"] for result in results}
        first = results[0]
        facts = {key: first[key] for key in ("passages", "chunks", "chunk_len", "intervals", "rank")}
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(record(rows, facts, sets, given.encoder), indent=2) + "\n")
    Console(width=150).print(as_table(rows))


def settings(encoder: Path | None, lsa_dims: Sequence[int]) -> Iterator[tuple[str, RetrievalConfig]]:
    """A name and settings for each row."""
    for context in CONTEXTS:
        yield f"tfidf, {context}", RetrievalConfig(context=context)
    if encoder is not None:
        bert = RetrievalConfig(embedder="bert", bert=BertConfig(path=str(encoder)), block_chunks=1024)
        yield f"{encoder.resolve().name}, title_and_before", replace(bert, context="title_and_before")
    for dim in lsa_dims:
        yield f"lsa {dim}, title_and_before", RetrievalConfig(embedder="lsa", lsa_dim=dim, context="title_and_before")


def configured(data: Path, retrieval: RetrievalConfig) -> Config:
    """Every passage in the database, in chunks of 64 tokens of a BPE trained on them."""
    chunks = ChunkConfig()
    return Config(
        corpus=CorpusConfig(sources=(str(data / CORPUS / "items.jsonl"),), valid_fraction=0.0, test_fraction=0.0),
        chunks=chunks,
        model=ModelConfig(retro=RetroConfig(chunks=chunks)),
        retrieval=retrieval,
        evaluation=EvalConfig(),
    )


def take_corpus(workdir: Path, folder: Path) -> None:
    """Copy tokens and chunks of another row, so that they are made once."""
    for stage in CORPUS_STAGES:
        there = next(iter(sorted(workdir.glob(f"*/data/{stage}/manifest.json"))), None)
        if there is not None and not (folder / "data" / stage).exists():
            shutil.copytree(there.parent, folder / "data" / stage)


def plain_tfidf(corpus: Path, sets: list[Questions]) -> dict[str, dict]:
    """Recall of the usual TF-IDF of whole passages, by brute force."""
    passages = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    number = {passage["id"]: i for i, passage in enumerate(passages)}
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    database_NF = vectorizer.fit_transform([f"{passage['title']}\n{passage['text']}" for passage in passages])
    found = {}
    for questions in sets:
        hits = []
        for start in range(0, len(questions.texts), QUESTIONS_AT_ONCE):
            part = slice(start, start + QUESTIONS_AT_ONCE)
            cosines_QN = (vectorizer.transform(questions.texts[part]) @ database_NF.T).toarray()
            best_QS = np.argsort(-cosines_QN, axis=1, kind="stable")[:, : max(KS)]
            gold = [[number[one] for one in ids] for ids in questions.gold[part]]
            hits += [np.isin(best_S, ids) for best_S, ids in zip(best_QS, gold, strict=True)]
        found[short(questions.name)] = recall(np.array(hits), samples=EvalConfig().bootstrap_samples, seed=EvalConfig().seed)
    return found


def short(name: str) -> str:
    """A set's name, from that of its folder and file."""
    return name.removesuffix("-items")


def record(rows: dict[str, dict], facts: dict, sets: list[Questions], encoder: Path | None) -> dict:
    """What the JSON file holds."""
    return {
        "what": "recall of gold passages; rows name the embedder and RetrievalConfig.context",
        **facts,
        "questions": {short(questions.name): len(questions.texts) for questions in sets},
        "recall": rows,
        "encoder": encoder.resolve().name if encoder else None,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "numpy", "scikit-learn", "scipy", "tokenizers", "faiss-cpu")},
        },
    }


def as_table(rows: dict[str, dict]) -> Table:
    """Recall at each k of each row and set."""
    table = Table(title="recall@" + "/".join(map(str, KS)))
    table.add_column("embedder, context")
    for name in SETS:
        table.add_column(name, justify="right")
    for name, by_set in rows.items():
        table.add_row(name, *(" / ".join(f"{by_set[one][str(k)]['value']:.3f}" for k in KS) for one in SETS))
    return table


if __name__ == "__main__":
    main()
