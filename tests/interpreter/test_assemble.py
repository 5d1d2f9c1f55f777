"""The Triton kernels of assemble_tokens in the interpreter: in guarded memory, behind the opaque ops, compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from assemble_cases import DIFFERENTIABLE, KINDS, Oracle, Spec, make_call, make_upstream, run
from harness import Guarded, guarded, guarded_like
from residual_norm_cases import LAYOUTS, assert_passed
from torch import Tensor
from torch.library import opcheck

from vitreg_kernels.functional import assemble_tokens
from vitreg_kernels.ops.assemble.backends import triton
from vitreg_kernels.ops.assemble.backends.triton.backward_kernel import backward_launch
from vitreg_kernels.ops.assemble.backends.triton.forward_kernel import forward_launch
from vitreg_kernels.ops.assemble.types import AssembleGradients, AssembleInputs, sizes_of

OPS = torch.ops.vitreg
PARAMETERS = DIFFERENTIABLE[1:]

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
every_kind = pytest.mark.parametrize("spec", KINDS, ids=str)


def inputs_of(call: dict[str, Tensor]) -> AssembleInputs:
    return AssembleInputs(*(call.get(name) for name in DIFFERENTIABLE), call["patches"].dtype)


def guard_all(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: guarded_like(x) for name, x in values.items()}


def run_guarded(call: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """The tokens and the gradients of the parameters from buffers full of NaN, whose bands are checked."""
    inputs = inputs_of(call)
    written: dict[str, Guarded] = {"tokens": guarded(upstream.shape, upstream.dtype)}
    for name in PARAMETERS:
        if name in call:
            written[f"grad_{name}"] = guarded(call[name].shape, call[name].dtype)
    views = {name: memory.view for name, memory in written.items()}
    gradients = AssembleGradients(*(views.get(f"grad_{name}") for name in PARAMETERS))
    forward_launch(inputs, views["tokens"]).run()
    backward_launch(upstream, sizes_of(*inputs), gradients).run()
    for name, memory in written.items():
        memory.check_written(name)
    return views


@every_dtype
@pytest.mark.parametrize(
    "spec",
    [
        *KINDS,
        *(Spec(layout=layout, position="cls") for layout in LAYOUTS if layout != "expanded"),
        *(Spec(patches=70, channels=150, layout=layout, position="patches") for layout in ("contiguous", "permuted")),
        Spec(batch=1, patches=1, channels=384),
        Spec(batch=70, patches=2, channels=70),  # more images than are added up at a time
        Spec(patches=3, channels=17, registers=70),  # more registers than a tile has
        # More registers than rows: to give one a row is to write out of bounds, not where a patch writes later.
        *(Spec(patches=1, registers=8, position=position) for position in ("patches", "cls")),
        Spec(patches=32, channels=128, cls_tokens=2, registers=30),  # nothing but whole tiles
    ],
    ids=str,
)
def test_guarded(spec: Spec, dtype: torch.dtype) -> None:
    spec = spec._replace(dtype=dtype)
    call, upstream = guard_all(make_call(spec)), guard_all(make_upstream(spec))
    oracle = Oracle(call, upstream)
    results = run_guarded(call, upstream["tokens"])
    assert torch.equal(results["tokens"], oracle.eager["tokens"])
    assert_passed(oracle.compare(results | {"grad_patches": oracle.eager["grad_patches"]}), str(spec))


def test_patches_are_read_where_they_lie() -> None:
    """A convolution's result is not made contiguous first."""
    inputs = inputs_of(make_call(Spec(layout="permuted")))
    launch = forward_launch(inputs, torch.empty(2, 14, 48))
    patches = launch.arguments["patches"]
    assert patches.pointer is inputs.patches
    assert patches.strides == (9 * 48, 1, 9)


def test_one_launch_each_way_and_none_for_what_nobody_wants(change_backends) -> None:
    inputs = inputs_of(make_call(Spec()))
    forward, backward = triton.launches(inputs)
    assert (forward.grid, backward.grid) == ((4,), (14,))  # prefix and patches of two images; tokens
    tokens = make_upstream(Spec())["tokens"]
    prefix_only = AssembleGradients(inputs.cls_token, inputs.register_tokens, None)
    assert backward_launch(tokens, sizes_of(*inputs), prefix_only).grid == (5,)

    def backward_of(*_: object) -> None:
        pytest.fail("a kernel ran for the gradient of the patches")

    change_backends("triton", op="assemble", backward=backward_of)
    run("triton", make_call(Spec()), make_upstream(Spec()), wanted=["patches"])


def test_programs_enough_for_a_gpu() -> None:
    """Of the smallest ViT at a small batch: 132 multiprocessors hold several programs each."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    of_prefix, of_position = empty(1, 4, 384), empty(1, 257, 384)
    inputs = AssembleInputs(empty(32, 256, 384), of_prefix[:, :1], of_prefix, of_position, torch.bfloat16)
    assert all(launch.grid[0] > 5 * 132 for launch in triton.launches(inputs))


class TestOps:
    @pytest.mark.parametrize("half", [("patches",), PARAMETERS[:2]], ids=str)
    def test_a_mixture_of_dtypes(self, half: tuple[str, ...]) -> None:
        call, upstream = make_call(Spec()), make_upstream(Spec())
        call |= {name: call[name].half() for name in half}
        oracle = Oracle(call, upstream)
        results = run("triton", call, upstream)
        assert torch.equal(results["tokens"], oracle.eager["tokens"])
        assert_passed(oracle.compare(results), str(half))
        opcheck(OPS.assemble_forward.default, (*inputs_of(call)._replace(dtype=torch.float32), "triton"))

    @pytest.mark.parametrize("spec", [Spec(), Spec(cls_tokens=0, registers=0)], ids=str)
    def test_the_patches_gradient_is_a_view_of_the_upstream_one(self, spec: Spec) -> None:
        call, upstream = make_call(spec), make_upstream(spec)["tokens"]
        gradient = run("triton", call, {"tokens": upstream})["grad_patches"]
        assert gradient.data_ptr() == upstream[:, spec.prefix :].data_ptr()
        call["patches"] = call["patches"].half()
        gradient = run("triton", call, {"tokens": upstream})["grad_patches"]
        assert torch.equal(gradient, upstream[:, spec.prefix :].half())

    def test_gradients_of_parameters_share_no_memory(self) -> None:
        """A CLS token's gradient is that of its row too; scaling both, as clipping does, must not scale one twice."""
        call = make_call(Spec())
        results = run("triton", call, make_upstream(Spec()))
        assert torch.equal(results["grad_cls_token"], results["grad_pos_embed"][:, :1])
        pointers = {results[f"grad_{name}"].untyped_storage().data_ptr() for name in PARAMETERS}
        assert len(pointers) == 3

    def test_nothing_is_kept_for_the_backward(self) -> None:
        call = {name: x.requires_grad_() for name, x in make_call(Spec()).items()}
        assert not assemble_tokens(**call, backend="triton").grad_fn.saved_tensors


class TestCompile:
    @pytest.fixture(autouse=True)
    def _strict_compiler(self) -> Iterator[None]:
        torch.compiler.reset()
        with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            yield

    @pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_used_twice(self, compiler: str) -> None:
        """The view that is the patches' gradient meets other gradients of the same memory in a compiled graph too."""

        def loss(call: dict[str, Tensor]) -> Tensor:
            patches = call["patches"] * 2.0
            tokens = assemble_tokens(**call | {"patches": patches}, backend="triton")
            return (tokens * tokens.sin()).sum() + patches.cos().sum() + tokens[:, 5:].square().sum()

        results = []
        for function in (loss, torch.compile(loss, backend=compiler, fullgraph=True)):
            call = {name: x.requires_grad_() for name, x in make_call(Spec()).items()}
            function(call).backward()
            results.append([x.grad for x in call.values()])
        torch.testing.assert_close(results[1], results[0])
