"""Prompts by mode, answers that survive a kill, and figures, with a model that is a function."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from retro_jax.config import QaConfig, QaMode
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.evaluation.outputs import OUTPUTS, completed
from retro_jax.evaluation.prompts import Asker
from retro_jax.evaluation.qa import Answering, evaluate_qa, read_examinations
from retro_jax.evaluation.questions import Passage, Question
from retro_jax.evaluation.templates import load_template
from retro_jax.generation.prompt import Completion, Prompt

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTION = Question(id="1", text="who?", answers=("me",))
PASSAGES = (Passage(title="T", text="one two"), Passage(title="U", text="three"))


class Letters(Tokenizer):
    """A token a character."""

    vocab_size, bos_id, eod_id = 1000, None, 0

    def encode_batch(self, texts: Sequence[str], where: Sequence[str] | None = None) -> list[np.ndarray]:
        return [np.array([ord(letter) for letter in text], np.int32) for text in texts]

    def decode_batch(self, ids: Sequence[np.ndarray]) -> list[str]:
        return ["".join(map(chr, row)) for row in ids]

    def token_bytes(self) -> np.ndarray:
        return np.ones(1000, np.int32)

    def token(self, number: int) -> str:
        return chr(number)


def asker(longest: int = 1000, template: str = "papers") -> Asker:
    return Asker(template=load_template(template, None), tokenizer=Letters(), longest=longest)


def parrot(prompts: Sequence[Prompt], done: Collection[int] = ()) -> Iterator[tuple[int, Completion]]:
    """Answers with the end of the last passage that it is shown, or "nothing"; the last prompt first."""
    for number in sorted(set(range(len(prompts))).difference(done), reverse=True):
        prompt = prompts[number]
        shown = prompt.passages or ([prompt.text.split(" \n ")[0]] if "source" in prompt.text else ["nothing"])
        text = shown[-1].split("source: ")[-1]
        yield number, Completion(text=f"Answer: {text}", tokens=(1, 2), log_probabilities=(-0.5, -0.25), finish="stop")


def test_a_prompt_in_each_mode() -> None:
    """The paper's templates A and B, and which passages the encoder gets."""
    one, two = "title: T, source: one two", "title: U, source: three"
    for mode, text, passages in (
        ("closed", "question: who? \n answer:", ()),
        ("rag", f"{one} \n {two} \n question: who? \n answer:", ()),
        ("retro", "question: who? \n answer:", (one, two)),
        ("retro++", f"{one} \n question: who? \n answer:", (two,)),
    ):
        assert asker().prompt(QUESTION, PASSAGES, mode, 3) == Prompt(text=text, passages=passages, seed=3)  # type: ignore[arg-type]
    asked = Question(id="1", text="Sky is", answers=("blue",), asked=True)
    assert asker().prompt(asked, PASSAGES[:1], "rag", 0).text == f"{one} \n Sky is"
    assert asker().prompt(asked, PASSAGES, "closed", 0).text == "Sky is"


def test_passages_are_cut_until_the_prompt_fits() -> None:
    whole = asker().prompt(QUESTION, PASSAGES, "rag", 0).text
    for longest in range(len("question: who? \n answer:"), len(whole) + 1):
        cut = asker(longest).prompt(QUESTION, PASSAGES, "rag", 0).text
        assert len(cut) <= longest and cut.endswith("question: who? \n answer:")
        passages = cut.removesuffix("question: who? \n answer:").removesuffix(" \n ")
        assert whole.startswith(passages)
    with pytest.raises(UserError, match="the question 1 has 4 tokens more than the 20"):
        asker(20).prompt(QUESTION, PASSAGES, "rag", 0)


@pytest.mark.parametrize("name", ["papers", "instruct", "instruct_long", "plain"])
def test_the_package_s_templates(name: str) -> None:
    template = load_template(name, None)
    text = asker(template=name).prompt(QUESTION, PASSAGES, "rag", 0).text
    assert "one two" in text and "who?" in text and not any(stop in text[-len(stop) :] for stop in template.stop)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[other]", "'mine' is not in .*; choose one of other"),
        ("[mine]\npassage = '{text}'", "has no separator"),
        ("not toml", "cannot be read"),
        (
            "[mine]\npassage='{title}{text}'\nseparator=' '\nquestion='{q}'\nwith_passages='{passages}{question}'\nstop=[]",
            r"question of the template 'mine' .* has the places \['q'\]; it needs {question}",
        ),
        (
            "[mine]\npassage='{title}{text}'\nseparator=''\nquestion='{question}'\nwith_passages='{passages}{question}'\nstop=['']",
            "stop of the template 'mine'",
        ),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_template("mine", str(tmp_path / "mine.toml"))


def questions_file(folder: Path, count: int = 12) -> str:
    lines = [
        {
            "id": f"{n}",
            "question": f"what is {n}?",
            "answers": [f"number {n}"],
            "ctxs": [f"number {n % 9}"],
        }
        for n in range(count)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "items.jsonl")


def evaluated(folder: Path, answerer=parrot, **settings: object) -> dict:
    config = QaConfig(questions=(questions_file(folder),), template="papers", **settings)  # type: ignore[arg-type]
    models = {
        "retro": Answering(answerers=dict.fromkeys(get_args(QaMode), answerer), fingerprint="r"),
        "gpt": Answering(answerers={"closed": answerer, "rag": answerer}, fingerprint="g"),
    }
    (result,) = evaluate_qa(config, read_examinations(config, None), models, asker(), folder / "evaluation", {"steps": 1})
    return result


def test_figures_of_every_model_and_mode(tmp_path: Path) -> None:
    """The parrot is right where the passage is: for 9 of 12 questions."""
    result = evaluated(tmp_path)
    assert list(result["figures"]) == ["retro closed", "retro rag", "retro retro", "retro retro++", "gpt closed", "gpt rag"]
    for row, right in (("retro rag", 0.75), ("retro retro", 0.75), ("gpt rag", 0.75), ("gpt closed", 0.0), ("retro closed", 0.0)):
        figures = result["figures"][row]
        assert figures["exact_match"]["value"] == right
        assert figures["exact_match"]["low"] <= right <= figures["exact_match"]["high"]
    # "number 0" for "number 9": one of two tokens, no bigram.
    figures = result["figures"]["retro rag"]
    assert figures["f1"]["value"] == pytest.approx(0.75 + 0.25 * 0.5)
    means = [figures[name]["value"] for name in ("rouge1", "rouge2", "rougeL")]
    assert means == pytest.approx([0.875, 0.75, 0.875]) and figures["rouge"]["value"] == pytest.approx(np.prod(means) ** (1 / 3))
    name = f"{tmp_path.name}-items"
    assert result["questions"] == name and (tmp_path / "evaluation" / f"qa-{name}.json").exists()


def test_choices_are_judged_by_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "boolq.jsonl"
    lines = [{"query": f"Q{n}?", "choices": ["no", "yes"], "gold": n % 2} for n in range(10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = QaConfig(questions=(str(path),), modes=("closed",))

    def says_yes(prompts: Sequence[Prompt], done: Collection[int]) -> Iterator[tuple[int, Completion]]:
        for number, _ in enumerate(prompts):
            yield number, Completion(text=" Yes!" if number else "Hm", tokens=(1,), log_probabilities=(0.0,), finish="stop")

    models = {"gpt": Answering(answerers={"closed": says_yes}, fingerprint="g")}
    (result,) = evaluate_qa(config, read_examinations(config, None), models, asker(), tmp_path, {})
    figures = result["figures"]["gpt closed"]
    assert (figures["accuracy"]["value"], figures["undecided"]["value"]) == (0.5, 0.1) and "f1" not in figures


def test_questions_without_passages_are_refused_where_modes_need_them(tmp_path: Path) -> None:
    (tmp_path / "nq.jsonl").write_text('{"question": "q", "answers": ["x"]}\n')
    with pytest.raises(UserError, match="gives no passages, which the modes rag, retro, retro"):
        read_examinations(QaConfig(questions=(str(tmp_path / "nq.jsonl"),)), None)
    with pytest.raises(UserError, match="QaConfig.questions is empty"):
        read_examinations(QaConfig(), None)
    path = questions_file(tmp_path)
    with pytest.raises(UserError, match="names two files"):
        read_examinations(QaConfig(questions=(path, path)), None)


def test_what_is_answered_stays_when_the_model_fails(tmp_path: Path) -> None:
    """Logits that are not finite after seven answers: the next run asks for the other five."""
    asked: list[int] = []

    def fails(prompts: Sequence[Prompt], done: Collection[int]) -> Iterator[tuple[int, Completion]]:
        for answered, answer in enumerate(parrot(prompts, done)):
            if answered == 7:
                raise UserError("the logits of prompt 7 are not finite")
            yield answer

    def counted(prompts: Sequence[Prompt], done: Collection[int]) -> Iterator[tuple[int, Completion]]:
        asked.append(len(prompts) - len(done))
        return parrot(prompts, done)

    with pytest.raises(UserError, match="not finite"):
        evaluated(tmp_path, fails, modes=("rag",))
    again = evaluated(tmp_path, counted, modes=("rag",))
    assert asked == [5, 12]  # the rest of the first model's, all of the second's
    (tmp_path / "fresh").mkdir()
    assert evaluated(tmp_path / "fresh", modes=("rag",))["figures"] == again["figures"]


def test_a_torn_line_is_answered_anew(tmp_path: Path) -> None:
    prompts = [Prompt(text=f"{n}") for n in range(4)]
    whole = completed(tmp_path, "q", {}, prompts, parrot)
    (path,) = tmp_path.glob(f"q-*/{OUTPUTS}")
    written = path.read_bytes()
    for end in range(0, len(written), 11):
        path.write_bytes(written[:end])
        assert completed(tmp_path, "q", {}, prompts, parrot) == whole and path.read_bytes() == written
    assert completed(tmp_path, "q", {"stop": "other"}, prompts, parrot) == whole
    assert len(list(tmp_path.glob("q-*"))) == 2


def test_killed_and_continued_gives_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL in the middle of a process that takes its time for each answer."""
    program = (
        "import sys, time; from pathlib import Path; from tests.evaluation.test_qa import evaluated, parrot\n"
        "def slow(prompts, done):\n    for one in parrot(prompts, done):\n        time.sleep(0.1)\n        yield one\n"
        "evaluated(Path(sys.argv[1]), slow)"
    )
    killed, whole = tmp_path / "here", tmp_path / "there" / "here"
    killed.mkdir()
    whole.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", program, str(killed)], cwd=REPOSITORY)
    while sum(path.read_bytes().count(b"\n") for path in killed.glob(f"evaluation/qa/*/{OUTPUTS}")) < 20:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    evaluated(killed)
    evaluated(whole)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.suffix in (".json", ".jsonl"))
    assert len(files) == 1 + 1 + 6 * 2
    for name in files:
        if "qa-" in name.name:
            first, second = (json.loads((folder / name).read_text()) for folder in (killed, whole))
            assert first == second
        else:
            assert (killed / name).read_bytes() == (whole / name).read_bytes()
