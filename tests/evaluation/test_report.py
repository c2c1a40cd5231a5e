"""The table and the words follow from the numbers."""

import io

from rich.console import Console

from retro_jax.evaluation.report import difference_table, draw_overlap, in_words, score_table, spoken


def figure(value, half=0.02):
    return {"value": value, "low": value - half, "high": value + half}


def bits(total, bands):
    keys = ("0.125", "0.25", "0.5", "1.0")
    by = {k: figure(b) for k, b in zip(keys, bands, strict=True)}
    return {"bits_per_byte": figure(total), "by_overlap": by, "by_band": by}


def result(gain=(0.12, (-0.05, -0.01, 0.2, 0.65)), off=0.17, shuffled=0.23, documents=200):
    share = {"0.125": 0.4, "0.25": 0.3, "0.5": 0.1, "1.0": 0.2}
    rows = {"gpt": 1.8, "retro": 1.68, "retro off": 1.85, "retro shuffled": 1.91}
    return {
        "split": "test",
        "window": 512,
        "stride": 256,
        "chunk_len": 64,
        "documents": documents,
        "targets": 1234567,
        "bytes": 4567890,
        "models": {
            row: {"loss": figure(value * 2), "perplexity": figure(44.4), **bits(value, [value + 0.1] * 4)}
            for row, value in rows.items()
        },
        "differences": {
            "gpt - retro": bits(*gain),
            "retro off - retro": bits(off, [off] * 4),
            "retro shuffled - retro": bits(shuffled, [shuffled] * 4),
        },
        "bytes_share": {"by_overlap": {"0.125": 0.4, "0.25": 0.7, "0.5": 0.8, "1.0": 1.0}, "by_band": share},
    }


def test_a_gain_that_comes_from_copying():
    ahead, controls, bands, copying = in_words(result())
    assert ahead == (
        "Retro takes 1.680 bits per byte, 0.120 below GPT (1.800); "
        "the 95% interval of the difference, 0.100 to 0.140, excludes 0."
    )
    assert controls == (
        "The same model's bits per byte change by +0.170 (0.150 to 0.190) with retrieval off and by "
        "+0.230 (0.210 to 0.250) with shuffled neighbours: the model uses what its neighbours say."
    )
    assert bands == (
        "Against GPT, by how much of a chunk stands in the training text in one run, it gains at overlap "
        "0.25 to 0.5 (10% of the bytes): +0.200, 0.5 to 1 (20% of the bytes): +0.650; "
        "it loses at overlap up to 0.125 (40% of the bytes): -0.050; "
        "gain or loss is too small or not certain at overlap 0.125 to 0.25 (30% of the bytes): -0.010."
    )
    # (0.1 * 0.2 + 0.2 * 0.65) / 0.12
    assert copying == (
        "Chunks with overlap above 0.25 bring 125% of the bits saved (the others lose some): "
        "the gain is mostly copying of passages that repeat."
    )


def test_no_gain_is_called_none():
    ahead, controls, *rest = in_words(result(gain=(0.01, (0.01, 0.01, 0.01, 0.01)), off=0.01, shuffled=0.3, documents=9))
    assert ahead.endswith(
        "0.010 below GPT (1.800); the 95% interval of the difference, -0.010 to 0.030, includes 0: this may be chance."
    )
    assert controls.endswith("it is not shown that the model uses what its neighbours say.")
    assert not any("bits saved" in sentence for sentence in rest)
    assert rest[-1] == "9 documents are few: another draw of documents could give other figures."


def test_a_tiny_difference_is_no_gain_however_certain():
    tiny = result(gain=(0.002, (0.002, 0.002, 0.002, 0.002)), off=0.002, shuffled=0.002)
    for difference in tiny["differences"].values():
        for found in [difference["bits_per_byte"], *difference["by_band"].values()]:
            found["low"], found["high"] = 0.001, 0.003
    ahead, controls, bands = in_words(tiny)
    assert ahead == "Retro takes 1.680 bits per byte, GPT 1.800: no difference worth naming."
    assert controls.endswith("it is not shown that the model uses what its neighbours say.")
    assert "it gains" not in bands and "it loses" not in bands


def test_a_loss_is_said():
    ahead, controls, *_ = in_words(result(gain=(-0.1, (-0.1, -0.1, -0.1, -0.1)), off=-0.2, shuffled=-0.1))
    assert "0.100 above GPT" in ahead and ahead.endswith("excludes 0.")
    assert controls.endswith("its neighbours harm it.")


def test_gain_on_new_text():
    *_, where = in_words(result(gain=(0.3, (0.4, 0.3, 0.1, 0.1))))
    assert where == "Chunks with overlap above 0.25 bring 10% of the bits saved: the gain is not mostly copying of long repeats."


def test_tables_hold_every_row():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(score_table(result()))
    console.print(difference_table(result()))
    text = console.export_text()
    for row in ("gpt", "retro", "retro off", "retro shuffled"):
        assert spoken(row) in text
    assert "3.600" in text and "1.680" in text and "1.660 to 1.700" in text and "200 documents, 1,234,567 tokens" in text
    assert "-0.050 " in text and "-0.070 to -0.030" in text and "(70% of bytes)" in text and "GPT - Retro" in text


def test_an_empty_band_is_a_dash(tmp_path):
    empty = result()
    none = {"value": None, "low": None, "high": None}
    for figures in [*empty["models"].values(), *empty["differences"].values()]:
        figures["by_band"] = {**figures["by_band"], "0.5": none}
        figures["by_overlap"] = {**figures["by_overlap"], "0.125": none}
    assert "0.25 to 0.5" not in in_words(empty)[2]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(score_table(empty))
    assert " - " in console.export_text()
    draw_overlap(empty, tmp_path / "o.png")
    assert (tmp_path / "o.png").stat().st_size > 10_000
