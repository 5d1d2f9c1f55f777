"""Kernels packed without a GPU are found, wherever they are unpacked, by the launches of a GPU run."""

from __future__ import annotations

import json
import os
import tarfile
from functools import partial

import pytest
import torch

from benchmarks import machine
from benchmarks.contest import inputs_of, job
from benchmarks.gpu import archive, pack, smoke, stub
from benchmarks.gpu.stage import NAMES, Setup, load
from benchmarks.peers import attempt
from benchmarks.shapes import Case
from vitreg_kernels._triton import mode
from vitreg_kernels.measure import warm
from vitreg_kernels.measure.race import Stopped

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")
if mode.INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.nvidia import driver

from vitreg_kernels._triton import offline

ARCH = 90
CPU = torch.device("cpu")
SMALL = Case(2, 1, 22, "bf16", "forward", 16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where packs are made, of a stage that launches one kernel."""
    monkeypatch.setattr(pack, "_FOLDER", tmp_path)
    monkeypatch.setattr(pack, "_STAGES", ("smoke",))
    monkeypatch.setattr(smoke, "_cases", lambda setup: [SMALL])
    for name in ("TRITON_CACHE_DIR", "TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"):  # given back at the end
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for remembered in (driver.libcuda_dirs, driver.library_dirs):  # by a whole process
        remembered.cache_clear()
    return tmp_path


def keys():
    with stub.pretending(ARCH):
        launches = warm.launched(partial(smoke.rehearse, SMALL, CPU))
        return [offline.compilation(launch, ARCH) for launch in launches]


def test_what_is_packed_is_found_by_a_launch_in_another_folder(folder, tmp_path, monkeypatch, capsys):
    assert pack.main(["--arch", str(ARCH)]) == 0
    assert "1 kernels and " in capsys.readouterr().out
    (file,) = tmp_path.glob("*.tar.xz")
    manifest = archive.read(file)
    kernels = keys()
    assert manifest["keys"] == [kernel.key for kernel in kernels]
    assert (manifest["arch"], manifest["missing"], manifest["sources"]) == (ARCH, 0, machine.sources())
    assert archive.misfits(manifest, ARCH) == []

    there = tmp_path / "elsewhere"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(there))
    archive.take(file, ARCH, machine.sources())
    assert "1 kernels and" in capsys.readouterr().out
    assert all(kernel.cached for kernel in kernels)
    (kernel,) = kernels
    assert {path.suffix for path in archive.folder_of(kernel.key).iterdir()} == {".cubin", ".json"}
    for path in json.loads(next(archive.folder_of(kernel.key).glob("__grp__*")).read_text())["child_paths"].values():
        assert path.startswith(str(there))
    assert kernel.run().asm["cubin"]
    with stub.pretending(ARCH):
        told = warm.compile_ahead([partial(smoke.rehearse, SMALL, CPU)], CPU)
    assert (told.cached, told.compiled, told.left) == (1, 0, 0)


@pytest.mark.slow
def test_a_pack_that_is_cut_says_what_is_missing_and_the_next_goes_on(folder, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as cut:
        cut.setattr(warm, "_compile", int)  # gives nothing, as a job that never began
        cut.setattr(warm.Compiler, "wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert pack.main([]) == 1
    assert "1 kernels are missing: run the same command again" in capsys.readouterr().err
    assert pack.main([]) == 0


def test_a_call_that_cannot_be_made_is_no_smaller_pack(folder, monkeypatch, capsys):
    monkeypatch.setattr(smoke, "rehearse", lambda case, device: 1 / 0)
    assert pack.main([]) == 2
    assert "a call of smoke cannot be made: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked", [["--triton", "3.5"], ["--triton", "3"], ["--python", "3.9"], ["--triton", "3.77"]], ids=" ".join
)
def test_another_environment_is_one_sentence(folder, capsys, asked):
    status = pack._problem(pack._parser().parse_args(asked))
    assert (status is None) is (asked == ["--triton", "3"])  # "3" is any 3
    if status is not None:
        assert "run the command in an environment of those" in status
        assert "\n" not in status


def manifest(**changes):
    common = {"arch": ARCH, "sources": machine.sources(), "kernels": 0, "launchers": 0, "missing": 0, "keys": []}
    return archive.Manifest(**archive.environment(), **common) | changes


@pytest.mark.parametrize("field", ["triton", "libtriton", "python", "system", "arch"])
def test_an_archive_for_elsewhere_is_refused_by_name(tmp_path, monkeypatch, field):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    archive.write(tmp_path / "a.tar.xz", tmp_path, manifest(**{field: "another"}))
    with pytest.raises(ValueError, match=f"does not fit: it was made for {field} another, and here is {field} "):
        archive.take(tmp_path / "a.tar.xz", ARCH, machine.sources())
    assert not (tmp_path / "cache").exists()


def test_an_archive_of_other_sources_or_with_gaps_is_taken_and_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    archive.write(tmp_path / "a.tar.xz", tmp_path, manifest(sources="fedcba9876543210", missing=7))
    archive.take(tmp_path / "a.tar.xz", ARCH, machine.sources())
    told = capsys.readouterr().out
    assert "it was made from other sources" in told
    assert "7 kernels are compiled here" in told


@pytest.mark.parametrize("content", [b"", b"not an archive", None], ids=["empty", "text", "another archive"])
def test_what_is_no_archive_is_one_sentence(tmp_path, content):
    file = tmp_path / "a.tar.xz"
    if content is None:
        with tarfile.open(file, "w:xz") as tar:
            tar.add(__file__, "something.py")
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar\.xz") as raised:
        archive.read(file)
    assert "\n" not in str(raised.value)


def test_nothing_is_unpacked_outside_the_folder_of_a_kernel(tmp_path):
    file = tmp_path / "a.tar.xz"
    with tarfile.open(file, "w:xz") as tar:
        for name in (
            "../outside.so",
            "key/../../outside.so",
            "/etc/outside.so",
            "key/deep/outside.so",
            "key/kernel.so",
        ):
            member = tarfile.TarInfo(name)
            tar.addfile(member)
    archive.unpack(file, tmp_path / "cache")
    assert [path.name for path in tmp_path.rglob("*.so")] == ["kernel.so"]


@pytest.mark.slow
def test_a_kernel_whose_unpacking_was_cut_is_not_there(folder, tmp_path, monkeypatch):
    """Its list of files comes last, and without that triton compiles it."""
    assert pack.main([]) == 0
    (file,) = tmp_path.glob("*.tar.xz")
    with tarfile.open(file) as tar:
        names = tar.getnames()
    assert names[0] == "manifest.json"
    (key,) = archive.read(file)["keys"]
    of_kernel = [name for name in names if name.startswith(archive.folder_of(key).name)]
    assert "__grp__" in of_kernel[-1]
    assert not any("__grp__" in name for name in of_kernel[:-1])


def test_every_stage_says_which_kernels_it_takes():
    loaded = load()
    packed = {*pack._STAGES, "environment", "compiled", "flex", "tune"}  # the last four take none of their own
    assert packed == set(NAMES)
    for name in packed - set(pack._STAGES):
        assert list(loaded.stages[name].rehearsals(Setup(CPU, dry=False))) == []


def test_a_stand_in_for_the_driver_is_linked_and_loaded(tmp_path, monkeypatch):
    for name in ("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    stub.libcuda(tmp_path)
    assert os.environ["TRITON_LIBCUDA_PATH"] == str(tmp_path)
    assert os.environ["LD_LIBRARY_PATH"].startswith(str(tmp_path))


def test_without_a_c_compiler_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="launchers need a C compiler"):
        stub.libcuda(tmp_path)


def test_after_pretending_a_kernel_wants_a_gpu_again():
    def served():
        return not isinstance(attempt(*smoke._ours(), job, *inputs_of(SMALL, CPU)()), Stopped)

    with stub.pretending(ARCH):
        assert warm.launched(served)
    assert not served()
