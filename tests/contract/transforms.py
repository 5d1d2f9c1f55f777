"""Function transforms of every op by every backend, each tried on a small call and checked: right, or one sentence.

transforms_table.py writes what ``outcome`` gives into docs/function_transforms.md; test_transforms.py holds each cell
of that page against a new trial.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functionalize, grad, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from contract.op import Call, Op, Tensors
from vitreg_kernels._triton.mode import INTERPRETING

SIZE = 3  # calls that are mapped


class Trial(NamedTuple):
    """One transform.

    Attributes:
        name: as the table says it.
        run: tries it with an op, a backend's name and the folder that files go to; fails where a result is wrong.
        derivative: whether only an op with a derivative has it.
        interpreted: whether it is tried where Triton's interpreter runs, which tracers would look into.
    """

    name: str
    run: Callable[[Op, str, Path], None]
    derivative: bool = False
    interpreted: bool = True


def is_tried(trial: Trial, op: Op) -> bool:
    """Whether an op has what is transformed, in this process. Tracers see the packed op as they see the other."""
    traced = not trial.interpreted
    return (bool(op.OUTPUTS) or not trial.derivative) and not (traced and (INTERPRETING or "Packed" in str(op)))


def outcome(trial: Trial, op: Op, backend: str, folder: Path) -> str:
    """``"works"``, or the sentence that a user gets."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.run(op, backend, folder)
    except AssertionError:
        raise
    except Exception as error:
        return _sentence(error)
    return "works"


def _sentence(error: BaseException) -> str:
    """This library's own words, wherever torch wraps them; else the first sentence of torch's."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    ours = [e for e in chain if "vitreg_kernels" in _raised_in(e)]
    words = str(ours[0] if ours else chain[-1]).strip() or type(error).__name__
    line = re.sub(r"\s+", " ", words.splitlines()[0])
    return line if ours else line.partition(". ")[0]


def _raised_in(error: BaseException) -> str:
    frame, path = error.__traceback__, ""
    while frame is not None:
        path, frame = frame.tb_frame.f_code.co_filename, frame.tb_next
    return path


def calls(op: Op) -> list[Call]:
    """Calls of the fullest kind, alike but for their numbers."""
    return calls_of(op, op.KINDS[0])


def calls_of(op: Op, spec: Any) -> list[Call]:
    """Calls alike but for their numbers; small ones where the interpreter, which is slow, runs them."""
    if INTERPRETING and not getattr(spec, "lengths", ()):
        spec = op.resized(spec, 1, 9)
    return [op.make_call(spec._replace(seed=spec.seed + 10 * i)) for i in range(SIZE)]


def stacked(op: Op, made: list[Call]) -> Tensors:
    """The inputs of several calls side by side."""
    return {name: torch.stack([call[name] for call in made]) for name in op.INPUTS if name in made[0]}


def of_inputs(op: Op, backend: str, call: Call) -> Callable[[Tensors], Tensors]:
    """The outputs as a function of the inputs, the rest as in a call."""
    return lambda inputs: op.outputs(backend, {**call, **inputs})


def loss_of(op: Op, backend: str, call: Call) -> Callable[[Tensors], Tensor]:
    outputs = of_inputs(op, backend, call)

    def loss(inputs: Tensors) -> Tensor:
        found = outputs(inputs)
        return sum(found[name].sin().sum() for name in op.OUTPUTS)

    return loss


def inputs_of(op: Op, call: Call) -> Tensors:
    return {name: call[name] for name in op.INPUTS if name in call}


def one_by_one(function: Callable[[Tensors], Any], batch: Tensors) -> Any:
    each = [function({name: x[i] for name, x in batch.items()}) for i in range(SIZE)]
    return tree_map(lambda *results: torch.stack(results), *each)


def close(actual: Any, expected: Any) -> None:
    """To within the roundings of another order of summation: relative to the largest, as errors of sums are."""
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        for name, x in expected.items():
            close(actual[name], x)
        return
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype or expected.dtype == torch.float64
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
        return
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    torch.testing.assert_close(
        actual.to(expected.dtype), expected, rtol=1e-4, atol=2e-5 * max(scale, 1.0), equal_nan=True
    )


def exact(call: Call) -> Call:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, call)


# torch.func and forward mode


def _vmap(op: Op, backend: str, _: Path) -> None:
    made = calls(op)
    function, batch = of_inputs(op, backend, made[0]), stacked(op, made)
    close(vmap(function)(batch), one_by_one(function, batch))


def _grad(op: Op, backend: str, _: Path) -> None:
    call = calls(op)[0]
    inputs = inputs_of(op, call)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    expected = torch.autograd.grad(loss_of(op, backend, call)(leaves), list(leaves.values()))
    close(grad(loss_of(op, backend, call))(inputs), dict(zip(leaves, expected, strict=True)))


def _per_sample(op: Op, backend: str, _: Path) -> None:
    """Gradients of everything for each sample, the parameters being the same for all."""
    made = calls(op)
    gradient, batch = grad(loss_of(op, backend, made[0])), stacked(op, made)
    shared = {name: x[0].expand_as(x) for name, x in batch.items() if name not in op.TOKENS}
    dims = {name: 0 if name in op.TOKENS else None for name in batch}
    given = {name: x if name in op.TOKENS else x[0] for name, x in batch.items()}
    close(vmap(gradient, (dims,))(given), one_by_one(gradient, {**batch, **shared}))


def _ensemble(op: Op, backend: str, _: Path) -> None:
    """Gradients through a mapped call, every call having parameters of its own."""
    made = calls(op)
    batch = stacked(op, made)

    def total(batch: Tensors) -> Tensor:
        return vmap(loss_of(op, backend, made[0]))(batch).sum()

    close(grad(total)(batch), one_by_one(grad(loss_of(op, backend, made[0])), batch))


def _pushed(op: Op, call: Call, inputs: Tensors, tangents: Tensors) -> Tensors:
    """The Jacobian-vector product of the specification in fp64, by differences of what is smooth."""
    function = of_inputs(op, "reference", exact(call))
    inputs, tangents = exact(inputs), exact(tangents)
    step = 1e-6
    ahead, behind = (function({n: x + s * tangents[n] for n, x in inputs.items()}) for s in (step, -step))
    return {name: (ahead[name] - behind[name]) / (2 * step) for name in op.OUTPUTS}


def _jvp(op: Op, backend: str, _: Path) -> None:
    first, second, *_ = calls(op)
    inputs, tangents = inputs_of(op, first), inputs_of(op, second)
    function = of_inputs(op, backend, first)

    def carried(inputs: Tensors) -> Tensors:
        found = function(inputs)
        return {name: found[name] for name in op.OUTPUTS}

    output, pushed = jvp(carried, (inputs,), (tangents,))
    close(output, carried(inputs))
    close(pushed, _pushed(op, first, inputs, tangents))


def _dual(op: Op, backend: str, _: Path) -> None:
    first, second, *_ = calls(op)
    inputs, tangents = inputs_of(op, first), inputs_of(op, second)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(x, tangents[name]) for name, x in inputs.items()}
        found = of_inputs(op, backend, first)(dual)
        pushed = {name: forward_ad.unpack_dual(found[name]).tangent for name in op.OUTPUTS}
    close(pushed, _pushed(op, first, inputs, tangents))


def _second(op: Op, call: Call, inputs: Tensors, vector: Tensors) -> Tensors:
    """The Hessian of the loss times a vector, by differences of the specification's gradients in fp64."""
    gradient = grad(loss_of(op, "reference", exact(call)))
    inputs, vector = exact(inputs), exact(vector)
    step = 1e-5
    ahead, behind = (gradient({n: x + s * vector[n] for n, x in inputs.items()}) for s in (step, -step))
    return {name: (ahead[name] - behind[name]) / (2 * step) for name in inputs}


def _double(op: Op, backend: str, _: Path) -> None:
    first, second, *_ = calls(op)
    vector = inputs_of(op, second)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs_of(op, first).items()}
    gradients = torch.autograd.grad(
        loss_of(op, backend, first)(leaves), list(leaves.values()), create_graph=True, materialize_grads=True
    )
    along = sum((g * v).sum() for g, v in zip(gradients, vector.values(), strict=True))
    found = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
    close(dict(zip(leaves, found, strict=True)), _second(op, first, inputs_of(op, first), vector))


def _grad_of_grad(op: Op, backend: str, _: Path) -> None:
    first, second, *_ = calls(op)
    inputs, vector = inputs_of(op, first), inputs_of(op, second)
    gradient = grad(loss_of(op, backend, first))

    def along(inputs: Tensors) -> Tensor:
        found = gradient(inputs)
        return sum((found[name] * vector[name]).sum() for name in inputs)

    close(grad(along)(inputs), _second(op, first, inputs, vector))


def _jvp_of_grad(op: Op, backend: str, _: Path) -> None:
    """A Hessian-vector product, as torch.func recommends it."""
    first, second, *_ = calls(op)
    inputs, vector = inputs_of(op, first), inputs_of(op, second)
    _, found = jvp(grad(loss_of(op, backend, first)), (inputs,), (vector,))
    close(found, _second(op, first, inputs, vector))


def _jvp_of_jvp(op: Op, backend: str, _: Path) -> None:
    """A second derivative along a line, and a third one, by forward mode within forward mode."""
    first, second, *_ = calls(op)
    inputs, tangents = inputs_of(op, first), inputs_of(op, second)

    def along(function: Callable[[Tensors], Any]) -> Callable[[Tensors], Any]:
        return lambda inputs: jvp(function, (inputs,), (tangents,))[1]

    doubled = loss_of(op, "reference", exact(first))
    wide, line = exact(inputs), exact(tangents)

    def slope(t: float) -> Tensor:
        found = grad(doubled)({name: x + t * line[name] for name, x in wide.items()})
        return sum((found[name] * line[name]).sum() for name in found)

    step = 2e-4
    loss = loss_of(op, backend, first)
    close(along(along(loss))(inputs), (slope(step) - slope(-step)) / (2 * step))
    third = (slope(step) - 2 * slope(0.0) + slope(-step)) / step**2
    close(along(along(along(loss)))(inputs), third)
    of_gradient = along(along(grad(loss)))(inputs)
    close(sum((x * tangents[name]).sum() for name, x in of_gradient.items()), third)


def _functionalize(op: Op, backend: str, _: Path) -> None:
    call = calls(op)[0]
    function, inputs = of_inputs(op, backend, call), inputs_of(op, call)
    close(functionalize(function)(inputs), function(inputs))


def _batched_gradients(op: Op, backend: str, _: Path) -> None:
    """Several gradients of one graph at once, as ``autograd.functional.jacobian(vectorize=True)`` asks for them."""
    call = calls(op)[0]
    leaves = {name: x.clone().requires_grad_() for name, x in inputs_of(op, call).items()}
    output = of_inputs(op, backend, call)(leaves)[op.OUTPUTS[-1]]
    upstream = torch.randn(SIZE, *output.shape)
    wanted = [leaves[name] for name in leaves]
    found = torch.autograd.grad(output, wanted, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, wanted, g, retain_graph=True) for g in upstream]
    for x, *ys in zip(found, *each, strict=True):
        close(x, torch.stack(ys))


def _jacobians(op: Op, backend: str, _: Path) -> None:
    """Forward and in reverse, of a few numbers of the input."""
    call = calls(op)[0]
    name = op.INPUTS[0]
    function = of_inputs(op, backend, call)

    def of_few(few: Tensor) -> Tensor:
        x = call[name].clone(memory_format=torch.contiguous_format)
        moved = torch.cat((few, x.flatten()[few.numel() :])).view(x.shape)
        return function({**inputs_of(op, call), name: moved})[op.OUTPUTS[-1]].flatten()[:7]

    few = call[name].flatten()[:5].clone()
    step = 1e-2 * torch.eye(5)

    def loss(x: Tensor) -> Tensor:
        return of_few(x).sin().sum()

    by_differences = torch.stack([(of_few(few + s) - of_few(few - s)) / 2e-2 for s in step], -1)
    torch.testing.assert_close(jacfwd(of_few)(few), by_differences, rtol=1e-2, atol=2e-3)
    close(jacfwd(of_few)(few), jacrev(of_few)(few))
    gradients = [(grad(loss)(few + s) - grad(loss)(few - s)) / 2e-2 for s in step]
    for hessian in (jacfwd(jacrev(loss)), jacfwd(jacfwd(loss)), jacrev(jacrev(loss)), jacrev(jacfwd(loss))):
        torch.testing.assert_close(hessian(few), torch.stack(gradients), rtol=1e-2, atol=2e-3)


# Tracers


class _Module(torch.nn.Module):
    """A call of an op: its tokens are what it takes, its other inputs are parameters."""

    def __init__(self, op: Op, backend: str, call: Call) -> None:
        super().__init__()
        self.op, self.by = op, backend
        self.tokens = tuple(name for name in op.TOKENS if name in call)
        self.call = {name: x for name, x in call.items() if name not in op.INPUTS}
        for name in op.INPUTS:
            if name in call and name not in self.tokens:
                self.register_parameter(name, torch.nn.Parameter(call[name]))

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        call = {**self.call, **dict(self.named_parameters()), **dict(zip(self.tokens, tokens, strict=True))}
        return tuple(self.op.outputs(self.by, call).values())

    def sized(self, batch: int, tokens: int) -> tuple[Tensor, ...]:
        """Tokens to call it with."""
        call = self.op.make_call(self.op.resized(self.op.TRACED, batch, tokens))
        return tuple(call[name].contiguous() for name in self.tokens)


def _module(op: Op, backend: str) -> _Module:
    return _Module(op, backend, op.make_call(op.resized(op.TRACED, 2, 21))).eval()


def _same(traced: Callable[..., Any], module: _Module, *sizes: tuple[int, int]) -> None:
    for size in sizes:
        tokens = module.sized(*size)
        with torch.no_grad():
            actual, expected = traced(*tokens), module(*tokens)
        actual = actual if isinstance(actual, list | tuple) else (actual,)
        for x, y in zip(actual, expected, strict=True):
            close(x, y)


def _same_gradients(traced: Callable[..., Any], module: _Module) -> None:
    if not module.op.OUTPUTS:
        return
    found = []
    for function in (traced, module):
        tokens = [x.requires_grad_() for x in module.sized(2, 21)]
        outputs = function(*tokens)
        outputs = outputs if isinstance(outputs, list | tuple) else (outputs,)
        loss = sum(x.sin().sum() for x in outputs if x.requires_grad)
        found.append(torch.autograd.grad(loss, [*tokens, *function.parameters()]))
    for x, y in zip(*found, strict=True):
        close(x, y)


def _compiled_dual(op: Op, backend: str, _: Path) -> None:
    torch.compiler.reset()
    first, second, *_ = calls(op)
    inputs, tangents = inputs_of(op, first), inputs_of(op, second)
    compiled = torch.compile(of_inputs(op, backend, first), backend="eager")
    with forward_ad.dual_level():
        found = compiled({name: forward_ad.make_dual(x, tangents[name]) for name, x in inputs.items()})
        pushed = {name: forward_ad.unpack_dual(found[name]).tangent for name in op.OUTPUTS}
    close(pushed, _pushed(op, first, inputs, tangents))


def _compiled_vmap(op: Op, backend: str, _: Path) -> None:
    torch.compiler.reset()
    made = calls(op)
    function, batch = of_inputs(op, backend, made[0]), stacked(op, made)
    close(torch.compile(vmap(function), backend="eager")(batch), one_by_one(function, batch))


def _export(op: Op, backend: str, _: Path) -> None:
    """Static, and with any batch and number of tokens."""
    module = _module(op, backend)
    where = 2 if op.TOKENS == ("query", "key", "value") else 1  # the tokens
    for axes, sizes in (
        (None, [(2, 21)]),
        ({0: Dim("batch")}, [(3, 21), (1, 21)]),
        ({0: Dim("batch"), where: Dim("tokens")}, [(3, 17), (1, 30)]),
    ):
        shapes = None if axes is None else (tuple(axes for _ in module.tokens),)
        exported = torch.export.export(module, module.sized(2, 21), dynamic_shapes=shapes).module()
        _same(exported, module, *sizes)


def _jit(op: Op, backend: str, folder: Path) -> None:
    module = _module(op, backend)
    traced = torch.jit.trace(module, module.sized(2, 21))
    traced.save(folder / "traced.pt")
    loaded = torch.jit.load(folder / "traced.pt")
    _same(loaded, module, (2, 21), (3, 21), (1, 21))
    if torch.is_grad_enabled():
        _same_gradients(loaded, module)


def _jit_without_gradients(op: Op, backend: str, folder: Path) -> None:
    with torch.no_grad():
        _jit(op, backend, folder)


def _onnx(op: Op, backend: str, folder: Path, *, dynamo: bool) -> None:
    import onnxruntime

    module, path = _module(op, backend), folder / "exported.onnx"
    names = list(module.tokens)
    axes = {name: {0: "batch"} for name in names}
    options = {"dynamic_shapes": (tuple(axes.values()),)} if dynamo else {"dynamic_axes": axes}
    logging.disable(logging.WARNING)
    try:
        torch.onnx.export(module, module.sized(2, 21), path, dynamo=dynamo, input_names=names, verbose=False, **options)
    finally:
        logging.disable(logging.NOTSET)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*tokens: Tensor) -> list[Tensor]:
        return [
            torch.from_numpy(x) for x in session.run(None, dict(zip(names, (t.numpy() for t in tokens), strict=True)))
        ]

    _same(run, module, (2, 21), (3, 21), (1, 21))


def _flops(op: Op, backend: str, _: Path) -> None:
    """As many, forward and backward, as torch counts of the composition that every backend stands for."""
    call = op.make_call(op.TRACED)
    found = []
    for by in (backend, "reference"):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs_of(op, call).items()}
        with FlopCounterMode(display=False) as counter:
            outputs = op.outputs(by, {**call, **leaves})
            if op.OUTPUTS:
                sum(outputs[name].sum() for name in op.OUTPUTS).backward()
        found.append(counter.get_total_flops())
    if found[0] == 0 < found[1]:
        raise NotImplementedError("counts 0: torch has no formula of its fused kernel for CPUs")
    # A fused backward makes the logits again: 7 products where the specification has 6.
    assert found[0] * 6 in (found[1] * 6, found[1] * 7), found


TRIALS = (
    Trial("`torch.func.vmap`", _vmap),
    Trial("`torch.func.grad`", _grad, derivative=True),
    Trial("per-sample gradients, `vmap(grad)`", _per_sample, derivative=True),
    Trial("parameters of its own for each, `grad` of `vmap`", _ensemble, derivative=True),
    Trial("`torch.func.jvp`", _jvp, derivative=True),
    Trial("forward-mode dual numbers", _dual, derivative=True),
    Trial("second derivative, `create_graph=True`", _double, derivative=True),
    Trial("second derivative, `grad(grad)`", _grad_of_grad, derivative=True),
    Trial("Hessian-vector product, `jvp(grad)`", _jvp_of_grad, derivative=True),
    Trial("forward mode in forward mode, `jvp(jvp)`, `jvp(jvp(grad))`", _jvp_of_jvp, derivative=True),
    Trial("`jacfwd`, `jacrev`, `hessian`", _jacobians, derivative=True),
    Trial("`torch.func.functionalize`", _functionalize),
    Trial("`is_grads_batched=True`, `jacobian(vectorize=True)`", _batched_gradients, derivative=True),
    Trial("`torch.compile` of `vmap`", _compiled_vmap, interpreted=False),
    Trial("dual numbers through `torch.compile`", _compiled_dual, derivative=True, interpreted=False),
    Trial("`torch.export`, any batch, any number of tokens", _export, interpreted=False),
    Trial("`torch.jit.trace`, with gradients", _jit, interpreted=False),
    Trial("`torch.jit.trace` under `torch.no_grad()`", _jit_without_gradients, interpreted=False),
    Trial("`torch.onnx.export(dynamo=True)`, any batch", partial(_onnx, dynamo=True), interpreted=False),
    Trial("`torch.onnx.export(dynamo=False)`, any batch", partial(_onnx, dynamo=False), interpreted=False),
    Trial("`FlopCounterMode`", _flops),
)
