"""TensorFlow Datasets in array_record, without TensorFlow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_metadata

from retro_jax.corpus.sources import read_documents, source_fingerprint
from retro_jax.errors import UserError

COUNTS = {"train": 12, "test": 3}


def text_of(split: str, number: int) -> str:
    return f"{split} text é {number}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set ``small_texts`` of two splits; its code is gone when it is read."""

    class SmallTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = None

        @classmethod
        def get_metadata(cls) -> dataset_metadata.DatasetMetadata:
            return dataset_metadata.DatasetMetadata(description="Small texts.", citation="", tags=[])

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"text": tfds.features.Text(), "title": tfds.features.Text(), "raw": tfds.features.Text(), "n": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download: object) -> dict:
            return {split: self._generate_examples(split) for split in COUNTS}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
            for i in range(COUNTS[split]):
                yield i, {"text": text_of(split, i), "title": f"T{i}", "raw": b"\xff", "n": i}

    folder = tmp_path_factory.mktemp("tfds")
    SmallTexts(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(autouse=True)
def _data_dir(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # tfds reads TFDS_DATA_DIR once, when it is imported.
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(prepared))


def test_documents_of_splits() -> None:
    train = list(read_documents("tfds:small_texts"))
    assert sorted(document.text for document in train) == sorted(text_of("train", i) for i in range(12))
    assert [document.title for document in train] == [f"T{document.text.split()[-1]}" for document in train]
    assert train == [*read_documents("tfds:small_texts")]
    test = list(read_documents("tfds:small_texts:test"))
    assert sorted(document.text for document in test) == sorted(text_of("test", i) for i in range(3))
    assert test[1].where == "tfds:small_texts:test example 1"
    quarter = [document.text for document in read_documents("tfds:small_texts:1.0.0:train[:25%]")]
    assert quarter == [document.text for document in train[:3]]


def test_fingerprints() -> None:
    prints = {source_fingerprint(f"tfds:small_texts{split}") for split in ("", ":test", ":train[:25%]")}
    assert len(prints) == 3
    assert all(text.startswith("tfds:small_texts/1.0.0:") for text in prints)
    assert source_fingerprint("tfds:small_texts:test") in prints


def test_without_tensorflow(prepared: Path) -> None:
    code = (
        "import sys; from retro_jax.corpus.sources import read_documents;"
        "print(len(list(read_documents('tfds:small_texts'))), 'tensorflow' in sys.modules)"
    )
    run = [sys.executable, "-c", code]
    environment = {"TFDS_DATA_DIR": str(prepared), "PATH": ""}
    result = subprocess.run(run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], env=environment)
    assert result.stdout.split() == ["12", "False"]


@pytest.mark.parametrize(
    ("source", "field", "message"),
    [
        (
            "tfds:nowhere",
            "text",
            "DatasetNotFoundError.*; it must be prepared in .* as `tfds build nowhere --file_format=array_record`",
        ),
        ("tfds:small_texts:dev", "text", "Unknown split 'dev'. Should be one of .'train', 'test'.."),
        ("tfds:", "text", "is not tfds:<dataset>"),
        ("tfds:small_texts", "body", "example 0 has no UTF-8 text in 'body'; its features are .*'text'"),
        ("tfds:small_texts", "n", "example 0 has no UTF-8 text in 'n'"),
        ("tfds:small_texts", "raw", "example 0 has no UTF-8 text in 'raw'"),
    ],
)
def test_what_cannot_be_read_is_told(source: str, field: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_documents(source, text_field=field))
