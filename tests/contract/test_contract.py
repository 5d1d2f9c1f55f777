"""What every op promises, by every backend of it that runs here, tested by the same code.

A new op is one adapter in this folder and one line in ``OPS``. The Triton kernels are held to the same in the
interpreter's process, by tests/interpreter/test_contract.py. The ops tested are those of the module that pytest
collects: one that imports these tests (``from contract.test_contract import *``) and has an ``OPS`` of its own tests
those, as tests/examples/test_minimal_op.py does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from contract import memory
from contract.assemble import Assemble
from contract.attention import Attention, PackedAttention
from contract.op import Op, Tensors, errors, mapped, run
from contract.residual_norm import ResidualNorm
from contract.token_norms import TokenNorms, TokenNormStats
from vitreg_kernels._triton.mode import INTERPRETING

OPS: tuple[Op, ...] = (Attention(), PackedAttention(), ResidualNorm(), TokenNorms(), TokenNormStats(), Assemble())

# A quarter of the random calls every time, all of them by `make test FULL=1`.
every_share = pytest.mark.parametrize(
    "share", [pytest.param(4, id="a quarter"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)

HALF = (torch.float16,) if INTERPRETING else (torch.float16, torch.bfloat16)  # the interpreter garbles bf16


def themselves(ops: Sequence[Op], *, traced_apart: bool = False) -> Iterator[Any]:
    """Each op, or those that are traced apart."""
    for op in ops:
        if not (op.TRACED_AS_ANOTHER and traced_apart):
            yield pytest.param(op, id=str(op))


def backends(
    ops: Sequence[Op], *, reference: bool = True, double: bool = False, traced_apart: bool = False
) -> Iterator[Any]:
    """Of each op each backend: without the reference, only those that serve fp64, only of ops that are traced apart."""
    for op in ops:
        for backend in op.backends:
            left_out = (
                (backend.name == "reference" and not reference)
                or (torch.float64 not in backend.requirements.dtypes and double)
                or (op.TRACED_AS_ANOTHER and traced_apart)
            )
            if not left_out:
                yield pytest.param(op, backend, id=f"{op}-{backend.name}")


def calls(ops: Sequence[Op], *, first: int = 0, end: int | None = None, quick: int | None = None) -> Iterator[Any]:
    """Of each op by each backend each kind of call; those behind the first ``quick`` take `make test FULL=1`."""
    for of_backend in backends(ops):
        op, backend = of_backend.values
        for place, spec in enumerate(op.KINDS[first:end], first):
            marks = [pytest.mark.slow] if quick is not None and place >= quick else []
            yield pytest.param(op, backend, spec, id=f"{of_backend.id}-{spec}", marks=marks)


# Marks that tests/conftest.py makes parameters of, from the OPS of the module that a test is collected in.
every_op = pytest.mark.of_ops("op", themselves)
every_op_traced_apart = pytest.mark.of_ops("op", partial(themselves, traced_apart=True))
every_backend = pytest.mark.of_ops("op, backend", backends)
# The reference is what the others are held against; the ops' own tests hold it against formulas of their own.
every_other = pytest.mark.of_ops("op, backend", partial(backends, reference=False))
every_in_double = pytest.mark.of_ops("op, backend", partial(backends, double=True))
others_in_double = pytest.mark.of_ops("op, backend", partial(backends, double=True, reference=False))
others_traced_apart = pytest.mark.of_ops("op, backend", partial(backends, traced_apart=True, reference=False))

# The interpreter takes long for a call.
_MOST = 2 if INTERPRETING else None
_QUICK = 1 if INTERPRETING else None
slow_if_interpreted = pytest.mark.slow if INTERPRETING else lambda test: test
every_kind = pytest.mark.of_ops("op, backend, spec", calls)
most_kinds = pytest.mark.of_ops("op, backend, spec", partial(calls, end=_MOST, quick=_QUICK))
most_but_the_first = pytest.mark.of_ops("op, backend, spec", partial(calls, first=1, end=_MOST, quick=3))
every_kind_two_of_them_quickly = pytest.mark.of_ops(
    "op, backend, spec", partial(calls, quick=2 if INTERPRETING else None)
)


def same(actual: Tensors, expected: Tensors) -> None:
    """To within the roundings of another order of summation."""
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def same_bits(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


def loss_of_input(op: Op, call: dict) -> tuple[Tensor, Callable[[Tensor, str], Tensor]]:
    """A call's first input, and a loss of it by a backend, in which all outputs take part."""
    name = op.INPUTS[0]

    def loss(x: Tensor, by: str) -> Tensor:
        outputs = op.outputs(by, call | {name: x})
        return sum((outputs[output].sin().sum() for output in op.OUTPUTS), x.sum())

    return call[name], loss


@every_op
def test_there_is_something_to_test(op):
    names = [backend.name for backend in op.backends]
    assert names == ["triton"] if INTERPRETING else "reference" in names and len(names) >= 2


@every_op
def test_its_operators_are_one_kernel_for_all_devices_and_a_fake(op):
    """None has an autograd formula of its own: autograd.Functions join them."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{op.NAMESPACE}::")]
    assert names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd"), name
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"), name
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None, name


class TestParity:
    @pytest.mark.skipif(INTERPRETING, reason="takes too long; there, calls of every kind are run in guarded memory")
    @every_share
    @every_other
    def test_any_call(self, op, backend, share):
        """Outputs, gradients and statistics keep the accuracy rule against fp64."""
        dtypes = tuple(dtype for dtype in backend.requirements.dtypes if dtype != torch.float64)

        @settings(max_examples=op.EXAMPLES // share)
        @given(spec=op.specs(backend.requirements._replace(dtypes=dtypes)))
        def holds(spec):
            # Alike but for their numbers, and judged as one: the eager error of a few numbers may owe to luck.
            draws = min(max(10, 4096 // max(1, op.make_call(spec)[op.TOKENS[0]].numel())), 64)
            calls = [op.make_call(spec._replace(seed=spec.seed + 2 * i)) for i in range(draws)]
            broken = errors(op, calls, [run(op, backend.name, call) for call in calls])
            assert not broken, "\n".join((f"{backend.name} on {spec}", *broken))

        holds()

    @every_share
    @others_in_double
    def test_any_call_in_double(self, op, backend, share):
        """fp64 has no eager error to be measured by; there a backend agrees with the reference outright."""

        @settings(max_examples=op.EXAMPLES // share)
        @given(spec=op.specs(backend.requirements._replace(dtypes=(torch.float64,))))
        def holds(spec):
            call = op.make_call(spec)
            actual, expected = (run(op, name, call) for name in (backend.name, "reference"))
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)

        holds()


class TestMemory:
    @every_backend
    def test_any_strides(self, op, backend):
        """The same numbers from inputs and upstream gradients that lie otherwise, in outputs that lie as before."""
        call = op.make_call(op.KINDS[0])
        expected = run(op, backend.name, call)
        for layout in memory.LAYOUTS:
            lay_out = partial(memory.laid_out, layout=layout)
            actual = run(op, backend.name, mapped(call, lay_out), arrange=lay_out)
            same(actual, expected)
            for name in actual.keys() - op.aliases(call):
                if not name.startswith("grad_"):
                    assert actual[name].stride() == expected[name].stride(), name

    @every_backend
    def test_upstream_gradients_that_are_one_number(self, op, backend):
        """As ``sum().backward()`` gives them, with stride 0."""
        call = op.make_call(op.KINDS[0])
        expanded, whole = (lambda x: x.flatten()[0].expand(x.shape), lambda x: x.flatten()[0].repeat(x.shape))
        same(run(op, backend.name, call, arrange=expanded), run(op, backend.name, call, arrange=whole))

    @every_backend
    def test_strides_beyond_the_32_bit_range(self, op, backend, far_memory):
        """Along each axis."""
        call = op.make_call(op.KINDS[0]._replace(dtype=torch.float16))
        expected = run(op, backend.name, call)
        for axis in range(call[op.TOKENS[0]].ndim):
            slots = iter(range(16))

            def far(x: Tensor, axis=axis, slots=slots) -> Tensor:
                return memory.far(x, axis, far_memory, next(slots)) if axis < x.ndim else x

            moved = {name: far(call[name]) for name in op.TOKENS if name in call}
            actual = run(op, backend.name, call | moved, arrange=far)
            if backend.opaque:
                same_bits(actual, expected)
            else:  # torch may take another kernel; an element read from the wrong place is off by about 1
                torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-2)

    @most_kinds
    def test_nothing_is_changed_and_nothing_shared(self, op, backend, spec):
        """Inputs and upstream gradients are as before, and an output is nobody else's memory."""
        call, upstream = op.make_call(spec), []
        before = mapped(call, Tensor.clone)
        results = run(op, backend.name, call, arrange=lambda x: upstream.append((x, x.clone())) or x)
        for x, old in zip(tree_leaves(call), tree_leaves(before), strict=True):
            assert not isinstance(x, Tensor) or torch.equal(x, old)
        assert all(torch.equal(x, old) for x, old in upstream)
        held = {x.untyped_storage().data_ptr() for x in tree_leaves(call) if isinstance(x, Tensor)}
        outputs = [x for name, x in results.items() if not name.startswith("grad_") and name not in op.aliases(call)]
        outputs = [x for x in outputs if x.numel()]
        if not op.OUTPUTS_SHARE_MEMORY:
            held = [*held, *(x.untyped_storage().data_ptr() for x in outputs)]
            assert len(set(held)) == len(held)

    @every_backend
    @pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETING else [torch.float32, *HALF], ids=str)
    def test_bitwise_the_same_from_run_to_run(self, op, backend, dtype):
        first, second = (run(op, backend.name, op.make_call(op.KINDS[0]._replace(dtype=dtype))) for _ in range(2))
        same_bits(first, second)

    @every_kind
    def test_empty_batch(self, op, backend, spec):
        if getattr(spec, "lengths", ()):
            return  # a pack has one row of tokens
        call = op.make_call(spec._replace(batch=0))
        results = run(op, backend.name, call)
        full = run(op, "reference", op.make_call(spec))
        assert results.keys() == full.keys()
        for name, x in results.items():
            assert x.dtype == full[name].dtype
            if x.numel():  # a parameter's gradient, or a count
                assert x.shape == full[name].shape
                assert not x.isfinite().logical_and(x != 0).any(), name
            else:
                assert x.shape == (0, *full[name].shape[1:]) or not full[name].numel(), name


class TestGradients:
    @most_kinds
    def test_statistics_carry_none_and_are_exact_enough(self, op, backend, spec):
        for dtype in (torch.float32, *HALF):
            call = op.make_call(spec._replace(dtype=dtype))
            leaves = {name: call[name].detach().requires_grad_() for name in op.INPUTS if name in call}
            for name, x in op.outputs(backend.name, call | leaves).items():
                assert x.requires_grad == (name in op.OUTPUTS), name
                if name not in op.OUTPUTS:
                    assert x.dtype == op.statistic_dtype(name), name

    @every_backend
    def test_none_where_none_is_wanted(self, op, backend):
        call = op.make_call(op.KINDS[0])
        leaves = call | {name: call[name].detach().requires_grad_() for name in op.INPUTS}
        with torch.no_grad():
            assert not any(x.requires_grad for x in op.outputs(backend.name, leaves).values())
        with torch.inference_mode():
            assert all(x.is_inference() for x in op.outputs(backend.name, leaves).values())

    @most_kinds
    def test_of_one_input_alone(self, op, backend, spec):
        call = op.make_call(spec)
        everything = run(op, backend.name, call)
        for name in op.INPUTS if op.OUTPUTS else ():
            if name in call:
                alone = run(op, backend.name, call, inputs=[name])
                assert {found for found in alone if found.startswith("grad_")} == {f"grad_{name}"}
                same(alone, {found: everything[found] for found in alone})

    @most_kinds
    def test_at_one_output_alone(self, op, backend, spec):
        call = op.make_call(spec)
        for output in op.OUTPUTS:
            if output not in op.aliases(call):
                same(*(run(op, name, call, at=[output]) for name in (backend.name, "reference")))

    @every_backend
    def test_functional_gradient(self, op, backend):
        """torch.func.grad sees through the op."""
        x, loss = loss_of_input(op, op.make_call(op.KINDS[0]))
        actual, expected = (torch.func.grad(loss)(x, by) for by in (backend.name, "reference"))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class _Recorded(TorchDispatchMode):
    """Keeps every operator of a namespace that is called, with its arguments as they were."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.namespace, self.calls = namespace, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == self.namespace:
            kept = tree_map_only(Tensor, lambda x: x.detach().clone(), (arguments, options or {}))
            self.calls.append((function, *kept))
        return function(*arguments, **(options or {}))


class TestOpaqueOps:
    @every_kind_two_of_them_quickly
    def test_operators_are_what_they_say(self, op, backend, spec):
        """Schema, fake, registration and dynamic shapes of all that a forward and a backward call, each by itself."""
        self.check(op, backend, op.make_call(spec))

    @every_backend
    def test_in_half_precision(self, op, backend):
        """The dtypes that fakes give, which tests in fp32 cannot tell from statistics'."""
        self.check(op, backend, op.make_call(op.KINDS[0]._replace(dtype=torch.float16)), "test_faketensor")

    @staticmethod
    def check(op, backend, call, *utils):
        with _Recorded(op.NAMESPACE) as recorded:
            run(op, backend.name, call)
        assert recorded.calls or not backend.opaque
        for function, arguments, options in recorded.calls:
            opcheck(function, arguments, options, **({"test_utils": utils} if utils else {}))


class TestAutocast:
    @most_kinds
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_outputs(self, op, backend, spec, dtype):
        call = op.make_call(spec)
        expected = op.under_autocast(backend.name, call, dtype)
        with torch.autocast("cpu", dtype):
            actual = op.outputs(backend.name, call)
        same_bits(actual, expected)
        assert all(x.dtype == expected[name].dtype for name, x in actual.items())

    @every_backend
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_gradients_come_back_in_the_inputs_dtype(self, op, backend, dtype):
        call = op.make_call(op.KINDS[0])
        with torch.autocast("cpu", dtype):
            results = run(op, backend.name, call)
        for name in op.INPUTS if op.OUTPUTS else ():
            assert results[f"grad_{name}"].dtype == call[name].dtype, name
            assert results[f"grad_{name}"].any(), name

    @every_in_double
    def test_double_is_left_alone(self, op, backend):
        call = op.make_call(op.KINDS[0]._replace(dtype=torch.float64))
        expected = op.outputs(backend.name, call)
        with torch.autocast("cpu", torch.bfloat16):
            same_bits(op.outputs(backend.name, call), expected)


@pytest.mark.usefixtures("dynamo")
class TestCompile:
    @staticmethod
    def assert_same(op, backend, compiled, call):
        """Outputs and gradients, compiled and not."""
        same(run(op, backend, call, function=compiled), run(op, backend, call))

    @most_but_the_first
    def test_whole_graph(self, op, backend, spec):
        if op.traced(backend, spec):
            compiled = torch.compile(op.outputs, backend="aot_eager", fullgraph=True)
            self.assert_same(op, backend.name, compiled, op.make_call(spec))

    @slow_if_interpreted
    @others_traced_apart
    def test_sizes_change_under_a_recompile_limit(self, op, backend):
        """Of the fullest call: a graph for the first length, one for all others, one more as the batch changes too."""
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(op.outputs, backend=counter, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
            for batch, tokens in ((2, 21), (2, 26), (3, 17), (4, 18)):
                call = op.make_call(op.resized(op.KINDS[0], batch, tokens))
                self.assert_same(op, backend.name, compiled, call)
        assert counter.frame_count <= 3

    @every_backend
    def test_autocast_is_seen_while_tracing(self, op, backend):
        def function(call):
            with torch.autocast("cpu", torch.float16):
                return op.outputs(backend.name, call)

        call = op.make_call(op.KINDS[0])
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        actual, expected = compiled(call), function(call)
        assert all(x.dtype == expected[name].dtype for name, x in actual.items())
        torch.testing.assert_close(actual, expected)

    @pytest.mark.skipif(INTERPRETING, reason="run eagerly, the interpreter itself would be traced")
    @every_backend
    def test_functional_gradient(self, op, backend):
        """torch.func.grad sees through the op in a graph, or in no graph if it cannot be traced."""
        x, loss = loss_of_input(op, op.make_call(op.KINDS[0]))
        gradient = torch.func.grad(partial(loss, by=backend.name))
        compiled = torch.compile(gradient, backend="aot_eager")
        torch.testing.assert_close(compiled(x), gradient(x), rtol=1e-4, atol=1e-5)

    @slow_if_interpreted
    @pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a compiler")
    @every_op_traced_apart
    def test_inductor(self, op):
        """The compiler people use, and the backend that a call gets which names none."""
        name = "triton" if INTERPRETING else None
        self.assert_same(op, name, torch.compile(op.outputs, fullgraph=True), op.make_call(op.KINDS[0]))


@pytest.fixture(scope="module")
def far_memory() -> Tensor:
    return memory.far_memory()
