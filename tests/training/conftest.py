"""Compiled programs are shared by the tests and by the processes that they start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

SETTINGS = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.3}


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of compiled programs, shared with the next session and with the processes that tests start, if they have as many
    devices as this one."""
    settings = {**SETTINGS, "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp().parent / "compiled")}
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, compiled: None) -> Path:
    """The folder of a tiny run that nothing interrupted."""
    from tests.training.tiny import run, tiny_config

    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, tiny_config()) == 12
    return folder
