"""Strict JAX on the CPU, golden files, and no silent skips in CI."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

# In the environment, so that the commands which tests start are as strict.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; what names no mesh runs on the first of them

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"
SHARED = REPOSITORY.parent / "shared"
MISSING_PACKAGE = re.compile(r"could not import|not installed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-goldens", action="store_true", help="write the golden files anew instead of comparing with them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--renew-goldens"):
        items[:] = [item for item in items if "golden" in getattr(item, "fixturenames", ())]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares text with ``tests/golden/<name>``; `make goldens` writes them anew."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--renew-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is not there; run `make goldens` and read the diff"
        assert text == path.read_text(encoding="utf-8"), f"{path} differs; if that is meant, run `make goldens` and read the diff"

    return compare


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs the data in ../shared, which is not there")
    return SHARED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _refuse_missing_package(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return _refuse_missing_package(report)


def _refuse_missing_package(report: Any) -> Any:
    """In CI everything that the tests need is installed: a skip for a missing package is a hole in it."""
    reason = str(report.longrepr)
    if os.environ.get("CI") == "true" and report.skipped and MISSING_PACKAGE.search(reason):
        report.outcome = "failed"
        report.longrepr = f"in CI no test is skipped for a missing package: {reason}"
    return report
