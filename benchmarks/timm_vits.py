"""timm's ViTs with random weights, and the same with a RegisterAttention in every block that holds the same weights.

The weights cost what trained ones do. They are set so that attention matters (queries and keys of normal size,
LayerScale of 1, not the 1e-5 it starts training with), or its errors would not be seen in the features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import torchvision_beside_torch
from vitreg_kernels import RegisterAttention, UnsupportedError, explain


class Model(NamedTuple):
    """A model of timm's.

    Attributes:
        name: timm's.
        batch: images a call; on a GPU as many as fill one of 40 GB or more.
        options: for ``timm.create_model``.
    """

    name: str
    batch: int
    options: dict[str, Any]


def import_timm() -> ModuleType:
    """timm, also where torchvision, which it needs, was built against another torch.

    Raises:
        ModuleNotFoundError: without timm or torchvision.
    """
    torchvision_beside_torch.declare()
    import timm

    return timm


def build(model: Model, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with random weights; raises whatever stands in the way of timm."""
    timm = import_timm()
    torch.manual_seed(0)
    with device:
        module = timm.create_model(model.name, pretrained=False, **model.options)
    return sharpened(module).to(device, dtype)


@torch.no_grad()
def sharpened(module: nn.Module) -> nn.Module:
    """A ViT of timm's or transformers' with its attention brought to matter: see above."""
    for name, parameter in module.named_parameters():
        if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
            parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        elif name.endswith(("gamma", "gamma_1", "gamma_2", "lambda1")):
            parameter.fill_(1.0)
    return module


def with_attention(module: nn.Module, place: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A model of its own around the very same parameters, with ``place(attention)`` in each block."""
    tree = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for block in tree.blocks:
        block.attn = place(block.attn)
    return tree


def register_attention(module: nn.Module, backend: str | None, own: nn.Module) -> RegisterAttention:
    """A RegisterAttention that holds the two projections of timm's, and so the same parameters.

    Raises:
        UnsupportedError: if the backend cannot serve it; torch.compile would wrap the reason up in its own words.
    """
    reasons = explain(own.qkv.weight.new_empty(1, own.num_heads, 1, own.head_dim), backend=backend).reasons
    if backend in reasons:
        raise UnsupportedError("; ".join(reasons[backend]))
    dim, registers = own.qkv.in_features, module.num_reg_tokens
    swapped = RegisterAttention(dim, own.num_heads, num_registers=registers, backend=backend, device="meta")
    swapped.qkv, swapped.proj = own.qkv, own.proj
    return swapped


def formula(attention: nn.Module) -> nn.Module:
    """timm's attention set to compute by the formula, not by SDPA."""
    attention.fused_attn = False
    return attention


def first_and_last(batch: Tensor) -> Tensor:
    """The first and the last image, which may be one."""
    return batch[:: max(len(batch) - 1, 1)]
