"""Quality of sampled texts: how often they repeat themselves, how alike they are, how their words are distributed."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from retro_jax.artefact import write_text
from retro_jax.config import TextQualityConfig
from retro_jax.evaluation.diversity import self_bleu, zipf_coefficient
from retro_jax.evaluation.intervals import means_with_intervals
from retro_jax.evaluation.outputs import Answerer, completed
from retro_jax.evaluation.repetition import degenerates, ends_in_repetition
from retro_jax.generation.prompt import Prompt

VERSIONS = ("retro-jax", "jax", "numpy")
SHOWN = {
    "repetition": "repetition (paper), %",
    "degeneration": "repetition (degeneration code), %",
    "self_bleu": "Self-BLEU",
    "zipf": "Zipf coefficient",
    "length": "tokens",
}


def evaluate_text_quality(
    config: TextQualityConfig, prompts: Sequence[str], models: Mapping[str, tuple[Answerer, str]], folder: Path, facts: Mapping
) -> dict:
    """Complete every prompt by every model, and measure the completions.

    Writes ``text-quality.json`` into ``folder`` and the texts into ``text-quality/``, where a run that was killed goes on.

    Args:
        config: the settings.
        prompts: the texts to go on from; the n-th is drawn from with seed ``config.seed + n``.
        models: by name, what completes and the fingerprint of all that decides how.
        folder: where results go.
        facts: what else is written down.

    Returns:
        What the file holds. ``figures`` by model: {"value", "low", "high"} (95%, percentiles over resampled texts) of repetition
        by the paper's and by the degeneration code's definition, Self-BLEU and the length in tokens; of the Zipf coefficient, a
        figure of all texts together, the value alone.
    """
    asked = [Prompt(text=text, seed=config.seed + number) for number, text in enumerate(prompts)]
    settings = {name: getattr(config, name) for name in ("max_new_tokens", "top_p", "temperature")}
    figures = {}
    for model, (answerer, fingerprint) in models.items():
        name = model.replace(" ", "-")
        texts = [
            done.tokens for done in completed(folder / "text-quality", name, {"model": fingerprint, **settings}, asked, answerer)
        ]
        figures[model] = _figures(config, texts)
    result = {
        "prompts": len(asked),
        "figures": figures,
        "definitions": {
            "repetition": "the end repeats a phrase of 2 tokens or more 3 times or more (Wang et al. 2023)",
            "degeneration": "the code of Holtzman et al. (2020), on the model's tokens",
            "self_bleu": f"n-grams of 1 to {config.self_bleu_longest} tokens, {config.self_bleu_texts} texts against all others",
            "zipf": f"minus the slope of log frequency on log rank of the {config.zipf_ranks} most frequent tokens",
        },
        "intervals": f"95%, percentiles over {config.bootstrap_samples} resamples of texts",
        "settings": vars(config),
        **facts,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
    }
    write_text(folder / "text-quality.json", json.dumps(result, indent=2) + "\n")
    return result


def print_quality(result: Mapping, console: Console) -> None:
    """One row a model."""
    table = Table(title=f"Text quality over {result['prompts']:,} prompts", caption="95% intervals over resampled texts")
    table.add_column("model")
    for words in SHOWN.values():
        table.add_column(words, justify="right")
    for model, figures in result["figures"].items():
        table.add_row(model, *(_cell(name, figures[name]) for name in SHOWN))
    console.print(table)


def _figures(config: TextQualityConfig, texts: Sequence[Sequence[int]]) -> dict[str, Mapping[str, float | None]]:
    bleu = self_bleu(texts, sampled=config.self_bleu_texts, longest=config.self_bleu_longest, seed=config.seed)
    of_texts = {
        "repetition": np.array([ends_in_repetition(text) for text in texts], float),
        "degeneration": np.array([degenerates(text) for text in texts], float),
        "length": np.array([len(text) for text in texts], float),
    }
    intervals = partial(means_with_intervals, samples=config.bootstrap_samples, seed=config.seed)
    return {
        **intervals(of_texts),
        **intervals({"self_bleu": bleu}),
        "zipf": {"value": zipf_coefficient(texts, ranks=config.zipf_ranks)},
    }


def _cell(name: str, figure: Mapping) -> str:
    if figure["value"] is None:
        return "none"
    scale, digits = {"repetition": (100, 2), "degeneration": (100, 2), "length": (1, 1)}.get(name, (1, 3))
    value = f"{scale * figure['value']:.{digits}f}"
    return f"{value}\n{scale * figure['low']:.{digits}f} to {scale * figure['high']:.{digits}f}" if "low" in figure else value
