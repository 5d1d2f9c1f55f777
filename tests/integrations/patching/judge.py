"""What a patched module is held against: itself, unpatched and in fp64, and what it was before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitreg_kernels import patch, patched, unpatch
from vitreg_kernels.measure.accuracy import compare, same_bits

SEED = 5  # of the parts of a batch that a block drops

Crops = Tensor | list[Tensor]


def scrambled(module: nn.Module) -> nn.Module:
    """Every parameter large enough to matter, and the softmax far from even."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=(2.0 if "qkv" in name else 1.0) * parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return module


def converted(inputs: Any, dtype: torch.dtype) -> Any:
    """Its floating tensors in a dtype, however deep they lie."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {name: converted(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(converted(value, dtype) for value in inputs)
    return inputs


def results(module: nn.Module, x: Crops, inputs: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """The output for a tensor or a list of them, and the gradients of these and of every parameter."""
    crops = [crop.detach().clone().requires_grad_() for crop in (x if isinstance(x, list) else [x])]
    module.zero_grad()
    torch.manual_seed(SEED)
    outputs = module(crops if isinstance(x, list) else crops[0], **(inputs or {}))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    generator = torch.Generator().manual_seed(SEED)
    gradients = [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    torch.autograd.backward(outputs, gradients)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    found |= {f"gradient of crop {i}": crop.grad for i, crop in enumerate(crops)}
    return found | {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def assert_same_numbers(
    module: nn.Module, x: Crops, inputs: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Patched against unpatched in fp64, by the accuracy rule; ``inputs`` keep their dtypes but for fp64.

    The gradient of what is added to every key is exactly zero: it is judged in one tensor with the query's.
    """
    module, x = module.to(dtype), converted(x, dtype)
    exact = results(copy.deepcopy(module).double(), converted(x, torch.float64), converted(inputs, torch.float64))
    eager = results(module, x, inputs)
    with patched(module, strict=True):
        actual = results(module, x, inputs)
    assert actual.keys() == exact.keys()
    for name in exact:
        accuracy = compare(actual[name], exact[name], eager[name], terms=x[0].shape[-1])
        assert accuracy.passed, (name, accuracy)


def assert_nothing_else_changes(module: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    """``patch`` leaves names, objects, hooks and the random state as they are, and ``unpatch`` gives the module back.

    Args:
        module: a module that nobody has patched; hooks are put on it.
        call: seeds, and calls it.
    """

    def state() -> tuple:
        hooks = [list(part._forward_hooks.values()) for part in module.modules()]
        return list(module.state_dict()), [*map(id, module.modules())], [*map(id, module.parameters())], hooks

    seen = []
    for part in module.modules():
        part.register_forward_hook(lambda part, *_: seen.append(type(part).__name__))
    attributes = [dict(vars(part)) for part in module.modules()]
    before, expected, order, random = state(), call(module), seen.copy(), torch.get_rng_state()
    assert patch(module).patched
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)
    seen.clear()
    fused = call(module)
    assert seen == order
    assert torch.equal(torch.get_rng_state(), random)  # which the call seeds
    assert not same_bits(fused, expected)  # by other kernels
    unpatch(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert same_bits(call(module), expected)
    assert all(vars(part).keys() == own.keys() for part, own in zip(module.modules(), attributes, strict=True))
