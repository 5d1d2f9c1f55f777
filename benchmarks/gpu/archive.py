"""Compiled kernels as one file for another machine: ``pack`` makes it, and a GPU run starts from it."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import platform
import sysconfig
import tarfile
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TypedDict, get_type_hints

_MANIFEST = "manifest.json"
_GROUP = "__grp__"  # triton's list of a kernel's files, by absolute path
_KEPT = (".cubin", ".json", ".so")  # what a launch loads; the rest is what the compiler passed through


class Manifest(TypedDict):
    """What an archive holds and where it fits."""

    triton: str
    libtriton: str  # digest of triton's compiled library, which every key hashes: it differs by the version of Python
    python: str  # "3.12": launchers are extension modules
    system: str
    arch: int  # ten times the compute capability
    sources: str  # ``machine.sources()``
    kernels: int
    launchers: int
    missing: int  # kernels that the stages take and that were not compiled
    keys: list[str]  # of the kernels, in triton's cache


@cache
def _digest(library: Path) -> str:
    """Of a file of hundreds of MB that does not change while a process runs."""
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def environment() -> dict[str, str]:
    """The fields of a manifest that must be the same where the archive is taken."""
    import triton

    library = next(Path(triton.__file__).parent.glob("_C/libtriton*.so"))
    return {
        "triton": triton.__version__,
        "libtriton": _digest(library),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "system": f"{platform.system()} {platform.machine()}",
    }


def misfits(manifest: Manifest, arch: int) -> list[str]:
    """Why no kernel of an archive would be found here, as sentences; empty if they would."""
    here = {**environment(), "arch": arch}
    return [
        f"it was made for {name} {manifest[name]}, and here is {name} {found}"
        for name, found in here.items()
        if manifest[name] != found
    ]


def take(file: Path, arch: int, sources: str) -> None:
    """Has triton find the kernels of an archive, and says what it holds.

    Args:
        file: the archive.
        arch: ten times the compute capability of the GPU.
        sources: ``machine.sources()`` of here.

    Raises:
        OSError: if it cannot be unpacked.
        ValueError: if it is none, or does not fit.
    """
    manifest = read(file)
    if reasons := misfits(manifest, arch):
        raise ValueError(f"{file} does not fit: {'; '.join(reasons)}")
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    start = time.monotonic()
    unpack(file, folder)
    held = f"{manifest['kernels']} kernels and {manifest['launchers']} launchers of {file}"
    print(f"    triton's cache in {folder} holds {held} ({time.monotonic() - start:.0f} s)", flush=True)
    if manifest["missing"]:
        print(f"    it is not complete: {manifest['missing']} kernels are compiled here", flush=True)
    if manifest["sources"] != sources:
        print("    it was made from other sources: kernels that have changed since are compiled here", flush=True)


def folder_of(key: str) -> Path:
    """Where triton's cache has a kernel, or would have it."""
    from triton.runtime.cache import get_cache_manager

    return Path(get_cache_manager(key).cache_dir)


def write(file: Path, cache: Path, manifest: Manifest) -> None:
    """Writes the kernels of a manifest, and every launcher, from triton's cache, which is in a folder."""
    folders = [*map(folder_of, manifest["keys"]), *(path.parent for path in _modules(cache))]
    part = file.with_name(file.name + ".part")
    with tarfile.open(part, "w:xz", preset=6) as tar:
        _add(tar, _MANIFEST, json.dumps(manifest, indent=1).encode())
        for folder in folders:
            kept = [path for path in folder.iterdir() if path.suffix in _KEPT]
            # The list last: where unpacking is cut, triton finds a kernel either whole or not at all.
            kept.sort(key=lambda path: (path.name.startswith(_GROUP), path.name))
            names = {path.name for path in kept}
            for path in kept:
                content = path.read_bytes()
                if path.name.startswith(_GROUP):
                    content = _group(name for name in json.loads(content)["child_paths"] if name in names)
                _add(tar, f"{folder.name}/{path.name}", content)
    part.replace(file)


def launchers(cache: Path) -> int:
    """How many of this Python a folder holds."""
    return len(_modules(cache))


def read(file: Path) -> Manifest:
    """The manifest of an archive.

    Raises:
        ValueError: if it is none.
    """
    try:
        with tarfile.open(file, "r:xz") as tar:
            member = tar.next()
            manifest = json.loads(tar.extractfile(member).read()) if member and member.name == _MANIFEST else None
    except (OSError, tarfile.TarError, lzma.LZMAError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if manifest is None or manifest.keys() != get_type_hints(Manifest).keys():
        raise ValueError(f"{file} is not of `python -m benchmarks.gpu.pack`")
    return manifest


def unpack(file: Path, cache: Path) -> None:
    """Lays an archive out as triton's cache in a folder, beside what is there.

    Raises:
        ValueError: if it is broken.
    """
    cache = cache.absolute()
    try:
        with tarfile.open(file, "r:xz") as tar:
            for member in tar:
                folder, _, name = member.name.partition("/")
                if not member.isfile() or not name or {folder, name} & {"", ".", ".."} or "/" in name:
                    continue  # the manifest; nothing else is anywhere but in a kernel's folder
                content = tar.extractfile(member).read()
                if name.startswith(_GROUP):
                    paths = {child: str(cache / folder / child) for child in json.loads(content)["child_paths"]}
                    content = json.dumps({"child_paths": paths}).encode()
                (cache / folder).mkdir(parents=True, exist_ok=True)
                (cache / folder / name).write_bytes(content)
    except (tarfile.TarError, lzma.LZMAError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is broken: {error}") from error


def _modules(cache: Path) -> list[Path]:
    """Extension modules that triton compiled: launchers, and its driver's own."""
    return sorted(cache.glob(f"*/*{sysconfig.get_config_var('EXT_SUFFIX')}"))


def _group(names: Iterable[str]) -> bytes:
    """By name alone: where they are is known once they are unpacked."""
    return json.dumps({"child_paths": {name: name for name in names}}).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
