"""The figures of an evaluation as a table, in words, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from retro_jax.evaluation.figures import ALPHAS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_DOCUMENTS = 30
# Bits per byte; a smaller difference is called none, however certain it is.
WORTH_NAMING = 0.005
NAMES = {"gpt": "GPT", "gpt_matched": "GPT, as many parameters", "gpt_equal_time": "GPT, as much time", "retro": "Retro"}
MODES = {"off": "retrieval off", "shuffled": "shuffled neighbours"}


def spoken(row: str) -> str:
    """A row's name for people: "retro off" is "Retro, retrieval off"."""
    name, _, mode = row.partition(" ")
    return NAMES.get(name, name) + (f", {MODES[mode]}" if mode else "")


def print_report(result: Mapping, console: Console) -> None:
    """Both tables, and what they say."""
    console.print(score_table(result))
    if result["differences"]:
        console.print(difference_table(result))
    for sentence in result["in_words"]:
        console.print(sentence, highlight=False)


def score_table(result: Mapping) -> Table:
    """Models and modes as rows: loss, perplexity, bits per byte with its interval, and bits per byte by overlap."""
    share = result["bytes_share"]["by_overlap"]
    table = Table(title=f"Held-out documents ({result['split']}): {_facts(result)}", caption=_legend(result))
    table.add_column("model")
    for heading in ("loss\n(nats/token)", "perplexity", "bits/byte", "95% interval"):
        table.add_column(heading, justify="right")
    for alpha in ALPHAS[:-1]:
        table.add_column(f"overlap <= {alpha:g}\n({share[str(alpha)]:.0%} of bytes)", justify="right")
    for row, figures in result["models"].items():
        bits = figures["bits_per_byte"]
        table.add_row(
            spoken(row),
            _number(figures["loss"]),
            _number(figures["perplexity"], 2),
            _number(bits),
            _interval(bits),
            *(_number(figures["by_overlap"][str(alpha)]) for alpha in ALPHAS[:-1]),
        )
    return table


def difference_table(result: Mapping) -> Table:
    """Paired differences in bits per byte with their intervals, over all chunks and by band of overlap."""
    share = result["bytes_share"]["by_band"]
    table = Table(title="Differences in bits/byte (95% interval over documents); above 0: Retro with its neighbours is better")
    table.add_column("difference")
    table.add_column("all chunks", justify="right")
    for band, alpha in enumerate(ALPHAS):
        table.add_column(f"overlap {_band_words(band)}\n({share[str(alpha)]:.0%} of bytes)", justify="right")
    for pair, figures in result["differences"].items():
        cells = [figures["bits_per_byte"], *(figures["by_band"][str(alpha)] for alpha in ALPHAS)]
        table.add_row(" - ".join(spoken(row) for row in pair.split(" - ")), *(_signed(cell) for cell in cells))
    return table


def in_words(result: Mapping) -> list[str]:
    """What the figures say: who is ahead, whether that may be chance, and where the gain comes from."""
    differences = result["differences"]
    sentences = [_ahead(pair, figures, result) for pair, figures in differences.items() if " " not in pair.split(" - ")[0]]
    controls = {pair.split(" - ")[0].partition(" ")[2]: f for pair, f in differences.items() if " " in pair.split(" - ")[0]}
    if controls:
        sentences.append(_controls(controls))
    for pair, figures in list(differences.items())[:1]:
        sentences += _bands(pair, figures, result)
    if differences and result["documents"] < FEW_DOCUMENTS:
        sentences.append(f"{result['documents']} documents are few: another draw of documents could give other figures.")
    return sentences


def draw_overlap(result: Mapping, path: Path) -> None:
    """A picture (PNG): bits per byte over the chunks with at most some overlap, and the differences by band of overlap with their
    intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.4), layout="constrained")
    for row, figures in result["models"].items():
        _line(left, figures["by_overlap"], spoken(row))
    for number, (pair, figures) in enumerate(result["differences"].items()):
        label = " - ".join(spoken(row) for row in pair.split(" - "))
        _line(right, figures["by_band"], label, shift=0.06 * number, intervals=True)
    shares = result["bytes_share"]
    left.set_xticks(range(len(ALPHAS)), [f"up to {a:g}\n{shares['by_overlap'][str(a)]:.0%} of bytes" for a in ALPHAS])
    bands = [f"{_band_words(band)}\n{shares['by_band'][str(a)]:.0%} of bytes" for band, a in enumerate(ALPHAS)]
    right.set_xticks(range(len(ALPHAS)), bands)
    right.axhline(0.0, color="black", linewidth=0.8)
    left.set_title(f"{result['split']}: {result['documents']} held-out documents", fontsize=10)
    right.set_title("differences, 95% intervals; above 0: Retro with its neighbours is better", fontsize=10)
    for axes in (left, right):
        axes.set_ylabel("bits per byte")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    figure.supxlabel("overlap: longest token run of a chunk that stands in the training text / chunk length", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axes: Axes, figures: Mapping, label: str, *, shift: float = 0.0, intervals: bool = False) -> None:
    """One line over ALPHAS, moved a little where intervals would hide each other."""
    points = [(place + shift, figures[str(alpha)]) for place, alpha in enumerate(ALPHAS)]
    points = [(place, point) for place, point in points if point["value"] is not None]
    values = [point["value"] for _, point in points]
    spread = [[p["value"] - p["low"] for _, p in points], [p["high"] - p["value"] for _, p in points]]
    places = [place for place, _ in points]
    axes.errorbar(places, values, spread if intervals else None, marker="o", markersize=4, capsize=2, linewidth=1.4, label=label)


def _ahead(pair: str, figures: Mapping, result: Mapping) -> str:
    baseline, main = pair.split(" - ")
    gain = figures["bits_per_byte"]
    reached, against = (result["models"][row]["bits_per_byte"]["value"] for row in (main, baseline))
    side = "below" if gain["value"] >= 0 else "above"
    if abs(gain["value"]) < WORTH_NAMING:
        return f"{spoken(main)} takes {reached:.3f} bits per byte, {spoken(baseline)} {against:.3f}: no difference worth naming."
    return (
        f"{spoken(main)} takes {reached:.3f} bits per byte, {abs(gain['value']):.3f} {side} {spoken(baseline)} ({against:.3f}); "
        f"the 95% interval of the difference, {_interval(gain)}, {_verdict(gain)}."
    )


def _controls(controls: Mapping[str, Mapping]) -> str:
    parts = [
        f"{figures['bits_per_byte']['value']:+.3f} ({_interval(figures['bits_per_byte'])}) with {MODES[mode]}"
        for mode, figures in controls.items()
    ]
    meanings = {_effect(figures["bits_per_byte"]) for figures in controls.values()}
    if meanings == {"gains"}:
        meaning = "the model uses what its neighbours say"
    elif meanings == {"loses"}:
        meaning = "its neighbours harm it"
    else:
        meaning = "it is not shown that the model uses what its neighbours say"
    return f"The same model's bits per byte change by {' and by '.join(parts)}: {meaning}."


def _bands(pair: str, figures: Mapping, result: Mapping) -> list[str]:
    baseline, _ = pair.split(" - ")
    share = result["bytes_share"]["by_band"]
    said: dict[str, list[str]] = {"gains": [], "loses": [], "neither": []}
    for band, alpha in enumerate(ALPHAS):
        figure = figures["by_band"][str(alpha)]
        if figure["value"] is not None:
            said[_effect(figure)].append(f"{_band_words(band)} ({share[str(alpha)]:.0%} of the bytes): {figure['value']:+.3f}")
    phrases = {
        "gains": "it gains at overlap {}",
        "loses": "it loses at overlap {}",
        "neither": "gain or loss is too small or not certain at overlap {}",
    }
    parts = [phrases[what].format(", ".join(bands)) for what, bands in said.items() if bands]
    sentences = [
        f"Against {spoken(baseline)}, by how much of a chunk stands in the training text in one run, {'; '.join(parts)}."
    ]
    total = figures["bits_per_byte"]["value"]
    if _effect(figures["bits_per_byte"]) == "gains":
        saved = {band: (figures["by_band"][str(a)]["value"] or 0.0) * share[str(a)] / total for band, a in enumerate(ALPHAS)}
        copied = saved[2] + saved[3]
        where = "mostly copying of passages that repeat" if copied > 0.5 else "not mostly copying of long repeats"
        more = " (the others lose some)" if copied > 1.0 else ""
        sentences.append(
            f"Chunks with overlap above {ALPHAS[1]:g} bring {copied:.0%} of the bits saved{more}: the gain is {where}."
        )
    return sentences


def _effect(figure: Mapping) -> str:
    """Whether a difference (baseline - main) is a certain gain, a certain loss or neither."""
    if abs(figure["value"]) < WORTH_NAMING:
        return "neither"
    return "gains" if figure["low"] > 0 else "loses" if figure["high"] < 0 else "neither"


def _verdict(figure: Mapping) -> str:
    return "excludes 0" if figure["low"] > 0 or figure["high"] < 0 else "includes 0: this may be chance"


def _band_words(band: int) -> str:
    return f"up to {ALPHAS[0]:g}" if band == 0 else f"{ALPHAS[band - 1]:g} to {ALPHAS[band]:g}"


def _facts(result: Mapping) -> str:
    return f"{result['documents']:,} documents, {result['targets']:,} tokens, {result['bytes']:,} bytes"


def _legend(result: Mapping) -> str:
    return (
        f"windows of {result['window']} tokens, {result['stride']} apart; chunks of {result['chunk_len']}; "
        "a document's end counts bits but no bytes; "
        "overlap: longest token run of a chunk that stands in the training text / chunk length"
    )


def _number(figure: Mapping, digits: int = 3) -> str:
    return "-" if figure["value"] is None else f"{figure['value']:.{digits}f}"


def _interval(figure: Mapping) -> str:
    return "-" if figure["value"] is None else f"{figure['low']:.3f} to {figure['high']:.3f}"


def _signed(figure: Mapping) -> str:
    return "-" if figure["value"] is None else f"{figure['value']:+.3f}\n{figure['low']:+.3f} to {figure['high']:+.3f}"
