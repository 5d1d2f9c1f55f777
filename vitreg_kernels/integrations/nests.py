"""A state dict out of what training codes put around it: dicts of dicts, and wrappers' parts of the names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .state_dict import vit_prefixes

# Of DistributedDataParallel and AveragedModel, torch.compile, FSDP and activation checkpointing, anywhere in a name.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_COUNT = "n_averaged"  # which AveragedModel keeps beside the weights
_TEACHER = "teacher"
# What timm's training writes and its loader looks for, in this order.
_OF_TIMM = ("state_dict_ema", "model_ema", "state_dict", "model")


def find_weights(source: Any) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a ViT by name, without wrappers' parts, wherever they lie in nested dicts.

    Of several state dicts the teacher's is taken, which is the model that a self-distillation is for, and among the
    names that timm uses the one that its loader takes: the averaged weights first. Of several ViTs in one state dict
    the teacher's is taken too.

    Args:
        source: a state dict, or a mapping that holds some, at any depth.

    Returns:
        The weights, and in one sentence what was taken of several, or for want of what would have been.

    Raises:
        ValueError: if there is no state dict, there are several that no convention chooses from, or two names are the
            same without wrappers' parts.
    """
    found = dict(_vits(source, ()))
    if not found and not isinstance(source, Mapping):
        raise ValueError(f"the source must hold a state dict, tensors by name, not a {type(source).__name__}")
    if not found and source and all(isinstance(value, Tensor) for value in source.values()):
        return _unwrapped(source), None  # of no library known, as the conversions say
    if not found and (arrays := list(_vits(source, (), _is_array))):
        where = ".".join(arrays[0][0])
        raise ValueError(
            f"the values{f' under {where}' if where else ''} are ndarrays, not tensors: make these of them with "
            "torch.from_numpy"
        )
    if not found:
        keys = ", ".join(map(repr, list(source)[:8]))
        rest = f"there is none under its keys {keys}" if source else "is empty"
        raise ValueError(f"the source must hold the state dict of a ViT, and {rest}")
    path, others = _choose(sorted(found))
    weights, teacher, students = _teachers(_unwrapped(found[path]))
    others += [(*path, *student) for student in students]
    taken = ".".join((*path, *teacher))
    if others:
        rest = ", ".join(".".join(other) or "the rest" for other in others)
        taken = f"took {taken} of the source, and not {rest}: give load_vit the state dict that you mean"
    elif empty := _without_vit(source, path):
        taken = (
            f"took {taken} of the source, for {empty} holds no ViT known: give load_vit the state dict that you mean"
        )
    else:
        taken = None
    return weights, taken


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_array(value: Any) -> bool:
    return type(value).__name__ == "ndarray"  # NumPy need not be installed


def _vits(
    node: Any,
    path: tuple[str, ...],
    is_weight: Callable[[Any], bool] = _is_tensor,
    above: tuple[int, ...] = (),
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every mapping that has a ViT's patch embedding among its weights, by its path, which leads into none twice."""
    if not isinstance(node, Mapping) or id(node) in above:
        return
    if vit_prefixes(_name(key) for key, value in node.items() if isinstance(key, str) and is_weight(value)):
        yield path, node
    for key, value in node.items():
        yield from _vits(value, (*path, str(key)), is_weight, (*above, id(node)))


def _without_vit(source: Mapping[str, Any], path: tuple[str, ...]) -> str | None:
    """What would have been preferred to a path, had it held a ViT."""
    node = source
    for depth, key in enumerate(path):
        inside = {str(name): value for name, value in node.items()}
        better = (_TEACHER, *_OF_TIMM[: _OF_TIMM.index(key)]) if key in _OF_TIMM else (_TEACHER,)
        for name in better:
            if key != _TEACHER and isinstance(inside.get(name), Mapping) and inside[name]:
                return ".".join((*path[:depth], name))
        node = inside[key]
    return None


def _teachers(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...], list[tuple[str, ...]]]:
    """Of several ViTs in one state dict the teacher's and all that is of none; and the beginnings of names of each."""
    vits = sorted(tuple(prefix.split(".")[:-1]) for prefix in vit_prefixes(weights))
    teachers = [vit for vit in vits if _TEACHER in vit]
    if len(vits) < 2 or len(teachers) != 1:
        return weights, (), []
    own = teachers[0][: teachers[0].index(_TEACHER) + 1]
    students = []
    for vit in vits:
        if vit != teachers[0]:
            same = next((i for i, (a, b) in enumerate(zip(vit, own, strict=False)) if a != b), len(vit))
            students.append(vit[: same + 1])
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if _begins(name, own) or not any(_begins(name, student) for student in students)
    }
    return kept, own, sorted(set(students))


def _begins(name: str, parts: tuple[str, ...]) -> bool:
    return tuple(name.split(".")[: len(parts)]) == parts


def _choose(paths: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One of the paths, and those it was preferred to."""
    chosen = paths
    for depth in range(max(map(len, paths))):
        keys = sorted({path[depth] if depth < len(path) else "" for path in chosen})
        if len(keys) == 1:
            continue
        if _TEACHER in keys:
            key = _TEACHER
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
