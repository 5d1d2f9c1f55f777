"""How kernels are called and joined to autograd: the short way in eager calls, the op where somebody looks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitreg_kernels.ops._shared.autograd import differentiable, op_or_implementation
from vitreg_kernels.ops._shared.transforms import Rules, joined, parted, transformable

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


def formula(x: Tensor, factor: float, y: Tensor | None) -> tuple[Tensor, Tensor]:
    return x * factor, x.detach().abs()


def fold(size, in_dims, arguments, kernel):
    x, factor, y = arguments
    outputs = kernel(joined(x, in_dims[0], size), factor, y)
    return tuple(parted(output, size) for output in outputs), (0, 0)


FORWARD = Rules(formula, fold, derivable=(0,))
scaled = differentiable("Scaled", forward, save, backward, FORWARD, tensors=1)
# A kernel whose own derivatives are the formula's, as a backward is.
RULES = Rules(lambda x, y: (x.sin() * y,), lambda *_: None, derivable=(0, 1))
product = transformable("Product", lambda x, y: (torch.from_numpy(x.detach().sin().numpy()) * y.detach(),), RULES)


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

    def test_a_gradient_that_nobody_differentiates_is_used_freely(self):
        x = torch.randn(4, requires_grad=True)

        def loss(x):
            return scaled(x, 3.0, None)[0].square().sum()

        first = torch.func.grad(loss)(x)
        torch.testing.assert_close(first.detach(), 18 * x.detach())
        outer = torch.func.grad(lambda y: (torch.func.grad(loss)(y.detach()) * y).sum())(x.detach())
        torch.testing.assert_close(outer, 18 * x.detach())


class TestTransforms:
    """The first derivative is the kernel's, all others the formula's; a mapped call is one call."""

    def test_mapped(self):
        x = torch.randn(3, 2, 4)
        output, statistic = torch.vmap(lambda x: scaled(x, 3.0, None), in_dims=1)(x)
        torch.testing.assert_close(output, 3 * x.movedim(1, 0))
        torch.testing.assert_close(statistic, x.movedim(1, 0).abs())

    def test_pushed_forward(self):
        x, tangent = torch.randn(4), torch.randn(4)
        output, pushed = torch.func.jvp(lambda x: scaled(x, 3.0, None)[0], (x,), (tangent,))
        torch.testing.assert_close((output, pushed), (3 * x, 3 * tangent))

    def test_statistics_have_no_tangent(self):
        _, pushed = torch.func.jvp(lambda x: scaled(x, 3.0, None)[1], (torch.randn(4),), (torch.randn(4),))
        assert not pushed.any()

    @pytest.mark.parametrize("place", [0, 1])
    @pytest.mark.parametrize("times", [1, 2, 3])
    def test_derivatives_of_a_formula(self, place, times):
        given = [torch.randn(4, dtype=torch.float64) for _ in range(2)]

        def nth(function):
            for _ in range(times):
                function = torch.func.grad(function, place)
            return function

        def by_autograd(function):
            leaves = [x.clone().requires_grad_() for x in given]
            found = function(*leaves)
            for _ in range(times):
                (found,) = torch.autograd.grad(found.sum(), leaves[place], create_graph=True, materialize_grads=True)
            return found.detach()

        def by_kernel(x, y):
            return product(x, y)[0].sum()

        expected = by_autograd(lambda x, y: (x.sin() * y).sum())
        torch.testing.assert_close(by_autograd(by_kernel), expected)
        if times == 1:
            torch.testing.assert_close(nth(by_kernel)(*given), expected)

    def test_what_no_one_call_can_do_is_the_formula_mapped(self):
        x, y = torch.randn(3, 4), torch.randn(4)
        (mapped,) = torch.vmap(product, (0, None))(x, y)
        torch.testing.assert_close(mapped, x.sin() * y)
