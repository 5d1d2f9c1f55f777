"""The package as it is published, and installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from environments import PIP, environment, run

from tools import dist


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dist.Distributions:
    """What ``make dist`` makes; with the C++ library of this checkout, where it has one."""
    return dist.make(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def wheel(published: dist.Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as where there is no compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(*PIP, "wheel", published.sdist, *options, cwd=folder, CXX="/bin/false")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of an environment with that wheel."""
    return environment(wheel, tmp_path_factory.mktemp("environment"))
