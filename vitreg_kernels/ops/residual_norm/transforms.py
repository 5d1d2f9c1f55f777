"""The op's rules for function transforms: its formula, its gradient's, and many calls as one.

A mapped dimension joins the batch. Where each call has parameters, or gradients of parameters, of its own, as in
ensembles and per-sample gradients, no kernel call can do that, and the formula is mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._shared.arguments import without_autocast
from .._shared.transforms import Dims, Mapped, Rules, joined, parted
from . import reference, schema
from .types import DROP_PATH_IS_CONSTANT, NormGradInputs, NormInputs


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *call, _backend = arguments
    inputs = NormInputs(*call)
    with without_autocast(inputs.x):  # fp32 is meant where the specification says it
        residual, normalized, token_norms = reference.residual_layer_norm(inputs)
    nothing = schema.without_elements(inputs.x)
    wide = _wide(residual.detach())
    mean = None if inputs.rms else wide.mean(-1)
    centred = wide if mean is None else wide - mean[..., None]
    rstd = (centred.square().mean(-1) + inputs.eps).rsqrt()
    return (
        nothing if inputs.branch is None else residual,
        normalized,
        token_norms,
        nothing if mean is None else mean,
        rstd,
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradient of LayerNorm or RMSNorm as a function of the residual, and of what is added to make it."""
    *tensors, bias, branch_dtype, wanted, _backend = arguments
    inputs = NormGradInputs(*tensors)
    rms = inputs.mean is None
    wide = _wide(inputs.residual)
    centred = wide if rms else wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    # The kernel's own rstd, which knows eps, with the derivative that it has by way of the variance.
    rstd = (variance + (inputs.rstd.pow(-2) - variance).detach()).rsqrt()[..., None]
    normal = centred * rstd

    total = torch.zeros_like(wide) if inputs.grad_residual is None else _wide(inputs.grad_residual)
    upstream = None if inputs.grad_normalized is None else _wide(inputs.grad_normalized)
    if upstream is not None:
        scaled = upstream * inputs.weight
        along = normal * (scaled * normal).mean(-1, keepdim=True)
        total = total + rstd * (scaled - along if rms else scaled - scaled.mean(-1, keepdim=True) - along)
    kept = total if inputs.drop_path is None else total * inputs.drop_path[:, None, None]

    nothing = schema.without_elements(inputs.residual)
    found = dict.fromkeys(("x", "branch", "layer_scale", "weight", "bias"), nothing)
    for name in wanted.split():
        if name == "x":
            found[name] = total.to(inputs.residual.dtype)
        elif name == "branch":
            found[name] = (kept if inputs.layer_scale is None else kept * inputs.layer_scale).to(branch_dtype)
        elif name == "layer_scale":
            found[name] = (kept * inputs.branch).sum((0, 1)).to(inputs.layer_scale.dtype)
        elif name == "weight":
            found[name] = (upstream * normal).sum((0, 1)).to(inputs.weight.dtype)
        else:
            found[name] = upstream.sum((0, 1)).to(bias.dtype)
    return tuple(found.values())


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _folding(
    of_batch: tuple[int, ...], parameters: tuple[int, ...], wanted: int | None
) -> Callable[..., Mapped | None]:
    """How calls become one.

    Args:
        of_batch: places of the arguments that have a batch, which the mapped dimension joins.
        parameters: places of those that have none.
        wanted: place of the names of the gradients that are wanted; ``None`` in the forward.
    """

    def fold(size: int, in_dims: Dims, arguments: tuple, kernel: Callable[..., tuple[Tensor, ...]]) -> Mapped | None:
        of_parameters = set() if wanted is None else {"layer_scale", "weight", "bias"} & set(arguments[wanted].split())
        if of_parameters or any(in_dims[place] is not None for place in parameters):
            return None
        folded = list(arguments)
        for place in of_batch:
            folded[place] = joined(arguments[place], in_dims[place], size)
        outputs = tuple(parted(x, size) for x in kernel(*folded))
        return outputs, (0,) * len(outputs)

    return fold


def _places(names: tuple[str, ...], of: type) -> tuple[int, ...]:
    return tuple(of._fields.index(name) for name in names)


_BIAS = len(NormGradInputs._fields)  # of the backward; the gradients' names come two places later
_STATISTICS = ("residual", "mean", "rstd")

FORWARD = Rules(
    _forward,
    _folding(
        _places(("x", "branch", "drop_path"), NormInputs), _places(("layer_scale", "weight", "bias"), NormInputs), None
    ),
    derivable=_places(("x", "branch", "layer_scale", "weight", "bias"), NormInputs),
    constant=DROP_PATH_IS_CONSTANT,
)
BACKWARD = Rules(
    _backward,
    _folding(
        _places(("grad_residual", "grad_normalized", *_STATISTICS, "branch", "drop_path"), NormGradInputs),
        (*_places(("layer_scale", "weight"), NormGradInputs), _BIAS),
        _BIAS + 2,
    ),
    derivable=_places(
        ("grad_residual", "grad_normalized", "residual", "branch", "layer_scale", "weight"), NormGradInputs
    ),
)
