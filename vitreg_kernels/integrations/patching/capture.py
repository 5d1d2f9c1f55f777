"""Statistics of attention, and its queries, keys and values, taken while it runs on the fused kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ...nn.attention import RegisterAttention
from ...ops.attention.types import OUTPUT_NAMES
from ..attention import ours
from ..attention.attend import OPERANDS, Attend
from ..modules import check_is_module
from ..residual_stream import unwrapped
from .method import fused_method, give_back, replace

NAMES = (*OUTPUT_NAMES, *OPERANDS)


class Latest:
    """What a layer's latest call gave. It knows no name, so that layers compiled one by one share a graph."""

    tensor: Tensor | None = None

    def take(self, tensor: Tensor | None) -> None:
        """Keep a tensor in the place of the one before; None when a call begins."""
        self.tensor = tensor


class Captured(Mapping[str, Tensor]):
    """One statistic or operand of every layer captured, by the layer's name in the model, of its latest call.

    It is detached from the graph, on the device of the call. Statistics are fp32 (fp64 of fp64 inputs).

    Attributes:
        layers: the names of all that are captured, called or not.
    """

    def __init__(self, latest: Mapping[str, Latest]) -> None:
        self.layers: tuple[str, ...] = tuple(latest)
        self._latest = latest

    def __getitem__(self, layer: str) -> Tensor:
        tensor = self._latest[layer].tensor
        if tensor is None:
            raise KeyError(f"{layer} has not run on this library's kernels since it is captured")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (layer for layer, latest in self._latest.items() if latest.tensor is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Let go of the tensors."""
        for latest in self._latest.values():
            latest.take(None)


@contextmanager
def capture(model: nn.Module, output: str, *, layers: Sequence[int | str] | None = None) -> Iterator[Captured]:
    """Take something of a model's attention whenever it is called within a ``with``, without leaving the kernels.

        with capture(model, "prefix_attention", layers=[-1]) as maps:
            model(images)
        maps["blocks.11.attn"]  # [B, H, P, N]: what the CLS and register tokens attend to

    In training and evaluation, under no_grad, autocast, torch.compile and activation checkpointing, whose second run of
    a layer gives the same again. Keep it open over the backward of a checkpointed model: both runs must be alike. Only
    the latest call of a layer is kept, in memory of its own size. Two statistics are two such ``with``.

    Args:
        model: a ``RegisterViT``, or any model that was given to ``patch``, compiled or wrapped or not.
        output: ``"prefix_attention"`` ``[B, H, P, N]``, ``"received_attention"`` ``[B, H, N]``, ``"token_norms"``
            ``[B, N]``, ``"lse"`` ``[B, H, N]`` or ``"max_logit"`` ``[B, H]``, as in ``AttentionOutputs``; or what goes
            into the op, ``"query"``, ``"key"`` or ``"value"`` ``[B, H, N, D]`` in its own dtype, a copy. Query and key
            are those before a rotation that the kernels do, as ``RegisterViT``'s and timm's; a model that rotates them
            itself before it calls the op, as transformers' do, shows them rotated.
        layers: which of the attention layers, by name, or counted from the first or, negative, from the last; ``None``
            for all.

    Raises:
        TypeError: if there is no module, or ``layers`` is no sequence.
        ValueError: if there is no such output, or no attention that can be captured; or if the prefix is asked for
            and the model has none, or it is not known how long it is.
        KeyError, IndexError: if there is no such layer.
    """
    check_is_module(model)
    if isinstance(layers, str) or not isinstance(layers, Sequence | None):
        raise TypeError(f"layers must be a sequence of names and numbers such as [-1], not {layers!r}")
    if output not in NAMES:
        raise ValueError(f"unknown output {output!r}: expected one of {', '.join(map(repr, NAMES))}")
    found = attention_layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention of this library's to capture: call patch(model)")
    modules = found if layers is None else dict(_layer(found, layer) for layer in layers)
    if output == "prefix_attention":
        for name, module in modules.items():
            _check_prefix(name, _attend_of(module).num_prefix_tokens)
    latest = {name: Latest() for name in modules}
    attends = {name: _attend_while_captured(module) for name, module in modules.items()}
    for name, attend in attends.items():
        attend.takers.append((output, latest[name].take))
    try:
        yield Captured(latest)
    finally:
        for name, attend in attends.items():
            attend.takers.remove((output, latest[name].take))
            if isinstance(modules[name], RegisterAttention) and not attend.takers:
                give_back(modules[name])


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What can be captured of a model as it is: the attention modules that run on this library's kernels, by name."""
    return {name: module for name, module in unwrapped(model).named_modules() if _attend_of(module) is not None}


def _layer(found: dict[str, nn.Module], layer: int | str) -> tuple[str, nn.Module]:
    if isinstance(layer, str):
        if layer not in found:
            raise KeyError(f"there is no attention layer {layer!r}: the model has {', '.join(found)}")
        return layer, found[layer]
    if not -len(found) <= layer < len(found):
        raise IndexError(f"there is no attention layer {layer}: the model has {len(found)}")
    return list(found.items())[layer]


def _attend_of(module: nn.Module) -> Attend | None:
    """The way into the op of a module that can be captured; None of any other."""
    method = fused_method(module)
    if method is not None:
        return method.op if isinstance(method.op, Attend) else None
    return Attend(module.layout.num_prefix_tokens) if isinstance(module, RegisterAttention) else None


def _attend_while_captured(module: nn.Module) -> Attend:
    if fused_method(module) is None:
        replace(module, "_attend", ours.attention, _attend_of(module))
    return fused_method(module).op


def _check_prefix(name: str, num_prefix_tokens: int | None) -> None:
    if num_prefix_tokens is None:
        raise ValueError(f"it is not known how many prefix tokens {name} has: give patch(model, num_prefix_tokens=...)")
    if num_prefix_tokens == 0:
        raise ValueError(f"{name} has no prefix token, so there is no prefix_attention to capture")
