"""A state dict out of what training codes put around it: dicts of dicts, and wrappers' parts of the names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .state_dict import holds_vit

# Of DistributedDataParallel and AveragedModel, torch.compile, FSDP and activation checkpointing, anywhere in a name.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_COUNT = "n_averaged"  # which AveragedModel keeps beside the weights
# What timm's training writes and its loader looks for, in this order.
_OF_TIMM = ("state_dict_ema", "model_ema", "state_dict", "model")


def find_weights(source: Any) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a ViT by name, without wrappers' parts, wherever they lie in nested dicts.

    Of several state dicts the teacher's is taken, which is the model that a self-distillation is for, and among the
    names that timm uses the one that its loader takes: the averaged weights first.

    Args:
        source: a state dict, or a mapping that holds some, at any depth.

    Returns:
        The weights, and what was taken of several in one sentence.

    Raises:
        ValueError: if there is no state dict, there are several that no convention chooses from, or two names are the
            same without wrappers' parts.
    """
    found = dict(_vits(source, ()))
    if not found and not isinstance(source, Mapping):
        raise ValueError(f"the source must hold a state dict, tensors by name, not a {type(source).__name__}")
    if not found and source and all(isinstance(value, Tensor) for value in source.values()):
        return _unwrapped(source), None  # of no library known, as the conversions say
    if not found:
        keys = ", ".join(map(repr, list(source)[:8]))
        rest = f"there is none under its keys {keys}" if source else "is empty"
        raise ValueError(f"the source must hold the state dict of a ViT, and {rest}")
    path, others = _choose(sorted(found))
    taken = None
    if others:
        rest = ", ".join(".".join(other) for other in others)
        taken = f"took {'.'.join(path)} of the source, and not {rest}: give load_vit the state dict that you mean"
    return _unwrapped(found[path]), taken


def _vits(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every mapping that has a ViT's patch embedding among its tensors, by its path."""
    if not isinstance(node, Mapping):
        return
    if holds_vit(_name(key) for key, value in node.items() if isinstance(key, str) and isinstance(value, Tensor)):
        yield path, node
    for key, value in node.items():
        yield from _vits(value, (*path, str(key)))


def _choose(paths: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One of the paths, and those it was preferred to."""
    chosen = paths
    for depth in range(max(map(len, paths))):
        keys = sorted({path[depth] if depth < len(path) else "" for path in chosen})
        if len(keys) == 1:
            continue
        if "teacher" in keys:
            key = "teacher"
        elif set(keys) <= set(_OF_TIMM):
            key = min(keys, key=_OF_TIMM.index)
        else:
            names = ", ".join(".".join(path) or "the top" for path in chosen)
            raise ValueError(f"the source holds several state dicts, under {names}: give load_vit the one you mean")
        chosen = [path for path in chosen if path[depth] == key]
    return chosen[0], [path for path in paths if path not in chosen]


def _name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrapped(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under their names without wrappers' parts; what else lies beside them is no weight."""
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or name.split(".")[-1] == _COUNT:
            continue
        if _name(name) in result:
            raise ValueError(f"the weights have {_name(name)} twice, once within a wrapper: give those of one model")
        result[_name(name)] = tensor
    return result
