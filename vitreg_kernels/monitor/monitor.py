"""Counts the token norms of a model's residual stream, layer by layer, while the model does its work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import functional
from ..integrations.residual_stream import residual_stream, unwrapped
from ..layout import TokenLayout
from ..nn.block import Residual
from ..nn.hooks import Watcher
from ..nn.tracing import traced
from ..ops.token_norms.api import accumulate
from ..ops.token_norms.types import GROUPS, NormDistribution, TokenNormStats
from .recompile import mark, refuse_copy, unmark
from .report import NormReport


class TokenNormMonitor:
    """Statistics of token norms at every layer, for CLS, registers and patches apart, while a model trains.

    Artifacts (Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588) are patches whose norm is an order
    of magnitude above the others'. They show only in the residual stream before the final LayerNorm, which is what this
    counts, on the device, from the moment it is made until ``remove()``, in training and in evaluation:

        monitor = TokenNormMonitor(model)
        history = CsvWriter("norms.csv")
        for step, images in enumerate(loader, 1):
            train(model, images)
            if step % 100 == 0:
                history.write(step, monitor.compute())
                monitor.reset()

    Outputs and gradients stay bitwise what they are. Only ``compute`` waits for the device. A forward that activation
    checkpointing runs again in the backward is not counted again. Under DDP and FSDP2, attached before or after
    wrapping, each rank counts its own tokens. A deep copy or a pickle of the model is not monitored; a shallow copy of
    a monitored module, as ``copy.copy`` and ``DataParallel`` make them, does not run: call ``remove()`` before copying.

    Under ``torch.compile`` the counting is part of the graph, without a break, and blocks compiled one by one still
    share theirs. A graph that was compiled before the monitor was attached is compiled anew, and serves again once it
    is removed.

    The counts of a layer are kept where its norms are: a model may be moved after it is attached, or be built on the
    meta device and get its weights later. Under ``torch.compile`` a move must come before the first call that counts.

    Args:
        model: a ``RegisterViT``, whose norms are at hand and cost nothing, or a ViT of a library that
            ``integrations.residual_stream`` knows, whose layers' outputs are read once more; wrapped or within another
            model.
        layers: names and modules, instead of all of the model's layers. What a module gives is tokens ``[B, N, C]`` of
            the residual stream, a tuple that begins with them, a list of such tensors, their norms ``[B, N]``, or the
            ``Residual`` of a ``RegisterBlock``, which is added up to be measured.
        layout: which tokens are which, instead of the model's; the number of patches may vary.

    Attributes:
        layers: the names. Of a RegisterViT, ``"embedding"`` is what enters its first block, ``"blocks.i"`` what leaves
            block i.
        layout: as given or found.

    Raises:
        TypeError: if ``model`` or a layer is not a module, or ``layout`` is no ``TokenLayout``.
        ValueError: if ``layers`` or ``layout`` is missing and the model is not known, if ``layers`` names none or one
            twice, or if the model has no parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[tuple[str, nn.Module]] | None = None,
        layout: TokenLayout | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module, got a {type(model).__name__}")
        found, self.layout = _found(model, layers, layout)
        device = next((p.device for p in model.parameters()), None)
        if device is None:
            raise ValueError("the model has no parameters, which would say on which device to count")
        if device.type == "meta":  # which holds no counts; the first forward brings them to its device
            device = torch.device("cpu")
        self.layers: tuple[str, ...] = tuple(name for name, _ in found)
        self._taps = [_Tap(self.layout, NormDistribution.zeros((len(GROUPS),), device)) for _ in found]
        self._modules = [module for _, module in found]
        unmarked = {id(module): module for module in self._modules if not _taps_on(module)}
        self._handles = [m.register_forward_hook(tap) for m, tap in zip(self._modules, self._taps, strict=True)]
        for module in unmarked.values():
            mark(module)

    def compute(self, *, all_reduce: bool = False, process_group: dist.ProcessGroup | None = None) -> NormReport:
        """What has been counted since the start or the last reset. Waits for the device and copies to the host.

        Args:
            all_reduce: add up the counts of all ranks, which must all ask, with the same layers; each keeps its own.
            process_group: the ranks; ``None`` for all.

        Raises:
            RuntimeError: if there are no ranks to ask because ``torch.distributed`` was not initialised.
            ValueError: if ``process_group`` is given without ``all_reduce``.
        """
        if process_group is not None and not all_reduce:
            raise ValueError("process_group was given without all_reduce=True, which adds up its ranks")
        counted = self._counted()
        if all_reduce:
            if not dist.is_initialized():
                raise RuntimeError("all_reduce=True needs torch.distributed.init_process_group to have been called")
            counted = _over_ranks(counted, process_group)
        host = NormDistribution(*(x.to("cpu", copy=True) for x in counted))
        return NormReport(self.layers, TokenNormStats.of_stacked(host))

    def reset(self) -> None:
        """Forget what has been counted."""
        self._copy(NormDistribution.zeros((len(self.layers), len(GROUPS)), self._taps[0].into.sums.device)._asdict())

    def state_dict(self) -> dict[str, Any]:
        """The layers' names and a copy of what this rank has counted, for ``torch.save`` and ``weights_only=True``."""
        return {"layers": list(self.layers), **self._counted()._asdict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, whatever device it was saved from.

        Raises:
            ValueError: if it is of other layers or of another form; nothing has changed then.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"the state must be what state_dict() returned, got a {type(state).__name__}")
        missing = {"layers", *NormDistribution._fields} - state.keys()
        if missing:
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}; give what state_dict() returned")
        layers = state["layers"]
        if not isinstance(layers, list | tuple) or not all(isinstance(name, str) for name in layers):
            raise ValueError(f"the state's layers must be a list of names, got {layers!r}")
        if tuple(layers) != self.layers:
            theirs, ours = _some(layers), _some(self.layers)
            raise ValueError(f"the state is of the layers {theirs}, where the monitor's are {ours}")
        for name, x in self._counted()._asdict().items():
            if (got := _described(state[name])) != (wanted := _described(x)):
                raise ValueError(f"the state's {name} must be {wanted}, got {got}")
        self._copy(state)

    def remove(self) -> None:
        """Stop counting and leave the model as it was; what has been counted stays."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            if not _taps_on(module):
                unmark(module)

    def __enter__(self) -> TokenNormMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _counted(self) -> NormDistribution:
        """A copy of all layers' counts, on the device of the first's."""
        device = self._taps[0].into.sums.device
        by_field = zip(*(tap.into for tap in self._taps), strict=True)
        return NormDistribution(*(torch.stack([x.to(device) for x in layers]) for layers in by_field))

    def _copy(self, state: Mapping[str, Tensor]) -> None:
        for name in NormDistribution._fields:
            for tap, layer in zip(self._taps, state[name], strict=True):
                getattr(tap.into, name).copy_(layer)


class _Tap(Watcher):
    """A forward hook that counts a module's output.

    It holds the counts of its layer alone, not the layer's number: a number would make every block a graph of its own
    where blocks are compiled one by one.
    """

    def __init__(self, layout: TokenLayout, into: NormDistribution | None) -> None:
        self.layout = layout
        self.into = into

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.into is None or traced(output):
            return
        if not torch.compiler.is_compiling():
            refuse_copy(module)
        if isinstance(output, Residual):
            output = output.added()
        for x in output if isinstance(output, list) else [output[0] if isinstance(output, tuple) else output]:
            if x.is_meta:  # shapes are tried out; there is nothing to count
                continue
            norms = x if x.ndim == 2 else functional.token_norms(x)
            if norms.device != self.into.sums.device:
                self._move(norms.device, module)
            accumulate(norms, self.layout, self.into, skip_in_backward=True)

    def _move(self, device: torch.device, module: nn.Module) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError("the copies that DataParallel runs cannot be monitored; use DistributedDataParallel")
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"the monitor was attached while the model was on another device than {device}, where it is compiled "
                f"now; attach it after the move, or run the model once without torch.compile first"
            )
        self.into = NormDistribution(*(x.to(device) for x in self.into))

    def __reduce__(self) -> tuple:
        # A copy of the model, a teacher say, would count its tokens among the model's, or carry a state nobody reads.
        return _Tap, (self.layout, None)


def _taps_on(module: nn.Module) -> list[_Tap]:
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, _Tap)]


def _found(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]] | None, layout: TokenLayout | None
) -> tuple[list[tuple[str, nn.Module]], TokenLayout]:
    """The layers to watch, and the order of their tokens."""
    if layers is None or layout is None:
        known = residual_stream(model)
        if known is None:
            raise ValueError(
                f"{type(unwrapped(model)).__name__} is and has no Vision Transformer that is known; give "
                f"layers=[(name, module), ...] and layout=TokenLayout(...)"
            )
        layers = known.layers if layers is None else layers
        layout = known.layout if layout is None else layout
    names = [name for name, _ in layers]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"layers must be at least one, each with a name of its own, got {names}")
    for name, module in layers:
        if not isinstance(module, nn.Module):
            raise TypeError(f"the layer {name} must be a torch module, got a {type(module).__name__}")
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout must be a TokenLayout, not {layout!r}")
    return list(layers), layout


def _over_ranks(counted: NormDistribution, process_group: dist.ProcessGroup | None) -> NormDistribution:
    histogram, sums, nonfinite = (x.clone() for x in (counted.histogram, counted.sums, counted.nonfinite))
    for x in (histogram, sums, nonfinite):
        dist.all_reduce(x, group=process_group)
    # The largest is the smallest of the negatives: one message instead of two.
    sign = counted.extremes.new_tensor([1.0, -1.0])
    extremes = counted.extremes * sign
    dist.all_reduce(extremes, dist.ReduceOp.MIN, group=process_group)
    return NormDistribution(histogram, sums, extremes * sign, nonfinite)


def _described(x: object) -> str:
    """What a field of a state must have in common with the monitor's."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    where = " on the meta device" if x.is_meta else ""
    return f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')}{where}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) < 4 else (*names[:2], "...", names[-1]))
