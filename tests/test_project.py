"""The packaging: where kernels/ is installed, what a wheel holds, and that other packages are not shadowed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import retro_jax

REPOSITORY = Path(__file__).resolve().parent.parent


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_are_installed_from_the_top(tmp_path: Path) -> None:
    program = "import retro_jax.kernels.chunked_cross_attention as c; print(c.__file__)"
    for folder in (REPOSITORY, tmp_path):
        assert (
            Path(python("-c", program, cwd=folder).strip()) == REPOSITORY / "kernels" / "chunked_cross_attention" / "__init__.py"
        )


def test_transformers_does_not_take_our_kernels_for_the_package_of_that_name() -> None:
    pytest.importorskip("transformers")
    program = (
        "import transformers\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available(), transformers.LlamaConfig().hidden_size)\n"
        "try:\n    import torch\nexcept ImportError:\n    pass\nelse:\n    import transformers.integrations.hub_kernels\n"
        "    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,\n"
        "        num_key_value_heads=2, vocab_size=16)\n"
        "    print(transformers.AutoModelForCausalLM.from_config(config)(torch.zeros(1, 3, dtype=int)).logits.shape)\n"
    )
    assert python("-c", program, cwd=REPOSITORY).splitlines()[0] == "False 4096"


def test_a_wheel_holds_every_module(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools 77 is not installed")
    copy = tmp_path / "copy"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout
    for name in listed.splitlines():
        if name.startswith(("retro_jax/", "kernels/")) or "/" not in name:
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((REPOSITORY / name).read_bytes())
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), ".", cwd=copy)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    ours = {str(path.relative_to(copy)) for path in (copy / "retro_jax").rglob("*.py")}
    assert inside == ours | {f"retro_jax/{path.relative_to(copy)}" for path in (copy / "kernels").rglob("*.py")}


def test_version_and_changelog_agree() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[Unreleased\]", changelog, re.MULTILINE)
    assert f"## [{retro_jax.__version__}]" in changelog


def test_constraints_pin_every_dependency_and_name_no_address() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.split(r"[\[<>=]", d)[0].lower() for d in (*project["dependencies"], *extras["cpu"], *extras["test"], *extras["dev"])
    }
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for version in ("3.11", "3.12"):
        pinned = {
            line.split("==")[0].lower().replace("_", "-") for line in lines if line.endswith(f'python_version == "{version}"')
        }
        assert wanted - {"retro-jax"} <= pinned
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+; python_version == "3\.1[12]"', line) for line in lines)


def test_make_names_its_targets() -> None:
    # Without what a make that runs these tests would hand down: it would print the folders it enters, too.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["make", "-n", "quickstart"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ".venv/bin/python train.py --config configs/quickstart.gin"
