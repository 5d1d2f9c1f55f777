"""What a patched module is held against: itself, unpatched, in fp64 and in its own dtype; and what it was before.

A module is brought to numbers that let no mistake hide by ``scrambled``. ``assert_same_numbers`` then holds its output
and gradients to the accuracy rule, and ``assert_nothing_else_changes`` everything else that a user may hold of it.
``op_calls`` tells whether any of it went through this library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from vitreg_kernels import dispatch, functional, patch, patched, unpatch
from vitreg_kernels.measure.accuracy import compare, same_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of gradients of a few numbers, as of a factor a head, the largest error of a few draws is mostly luck: what fails by
# these is judged again by many more, of this library's and of the formula's errors alike.
DRAWS, MORE_DRAWS = 4, 20

Crops = Tensor | list[Tensor]
Call = Callable[..., Any]

_OPS = ("register_attention", "register_attention_qkv", "residual_layer_norm")
# What is added to every key changes no softmax. The gradient of such a bias is exactly zero, and the rounding that is
# left of it is as large as the query's. A packed projection has both in one tensor; of others they are judged together.
_KEY_AND_QUERY = (("k_proj", "q_proj"), ("k_norm", "q_norm"), ("ln_k", "ln_q"), ("key", "query"))


@torch.no_grad()
def scrambled(module: nn.Module) -> nn.Module:
    """Every parameter large enough to matter, and the softmax far from even; other numbers at every call."""
    for name, parameter in module.named_parameters():
        path, _, own = name.rpartition(".")
        if parameter.ndim > 1:
            sharp = any(part in name for part in ("qkv", "q_proj", "k_proj", "in_proj", "query", "key"))
            width = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
            parameter.normal_(std=(2.0 if sharp else 1.0) * width**-0.5)
        else:
            is_norm = own == "weight" and "Norm" in type(module.get_submodule(path)).__name__
            parameter.normal_(1.0 if is_norm else 0.0, 0.3)
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


def called(module: nn.Module, x: Crops, **inputs: Any) -> Any:
    """The plainest way to call a module, which ``assert_same_numbers`` takes if it is told no other."""
    return module(x, **inputs)


def in_autocast(call: Call) -> Call:
    """The same call under autocast to bf16, but for that in fp64, which is to be exact."""

    def cast(module: nn.Module, x: Tensor, **inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            return call(module, x, **inputs)

    return cast


def results(
    module: nn.Module, x: Crops, inputs: dict[str, Any] | None = None, *, call: Call = called, seed: int = 0
) -> dict[str, Tensor]:
    """Every output, and the gradients of x and of every parameter that has one.

    Args:
        module: what is called.
        x: one tensor or a list of them.
        inputs: what ``call`` takes beside it.
        call: takes the module, x and ``inputs``; gives a tensor, a list of them, or a tuple that begins with one.
        seed: of what the module draws, and of the gradient of its output.
    """
    leaves = [part.detach().clone().requires_grad_() for part in (x if isinstance(x, list) else [x])]
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = call(module, leaves if isinstance(x, list) else leaves[0], **(inputs or {}))
    if not isinstance(outputs, list):
        outputs = [outputs[0] if isinstance(outputs, tuple) else outputs]
    generator = torch.Generator().manual_seed(seed)
    torch.autograd.backward(
        outputs, [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    )
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    found |= {f"gradient of x {i}": leaf.grad for i, leaf in enumerate(leaves)}
    found |= {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    for key, query in _KEY_AND_QUERY:
        for name in [name for name in found if name.endswith(f"{key}.bias")]:
            of_query = name.replace(key, query)
            found[of_query] = torch.cat((found[of_query], found.pop(name)))
    return found


def assert_same_numbers(
    module: nn.Module,
    x: Crops,
    inputs: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    call: Call = called,
    calls: int = 1,
    by_its_own: bool = False,
    **options: Any,
) -> list[OpCall]:
    """Patched against unpatched in fp64, by the accuracy rule, over several draws.

    Args:
        module: what is patched; it is brought to ``dtype``.
        x: of the shapes that every draw has.
        inputs: as for ``results``; they keep their dtypes, but for the exact result.
        dtype: of the module and of x.
        call: as for ``results``.
        calls: how often one call of the module is to go through the op.
        by_its_own: whether the errors allowed are measured by the module's own fused attention, not by the formula: of
            calls that torch's kernel serves here as there, which on CPUs without AVX-512 is coarser than the formula.
        options: of ``patch``.

    Returns:
        What the op was called with in the last draw.
    """
    module.to(dtype)
    in_fp64, exact_inputs = copy.deepcopy(module).double(), converted(inputs, torch.float64)
    draws = []
    shapes = [part.shape for part in x] if isinstance(x, list) else x.shape

    def drawn_anew() -> Crops:
        return [torch.randn(s) for s in shapes] if isinstance(x, list) else torch.randn(shapes)

    def failing() -> list[str]:
        found = []
        for name in draws[0][0]:
            actual, exact, eager = (torch.stack([each[name] for each in of]) for of in zip(*draws, strict=True))
            accuracy = compare(actual, exact, eager, terms=x[0].shape[-1])
            if not accuracy.passed:
                found.append(f"{name}: {accuracy}")
        return found

    many = [drawn_anew() for _ in range(DRAWS)]
    for seed in range(DRAWS + MORE_DRAWS):
        if seed == DRAWS and not failing():
            break
        drawn = converted(many[seed] if seed < DRAWS else drawn_anew(), dtype)
        how = {"call": call, "seed": seed}
        with formula(in_fp64):
            exact = results(in_fp64, converted(drawn, torch.float64), exact_inputs, **how)
        with nullcontext() if by_its_own else formula(module):
            eager = results(module, drawn, inputs, **how)
        with patched(module, **options), op_calls() as seen:
            actual = results(module, drawn, inputs, **how)
        assert len(seen) == calls
        assert actual.keys() == exact.keys() == eager.keys()
        draws.append((actual, exact, eager))
    assert not failing()
    return seen


def assert_close(actual: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    """The same tensors by name but for rounding, where nothing needs to be held to fp64."""
    assert actual.keys() == expected.keys()
    for name, its in expected.items():
        tolerance = 1e-4 * its.abs().max().item() + 1e-6
        torch.testing.assert_close(actual[name], its, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def formula(module: nn.Module) -> Iterator[None]:
    """Attention by the eager formula, where a module would have torch's fused one: timm's, and transformers'."""
    fused = [part for part in module.modules() if getattr(part, "fused_attn", False)]
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    names = {each: config._attn_implementation for each, config in configs.items()}
    for part in fused:
        part.fused_attn = False
    for config in configs.values():
        config._attn_implementation = "eager"
    yield
    for part in fused:
        part.fused_attn = True
    for each, config in configs.items():
        config._attn_implementation = names[each]


class OpCall(NamedTuple):
    """One call of this library.

    Attributes:
        op: the name of the function in ``functional``.
        tensors: its arguments given by place.
        options: those given by name.
        backend: the name of the backend that served it.
    """

    op: str
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]
    backend: str


@contextmanager
def op_calls() -> Iterator[list[OpCall]]:
    """What the op is called with, in the order in which the calls end."""
    seen: list[OpCall] = []
    chosen: list[str] = []
    select = dispatch.select

    def spied_select(*args: Any) -> dispatch.Backend:
        backend = select(*args)
        chosen.append(backend.name)
        return backend

    def spied(op: Call) -> Call:
        def call(*tensors: Tensor, **options: Any) -> Any:
            result = op(*tensors, **options)
            seen.append(OpCall(op.__name__, tensors, options, chosen[-1]))
            return result

        return call

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "select", spied_select))
        for name in _OPS:
            stack.enter_context(mock.patch.object(functional, name, spied(getattr(functional, name))))
        yield seen


def state(model: nn.Module) -> list[Any]:
    """All that a user may hold: objects, names, hooks, modes, configurations, random numbers; not how it computes."""
    parts = list(model.named_modules())
    configs = [part.config for _, part in parts if hasattr(getattr(part, "config", None), "to_json_string")]
    return [
        [(name, id(part), type(part), part.training) for name, part in parts],
        [{name: dict(value) for name, value in vars(part).items() if name.endswith("hooks")} for _, part in parts],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        [(name, id(b), b._version) for name, b in model.named_buffers()],
        list(model.state_dict()),
        [(id(config), config.to_json_string(), config._attn_implementation) for config in configs],
        torch.get_rng_state().tolist(),
    ]


def instances(model: nn.Module) -> list[dict[str, Any]]:
    """What every module has of its own, how it computes included; the same after ``unpatch`` as before ``patch``."""
    return [dict(vars(part)) for part in model.modules()]


def assert_nothing_else_changes(module: nn.Module, call: Callable[[nn.Module], Tensor], **options: Any) -> None:
    """``patch`` leaves names, objects, hooks and the random state as they are, and ``unpatch`` gives the module back.

    Args:
        module: a module that nobody has patched; hooks are put on it.
        call: seeds if anything is drawn, and calls it.
        options: of ``patch``.
    """
    seen: list[str] = []
    for part in module.modules():
        part.register_forward_hook(lambda part, *_: seen.append(type(part).__name__))
    expected, order = call(module), seen.copy()
    own, before, random = instances(module), state(module), torch.get_rng_state()
    assert patch(module, **options).patched
    assert state(module) == before
    seen.clear()
    fused = call(module)
    assert seen == order
    assert torch.equal(torch.get_rng_state(), random)  # it draws as much as it did, if anything
    assert not same_bits(fused, expected)  # by other kernels
    unpatch(module)
    assert state(module) == before
    assert instances(module) == own
    assert same_bits(call(module), expected)


def assert_own_forward(module: nn.Module, call: Callable[[nn.Module], Any]) -> None:
    """A patched module does what it did, bit for bit, and asks nothing of the op."""
    expected = call(module)
    ours = copy.deepcopy(module)
    assert patch(ours).patched
    with op_calls() as seen:
        actual = call(ours)
    assert not seen
    for mine, its in zip(actual, expected, strict=True):
        assert mine is its is None or same_bits(mine, its)
