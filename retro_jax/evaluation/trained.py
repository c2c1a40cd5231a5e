"""Evaluation of a run's trained models."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from rich.console import Console

from retro_jax.config import Config, GenerateConfig, QaMode
from retro_jax.corpus.chunk_table import ChunkTable
from retro_jax.corpus.sources import read_documents
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.data.held_out import spread_documents
from retro_jax.errors import UserError
from retro_jax.evaluation.asked_models import answerer, open_models
from retro_jax.evaluation.evidence import DatabasePassages
from retro_jax.evaluation.outputs import Answerer
from retro_jax.evaluation.perplexity import evaluate_perplexity
from retro_jax.evaluation.prompts import Asker
from retro_jax.evaluation.qa import Answering, evaluate_qa, print_answers, read_examinations
from retro_jax.evaluation.report import print_report
from retro_jax.evaluation.templates import load_template
from retro_jax.evaluation.text_quality import evaluate_text_quality, print_quality
from retro_jax.generation.opening import Opened
from retro_jax.prepare import Prepared
from retro_jax.retrieval.database import Database
from retro_jax.training.checkpoint import LATEST
from retro_jax.training.trained import load_trained


def evaluate_trained(
    config: Config, prepared: Prepared, data_dir: Path, workdir: Path, console: Console, which: str | int = LATEST
) -> None:
    """Evaluate the models of a workdir, write the results to ``<workdir>/evaluation`` and print the table.

    Args:
        config: names the models and says how to evaluate.
        prepared: tokenizer, held-out documents and neighbours.
        data_dir: where these are.
        workdir: holds ``models/``.
        console: takes the table.
        which: checkpoints "latest", "best", or a step.

    Raises:
        UserError: the main model is not trained, or a model has no such checkpoint.
    """
    trained = load_trained(config, prepared.tokenizer.vocab_size, workdir, which)
    models, steps = {n: model for n, (model, _) in trained.items()}, {n: step for n, (_, step) in trained.items()}
    print_report(evaluate_perplexity(config, prepared, models, workdir / "evaluation", steps=steps), console)


def examine_trained(
    config: Config, prepared: Prepared, data_dir: Path, workdir: Path, console: Console, which: str | int
) -> None:
    """Question answering by the models of a workdir, as ``config.qa`` says; results go to ``<workdir>/evaluation``, and a table
    for each file of questions to the console.

    Raises:
        UserError: the main model is not trained, or a setting or a file of questions cannot be used.
    """
    qa, tokenizer = config.qa, prepared.tokenizer
    template = load_template(qa.template, qa.templates)
    passages = None
    if qa.evidence == "retrieved":
        passages = DatabasePassages(Database(data_dir), tokenizer, config.chunks.retrieved_len)
    sets = read_examinations(qa, passages)
    generate = GenerateConfig(
        max_new_tokens=qa.max_new_tokens, temperature=0.0, stop=template.stop, retrieval="given", batch_size=qa.batch_size
    )
    opened = open_models(config, generate, data_dir, workdir, which, tokenizer.vocab_size)
    longest = qa.max_prompt_tokens or config.data.seq_len - qa.max_new_tokens - (tokenizer.bos_id is not None)
    if longest < 1:
        raise UserError(
            f"QaConfig.max_new_tokens={qa.max_new_tokens} leaves nothing of DataConfig.seq_len={config.data.seq_len} for a "
            "prompt; lower it, or set QaConfig.max_prompt_tokens"
        )
    models = {name: _answering(one, generate) for name, one in opened.items()}
    facts: dict = {"models": {name: one.facts for name, one in opened.items()}}
    if passages is not None:
        facts["database"] = dict(passages.fingerprints)
    asker = Asker(template=template, tokenizer=tokenizer, longest=longest)
    print_answers(evaluate_qa(qa, sets, models, asker, workdir / "evaluation", facts), console)


def assess_trained(config: Config, prepared: Prepared, data_dir: Path, workdir: Path, console: Console, which: str | int) -> None:
    """Text quality of the models of a workdir, as ``config.text_quality`` says; a Retro with live retrieval and without.

    Raises:
        UserError: the main model is not trained, or there are no texts to begin with.
    """
    quality, tokenizer = config.text_quality, prepared.tokenizer
    prompts = _beginnings(config, prepared.tables[quality.split], tokenizer)
    live = GenerateConfig(
        max_new_tokens=quality.max_new_tokens,
        temperature=quality.temperature,
        top_p=quality.top_p,
        batch_size=quality.batch_size,
    )
    opened = open_models(config, live, data_dir, workdir, which, tokenizer.vocab_size)
    models: dict[str, tuple[Answerer, str]] = {}
    for name, one in opened.items():
        models[name] = (answerer(one, live), one.digest(live))
        if one.engine.reads_neighbours:
            off = dataclasses.replace(live, retrieval="none")
            models[f"{name} off"] = (answerer(one, off), one.digest(off))
    facts = {"models": {name: one.facts for name, one in opened.items()}}
    print_quality(evaluate_text_quality(quality, prompts, models, workdir / "evaluation", facts), console)


def _answering(opened: Opened, generate: GenerateConfig) -> Answering:
    alone = answerer(opened, dataclasses.replace(generate, retrieval="none"))
    answerers: dict[QaMode, Answerer] = {"closed": alone, "rag": alone}
    if opened.engine.reads_neighbours:
        reading = answerer(opened, generate)
        answerers |= {"retro": reading, "retro++": reading}
    return Answering(answerers=answerers, fingerprint=opened.digest(generate))


def _beginnings(config: Config, table: ChunkTable, tokenizer: Tokenizer) -> list[str]:
    """The first tokens of the documents of the split, or of the texts of a file, as text."""
    quality = config.text_quality
    if quality.prompts is not None:
        texts = [document.text for document in itertools.islice(read_documents(quality.prompts), quality.num_prompts)]
        return tokenizer.decode_batch([tokens[: quality.prompt_tokens] for tokens in tokenizer.encode_batch(texts)])
    documents = spread_documents(table, quality.num_prompts)
    if not len(documents):
        raise UserError(
            f"the {quality.split} split has no text to begin with; raise CorpusConfig.{quality.split}_fraction, choose another "
            "TextQualityConfig.split, or name TextQualityConfig.prompts"
        )
    first_N = np.searchsorted(table.document_N, documents)
    tokens_NX, lengths_N = table.gather(first_N, quality.prompt_tokens)
    return tokenizer.decode_batch([row[:length] for row, length in zip(tokens_NX, lengths_N, strict=True)])
