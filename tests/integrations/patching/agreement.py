"""What patched modules are held against: the same module unpatched, in fp64 and in its own dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from vitreg_kernels import patch, unpatch
from vitreg_kernels.integrations.attention.attend import Attend
from vitreg_kernels.measure.accuracy import compare, same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Call = Callable[[nn.Module, Tensor], Tensor]


@torch.no_grad()
def scrambled(module: nn.Module) -> nn.Module:
    """Every parameter large enough to matter, and the softmax far from even."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(0.3 * noise + ("ln" in name and name.endswith("weight")))
        else:
            wide = 2.0 if "in_proj" in name else 1.0
            parameter.copy_(wide * noise * parameter[0].numel() ** -0.5)
    return module


@contextmanager
def op_calls() -> Iterator[list[dict]]:
    """What the op is called with from patched modules."""
    seen, call = [], Attend._call

    def watched(self: Attend, *args, **options):
        seen.append(options)
        return call(self, *args, **options)

    with mock.patch.object(Attend, "_call", watched):
        yield seen


def outputs_and_gradients(module: nn.Module, call: Call, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    output = call(module, x)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(gradient.to(output.dtype))
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    # What is added to every key changes no softmax. Its gradient is zero and the rounding of terms that cancel, which
    # are as large as those of the query's: judge both together, as in_proj_bias does anyway.
    for name in [name for name in gradients if name.endswith("ln_k.bias")]:
        gradients[name] = torch.stack((gradients[name], gradients[name.replace("ln_k", "ln_q")]))
    return {"output": output.detach(), "x": x.grad} | gradients


def assert_same_numbers(module: nn.Module, call: Call, x: Tensor, dtype: torch.dtype, *, calls: int = 1) -> None:
    """Patched against unpatched in fp64, by the accuracy rule, with as many calls of the op."""
    module, x = module.to(dtype), x.to(dtype)
    exact = outputs_and_gradients(copy.deepcopy(module).double(), call, x.double())
    eager = outputs_and_gradients(module, call, x)
    ours = copy.deepcopy(module)
    patch(ours)
    with op_calls() as seen:
        actual = outputs_and_gradients(ours, call, x)
    assert len(seen) == calls
    assert actual.keys() == exact.keys()
    for name in exact:
        assert actual[name].dtype == eager[name].dtype, name
        accuracy = compare(actual[name], exact[name], eager[name], terms=x.shape[-1])
        assert accuracy.passed, (name, accuracy)


def assert_own_forward(module: nn.Module, call: Callable[[nn.Module], object]) -> None:
    """A patched module does what it did, bit for bit, and asks nothing of the op."""
    expected = call(module)
    ours = copy.deepcopy(module)
    assert patch(ours).patched
    with op_calls() as seen:
        actual = call(ours)
    assert not seen
    for mine, its in zip(actual, expected, strict=True):
        assert mine is its is None or same_bits(mine, its)


def assert_nothing_else_changes(model: nn.Module, x: Tensor) -> None:
    """``patch`` leaves names, objects, hooks and the random state as they are, and ``unpatch`` gives the model back."""

    def state() -> tuple:
        hooks = [(*part._forward_hooks.values(), *part._forward_pre_hooks.values()) for part in model.modules()]
        return list(model.state_dict()), [*map(id, model.modules())], [*map(id, model.parameters())], hooks

    for part in model.modules():
        part.register_forward_hook(lambda *args: None)
    before, random, own, expected = state(), torch.get_rng_state(), [dict(vars(m)) for m in model.modules()], model(x)
    patch(model)
    assert not same_bits(model(x), expected)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)
    unpatch(model)
    assert [dict(vars(m)) for m in model.modules()] == own
    assert same_bits(model(x), expected)
