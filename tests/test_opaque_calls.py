"""How kernels are called and joined to autograd: the short way in eager calls, the op where somebody looks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitreg_kernels.ops._shared.autograd import differentiable, op_or_implementation

LIBRARY = torch.library.Library("vitreg_tests", "FRAGMENT")
LIBRARY.define("twice(Tensor x, str[] names, ScalarType? dtype) -> Tensor")
RAN = []


def implementation(x: Tensor, names: list[str], dtype: torch.dtype | None) -> Tensor:
    RAN.append("implementation")
    return 2 * x


def as_op(x: Tensor, names: list[str], dtype: torch.dtype | None) -> Tensor:
    RAN.append("op")
    return 2 * x


LIBRARY.impl("twice", as_op, "CompositeExplicitAutograd")
torch.library.register_fake("vitreg_tests::twice", lambda x, names, dtype: torch.empty_like(x), lib=LIBRARY)
twice = op_or_implementation(torch.ops.vitreg_tests.twice, implementation)


@pytest.fixture
def ran(dynamo) -> list[str]:
    RAN.clear()
    return RAN


class Subclass(Tensor):
    pass


class SeesOps(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("x", [torch.ones(3), torch.nn.Parameter(torch.ones(3))], ids=["tensor", "parameter"])
def test_an_eager_call_takes_the_short_way(x, ran):
    with torch.no_grad():
        assert torch.equal(twice(x, ["a"], None), torch.full((3,), 2.0))
    with torch.inference_mode():
        twice(x, [], torch.float32)
    with torch.autocast("cpu"):
        twice(x.detach(), [], None)
    assert ran == ["implementation"] * 3


def under_a_mode(mode):
    with mode:
        return twice(torch.ones(3), [], None)


@pytest.mark.parametrize(
    "call",
    [
        lambda: under_a_mode(SeesOps()),
        lambda: under_a_mode(SeesFunctions()),
        lambda: under_a_mode(torch.device("cpu")),
        lambda: twice(torch.ones(3).as_subclass(Subclass), [], None),
        lambda: torch.func.grad(lambda x: twice(x.detach(), [], None).sum() + x.sum())(torch.ones(3)),
    ],
    ids=["dispatch mode", "function mode", "device", "subclass", "torch.func"],
)
def test_who_looks_sees_the_op(call, ran):
    call()
    assert set(ran) == {"op"}


def test_the_compiler_sees_the_op(ran):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: twice(x, ["a"], torch.float32) + 1, backend=counter, fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    assert ran == ["op"]
    (graph,) = counter.graphs
    assert torch.ops.vitreg_tests.twice in {node.target for node in graph.graph.nodes}


def test_a_fake_tensor_runs_nothing(ran):
    with torch._subclasses.FakeTensorMode() as mode:
        inside = twice(torch.ones(3), [], None)
    outside = twice(mode.from_tensor(torch.ones(3)), [], None)
    assert inside.shape == outside.shape == (3,)
    assert ran == []


def forward(x: Tensor, factor: float, y: Tensor | None) -> tuple[Tensor, Tensor]:
    return x * factor, x.detach().abs()


def save(ctx, arguments, output):
    _, ctx.factor, y = arguments
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, y)
    ctx.wanted = ctx.needs_input_grad[0]


def backward(ctx, grad_output, _):
    assert ctx.wanted
    assert len(ctx.saved_tensors) == 3
    return grad_output * ctx.factor, None, None


scaled = differentiable("Scaled", forward, save, backward, tensors=1)


class TestNode:
    def test_gradients_alike_eager_and_transformed(self):
        x = torch.randn(4, requires_grad=True)
        output, statistic = scaled(x, 3.0, None)
        assert not statistic.requires_grad
        assert output.grad_fn.name() == "ScaledBackward"
        (eager,) = torch.autograd.grad(output.square().sum(), x)
        transformed = torch.func.grad(lambda x: scaled(x, 3.0, None)[0].square().sum())(x.detach())
        torch.testing.assert_close(eager, 18 * x.detach())
        assert torch.equal(eager, transformed)

    def test_gradients_alike_compiled(self, dynamo):
        x = torch.randn(4, requires_grad=True)
        compiled = torch.compile(lambda x: scaled(x, 3.0, None)[0].square().sum(), backend="aot_eager", fullgraph=True)
        (grad,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(grad, 18 * x.detach())

    @pytest.mark.parametrize("inner", ["autograd", "torch.func"])
    @pytest.mark.parametrize("outer", ["autograd", "torch.func"])
    def test_a_second_derivative_says_that_there_is_none(self, inner, outer):
        """By each of torch's ways, where a part would otherwise be missing in silence."""
        x = torch.randn(4)
        if (inner, outer) == ("autograd", "torch.func"):
            return  # torch.func does not differentiate torch.autograd.grad

        def loss(x):  # whose incoming gradient is a constant, as scaled's own derivative is not taken to be
            return scaled(x, 3.0, None)[0].sum()

        def gradient(x):
            if inner == "torch.func":
                return torch.func.grad(loss)(x)
            return torch.autograd.grad(loss(x), x, create_graph=True)[0]

        def total(x):
            return gradient(x).square().sum() + x.sum()

        with pytest.raises((RuntimeError, NotImplementedError), match="once_differentiable"):
            torch.func.grad(total)(x) if outer == "torch.func" else total(x.requires_grad_()).backward()

    def test_a_gradient_that_nobody_differentiates_is_used_freely(self):
        x = torch.randn(4, requires_grad=True)

        def loss(x):
            return scaled(x, 3.0, None)[0].square().sum()

        first = torch.func.grad(loss)(x)
        torch.testing.assert_close(first.detach(), 18 * x.detach())
        outer = torch.func.grad(lambda y: (torch.func.grad(loss)(y.detach()) * y).sum())(x.detach())
        torch.testing.assert_close(outer, 18 * x.detach())
