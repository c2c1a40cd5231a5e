"""In CI a test that is skipped because a package is missing has failed; other skips stay skips."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent / "conftest.py"
MODULE_SKIP = "import pytest\npytest.importorskip('not_there_at_all')\n\ndef test_a():\n    pass\n"
TEST_SKIP = "import pytest\n\ndef test_a():\n    pytest.importorskip('not_there_at_all')\n"
OTHER_SKIP = "import pytest\n\ndef test_a():\n    pytest.skip('needs the data in ../shared, which is not there')\n"


@pytest.mark.parametrize(
    ("content", "ci", "passes"),
    [
        (MODULE_SKIP, True, False),
        (TEST_SKIP, True, False),
        (OTHER_SKIP, True, True),
        (MODULE_SKIP, False, True),
        (TEST_SKIP, False, True),
    ],
)
def test_skips(tmp_path: Path, content: str, ci: bool, passes: bool) -> None:
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "test_it.py").write_text(content + "\n\ndef test_b():\n    pass\n" if content is not MODULE_SKIP else content)
    (tmp_path / "test_other.py").write_text("def test_c():\n    pass\n")
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | ({"CI": "true"} if ci else {})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "."], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 0) == passes, done.stdout
    assert ("no test is skipped for a missing package" in done.stdout) == (not passes)
