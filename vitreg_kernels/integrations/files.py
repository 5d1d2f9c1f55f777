"""Checkpoints on disk: files of weights, and folders of them as transformers and timm write these.

Nothing is fetched, and no class is unpickled that torch does not call safe, but for argparse's bag of attributes.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")
# In the order in which transformers looks for them; an index names the files that the weights are split into.
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_CLASS = re.compile(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>")  # in what torch says of one that it does not call safe


def read(path: str | PathLike[str]) -> tuple[Any, Mapping[str, Any] | None]:
    """What a file or a folder of weights holds, and the folder's ``config.json``.

    Args:
        path: a ``.safetensors`` file; a ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` or ``.tar`` file that ``torch.save``
            wrote; or a folder with one of these under the names of transformers, whole or split.

    Returns:
        The content of the file, and the ``config.json`` or None if there is none.

    Raises:
        ValueError: if the file is of another kind, or cannot be read; or the folder has no weights.
        pickle.UnpicklingError: if the file holds objects of a class that torch does not call safe.
        FileNotFoundError: if there is no such file or folder.
        ModuleNotFoundError: if it is a ``.safetensors`` file and safetensors is not installed.
    """
    path = Path(path)
    return _read_folder(path) if path.is_dir() else (_read_file(path), None)


def _read_folder(folder: Path) -> tuple[Any, Mapping[str, Any] | None]:
    config = _read_json(folder / "config.json") if (folder / "config.json").exists() else None
    for name in _IN_FOLDERS:
        if (folder / name).exists():
            return _read_split(folder / name) if name.endswith(".json") else _read_file(folder / name), config
    raise ValueError(f"the folder {folder} has no weights: none of {', '.join(_IN_FOLDERS)}")


def _read_split(index: Path) -> dict[str, Any]:
    names = _read_json(index).get("weight_map")
    # An index is data from elsewhere, and must not lead out of its folder.
    if not isinstance(names, Mapping) or not all(name == Path(str(name)).name for name in names.values()):
        raise ValueError(f"{index} is no index: it must have a weight_map to names of files beside it")
    weights: dict[str, Any] = {}
    for name in sorted(set(names.values())):
        part = _read_file(index.parent / name)
        if not isinstance(part, Mapping):
            raise ValueError(f"{index.parent / name} must hold tensors by name, not a {type(part).__name__}")
        weights |= part
    if missing := names.keys() - weights.keys():
        raise ValueError(f"{index} names {sorted(missing)[0]}, which {names[sorted(missing)[0]]} does not hold")
    return weights


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _read_file(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *_PICKLED):
        raise ValueError(f"{path} must end in .safetensors, .pt, .pth, .bin, .ckpt or .pth.tar, or be a folder")
    if suffix != ".safetensors":
        return _or_unreadable(_unpickle, path, "torch.save")
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs safetensors: run `pip install safetensors`") from error
    return _or_unreadable(load_file, path, "safetensors")


def _or_unreadable(load: Callable[[Path], Any], path: Path, writer: str) -> Any:
    try:
        return load(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what garbage makes a parser say is of any kind
        if isinstance(error, pickle.UnpicklingError) and (found := _CLASS.search(str(error))):
            raise pickle.UnpicklingError(
                f"{path} holds objects of {found[1] or found[2]}, and is read with weights_only=True, which runs no "
                "code of a file: where you trust it, save its state dict alone, torch.save(model.state_dict(), ...) "
                "of a model or torch.save(checkpoint['state_dict'], ...) of a checkpoint, and load that"
            ) from error
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript archive, which is code: save its state_dict() alone") from error
        raise ValueError(f"{path} cannot be read as what {writer} wrote: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    """What the file is instead, or else what the parser said."""
    with path.open("rb") as file:
        head = file.read(256).lstrip()
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer to the file: run `git lfs pull`"
    if re.match(rb"<[!?a-zA-Z]", head):
        return "it is a page of HTML or XML, as a failed download leaves it"
    said = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    if re.match(r"Unsupported operand 1[45]\d\b", said):  # the opcodes that protocols 4 and 5 added
        return "it was pickled with protocol 4 or 5, and weights_only=True reads protocol 2, which torch.save uses"
    sentence = said.partition(". ")[0].partition("\n")[0]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


def _unpickle(path: Path) -> Any:
    # torch takes back what a context has added, even if it was there before.
    known = argparse.Namespace in torch.serialization.get_safe_globals()
    with nullcontext() if known else torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
