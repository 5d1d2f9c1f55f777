"""Modules of other libraries, told by the names of their classes and found by their own."""

from __future__ import annotations

from torch import nn


def derives_from(model: nn.Module, package: str | None, *names: str) -> bool:
    """Whether a model's class, or one it derives from, has one of the names, and is of the package if one is given.

    Told by names, because importing the library to ask would load it.
    """
    return any(
        cls.__name__ in names and package in (None, cls.__module__.partition(".")[0]) for cls in type(model).__mro__
    )


def named(path: str, modules: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a list of modules, under their full names."""
    return [(f"{path}.{name}", module) for name, module in modules.named_children()]


def first_of(module: nn.Module, *paths: str) -> nn.Module | None:
    """The first module that is there of several paths, which versions and variants of a class name differently."""
    modules = dict(module.named_modules())
    return next((modules[path] for path in paths if path in modules), None)


def check_is_module(model: object) -> None:
    """Raises: TypeError: if it is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
