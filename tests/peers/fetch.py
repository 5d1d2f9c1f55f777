"""Fetches a library's tests from the package index: they are in its source distribution, not in what is installed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from .peer import Peer

CACHE = Path(__file__).parents[2] / "build" / "peers"


def fetched(peer: Peer) -> Path:
    """The folder with ``<name>_tests`` and what they need, of the version that is installed; fetched the first time.

    Their folder gets another name than ``tests``, which is that of this package.

    Raises:
        subprocess.CalledProcessError: if the index does not give them.
    """
    folder = CACHE / f"{peer.name}-{version(peer.name)}"
    ready = folder / "pytest.ini"  # no settings, and the last to be written
    if not ready.exists():
        print(f"fetching the tests of {folder.name} into {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        _fetch_tests(peer, folder)
        if peer.needs:
            _pip("install", "--no-deps", "--upgrade", "--target", str(folder), *peer.needs)
        ready.write_text("[pytest]\n")
    return folder


def _fetch_tests(peer: Peer, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        wanted = f"{peer.name}=={version(peer.name)}"
        _pip("download", "--no-deps", "--no-binary", ":all:", "--dest", temporary, wanted)
        (archive,) = Path(temporary).iterdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = member.name.split("/")
                if member.isfile() and parts[1] == "tests":
                    renamed = "/".join((f"{peer.name}_tests", *parts[2:]))
                    tar.extract(member.replace(name=renamed, deep=False), folder, filter="data")


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]], check=True)
