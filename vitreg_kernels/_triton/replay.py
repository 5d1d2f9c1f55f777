"""Run the launches of a call; when a call like it comes again, replace only the tensors.

Python takes tens of microseconds to describe a launch, and triton as long again to find the compiled kernel for it. Of
tensors, both depend on shape, strides, dtype, device and alignment only, so they are done once for all calls that agree
in these and in every other argument. Triton's own settings (``triton.knobs``) are read when a call is described: what
changes later has no effect on calls that are known, but launch hooks are always called.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import mode
from .launch import Launch, tensors_in

_MOST_CALLS = 1024  # known at a time
_ALIGNMENT = 16  # bytes; triton compiles a kernel of its own for pointers that are a multiple of it


_Replay: TypeAlias = Callable[[list[Tensor]], None]
"""Launches a compiled kernel on the tensors of a call."""

_known: dict[Hashable, list[_Replay]] = {}
_recorder: Callable[[Launch], None] | None = None


def run_launches(describe: Callable[..., list[Launch]], *call: Any, depends_on: Hashable = None) -> None:
    """Run ``describe(*call)`` in order, on the device of the call's tensors.

    Args:
        describe: a module's function. What it describes may depend on all of ``call`` but the contents of tensors.
        call: tensors, hashable values, and tuples of these; all tensors are on one device. ``describe`` should put
            these very tensors into its launches: if it makes others, the call is described anew each time.
        depends_on: what else the launches depend on, such as a global setting.
    """
    tensors: list[Tensor] = []
    key: list[Hashable] = [describe, depends_on]
    _collect(call, tensors, key)
    key.append(tensors[0].device)
    key = tuple(key)
    with torch.cuda.device_of(tensors[0]):  # triton launches on the current device
        if _recorder is not None or mode.INTERPRETING:
            for launch in describe(*call):
                (_recorder or Launch.run)(launch)
        elif (replays := _known.get(key)) is not None:
            for replay in replays:
                replay(tensors)
        else:
            _run_and_remember(key, describe, call, tensors)


@contextmanager
def recording(*, run: bool) -> Iterator[list[Launch]]:
    """The launches made meanwhile, by any thread and each described anew; they are run, or else left out.

    A launch on a grid with no programs is not among them.
    """
    global _recorder
    launches: list[Launch] = []

    def record(launch: Launch) -> None:
        if run:
            launch.run()
        if 0 not in launch.grid:
            launches.append(launch)

    before, _recorder = _recorder, record
    try:
        yield launches
    finally:
        _recorder = before


def _collect(values: tuple[Any, ...], tensors: list[Tensor], key: list[Hashable]) -> None:
    """Append the tensors among values, and all of the values that launches may depend on."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            key += value.shape, value.stride(), value.dtype, value.data_ptr() % _ALIGNMENT == 0
        elif isinstance(value, tuple):
            key += type(value), len(value)
            _collect(value, tensors, key)
        else:
            key.append(value)


def _run_and_remember(key: Hashable, describe: Callable[..., list[Launch]], call: Any, tensors: list[Tensor]) -> None:
    # Where a tensor is given twice, its aliases tell which of the two an argument is.
    aliases = [tensor.detach() for tensor in tensors]
    places = {id(alias): i for i, alias in enumerate(aliases)}
    replays = []
    for launch in describe(*_with_tensors(call, iter(aliases))):
        compiled = launch.run()
        if 0 not in launch.grid:
            replays.append(_replay_of(launch, compiled, places))
    if None in replays:
        return
    if len(_known) >= _MOST_CALLS:
        _known.clear()
    _known[key] = replays


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with its tensors replaced, in order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        members = [_with_tensors(member, tensors) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    return value


def _replay_of(launch: Launch, compiled: Any, places: dict[int, int]) -> _Replay | None:
    """Runs a launch on other tensors; ``None`` if it has tensors that are not the call's, whose places are given."""
    from triton import knobs
    from triton.runtime import driver

    constants: list[Any] = []

    def place(value: Any) -> int:
        if id(value) in places:
            return places[id(value)]
        constants.append(value)
        return len(places) + len(constants) - 1

    arguments = []
    for name in launch.kernel.arg_names:
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        # Taken one by one, members make a tuple again only if there are two or more.
        by_member = isinstance(value, tuple) and len(value) > 1
        arguments.append(itemgetter(*map(place, value if by_member else (value,))))
    if compiled is None or any(True for _ in tensors_in(constants)):
        return None
    grid = (*launch.grid, 1, 1)[:3]

    def replay(tensors: list[Tensor]) -> None:
        pool = (*tensors, *constants)
        given = [argument(pool) for argument in arguments]
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if any(getattr(hook, "calls", hook) for hook in hooks):  # a chain of calls, or one
            compiled[grid](*given)
        else:
            # The same without describing the launch to hooks, which takes triton as long as all the rest.
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given)

    return replay
