"""The Triton kernels of residual_layer_norm in the interpreter, beside what the contract holds them to."""

from __future__ import annotations

import pytest
import torch
from harness import Guarded, guarded, guarded_like
from residual_norm_cases import (
    DIFFERENTIABLE,
    PLAIN,
    Oracle,
    Spec,
    assert_parity,
    assert_passed,
    make_call,
    make_upstream,
)
from torch import Tensor
from torch.library import opcheck

from vitreg_kernels.functional import residual_layer_norm
from vitreg_kernels.ops._shared.row_tiles import row_tiles
from vitreg_kernels.ops.residual_norm.backends import triton
from vitreg_kernels.ops.residual_norm.backends.triton import plan
from vitreg_kernels.ops.residual_norm.backends.triton.backward_kernels import backward_launches
from vitreg_kernels.ops.residual_norm.backends.triton.forward_kernel import forward_launches
from vitreg_kernels.ops.residual_norm.types import NormGradients, NormGradInputs, NormInputs, NormOutputs

OPS = torch.ops.vitreg
TENSORS = ("x", "branch", "layer_scale", "drop_path", "weight", "bias")

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of one multiprocessor: the programs of the backward take tile after tile, as on a real one."""
    monkeypatch.setattr(plan, "multiprocessors", lambda device: 1)


def inputs_of(call: dict) -> NormInputs:
    return NormInputs(*(call.get(name) for name in TENSORS), call["eps"], call["rms"], call["x"].dtype)


def guard_all(values: dict) -> dict:
    return {name: guarded_like(x) if isinstance(x, Tensor) else x for name, x in values.items()}


def run_guarded(call: dict, upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients from buffers full of NaN, whose bands are checked."""
    inputs = inputs_of(call)
    written: dict[str, Guarded] = {}

    def buffer(name: str, like: Tensor | None, *shape: int, dtype: torch.dtype | None = None) -> Tensor | None:
        if like is None:
            return None
        written[name] = guarded(shape or like.shape, dtype or like.dtype)
        return written[name].view

    x, a_token = inputs.x, inputs.x.shape[:2]
    outputs = NormOutputs(
        buffer("residual", inputs.branch),
        buffer("normalized", x),
        buffer("token_norms", x, *a_token, dtype=torch.float32),
        None if inputs.rms else buffer("mean", x, *a_token, dtype=torch.float32),
        buffer("rstd", x, *a_token, dtype=torch.float32),
    )
    residual = x if outputs.residual is None else outputs.residual
    tensors = (inputs.branch, inputs.layer_scale, inputs.drop_path, inputs.weight)
    grad_inputs = NormGradInputs(
        upstream.get("residual"), upstream["normalized"], residual, outputs.mean, outputs.rstd, *tensors
    )
    gradients = NormGradients(*(buffer(f"grad_{name}", call.get(name)) for name in DIFFERENTIABLE))
    sums = plan.empty_sums(grad_inputs, gradients)
    launches = [*forward_launches(inputs, outputs), *backward_launches(grad_inputs, gradients, sums)]
    for sums in ("layer_scale_sums", "weight_sums", "bias_sums"):
        if launches[1].arguments[sums] is not None:
            launches[1].arguments[sums].fill_(torch.nan)
    for launch in launches:
        launch.run()
    for name, memory in written.items():
        memory.check_written(name)
    results = {name: memory.view for name, memory in written.items() if name not in ("mean", "rstd")}
    return {"residual": x} | results


@every_dtype
@pytest.mark.parametrize(
    "spec",
    [
        Spec(batch=1, tokens=1, channels=384),
        Spec(batch=3, tokens=54, channels=100),
        Spec(batch=2, tokens=3, channels=768),
        Spec(batch=1, tokens=5, channels=1280),
        Spec(batch=1, tokens=2, channels=4096),
        Spec(batch=3, tokens=130, channels=17, rms=True, bias=False),
        PLAIN._replace(batch=4, tokens=33, channels=384, mean=30.0, spread=0.01),
    ],
    ids=str,
)
def test_guarded(spec: Spec, dtype: torch.dtype) -> None:
    spec = spec._replace(dtype=dtype)
    if spec.mean and dtype == torch.float16:
        pytest.skip("fp16 has no such numbers")
    call, upstream = guard_all(make_call(spec)), guard_all(make_upstream(spec))
    if not spec.branch:
        del upstream["residual"]  # it arrives at x, past the kernels
    oracle = Oracle(call, upstream)
    assert_passed(oracle.compare(run_guarded(call, upstream)), str(spec))


@pytest.mark.parametrize(("multiprocessors", "tokens", "channels"), [(1, 13, 384), (1, 13, 1024), (20, 30, 1024)])
def test_more_tiles_than_programs(
    multiprocessors: int, tokens: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial sums of several tiles a program, and of more programs than are added up at once."""
    monkeypatch.setattr(plan, "multiprocessors", lambda device: multiprocessors)
    spec = Spec(batch=3, tokens=tokens, channels=channels)
    tiles = plan.backward_tiles(make_call(spec)["x"])
    assert tiles.total > plan.backward_programs(tiles, torch.device("cpu")) == 2 * multiprocessors
    assert_parity(spec, "triton")


def test_few_programs_whatever_the_batch() -> None:
    x = torch.empty(1024, 261, 768, device="meta")
    tiles = plan.backward_tiles(x)
    assert plan.backward_programs(tiles, torch.device("cpu")) == 2
    assert tiles.total == 1024 * 131
    assert row_tiles(x).total == tiles.total


@pytest.mark.parametrize("channels", [1, 16, 384, 768, 1024, 1280, 1536, 4096])
def test_a_program_holds_whole_tokens(channels: int) -> None:
    for tiles in (row_tiles, plan.backward_tiles):
        found = tiles(torch.empty(2, 9, channels, device="meta"))
        assert channels <= found.block_c < max(2 * channels, 17)
        assert found.an_image * found.rows >= 9 > (found.an_image - 1) * found.rows
        assert found.num_warps in (4, 8, 16)


def test_one_launch_forward_and_none_for_sums_that_nobody_wants() -> None:
    call = make_call(Spec())
    forward, backward, total = triton.launches(inputs_of(call))
    assert [launch.grid for launch in (forward, total)] == [(2,), (2,)]
    residual = call["x"]
    statistic = residual[..., 0]
    inputs = NormGradInputs(residual, residual, residual, statistic, statistic, None, None, None, call["weight"])
    gradients = NormGradients(residual, None, None, None, None)
    (alone,) = backward_launches(inputs, gradients, plan.empty_sums(inputs, gradients))
    assert alone.kernel is backward.kernel
    assert all(alone.arguments[name] is None for name in ("layer_scale_sums", "weight_sums", "bias_sums", "branch"))


class TestOps:
    @pytest.mark.parametrize("spec", [Spec(), PLAIN], ids=str)
    @pytest.mark.parametrize("arrives", [("residual", "normalized"), ("residual",), ("normalized",)], ids=str)
    def test_backward_of_some_inputs_at_some_outputs(self, spec: Spec, arrives: tuple[str, ...]) -> None:
        call, upstream = make_call(spec), make_upstream(spec)
        x, branch, layer_scale, drop_path, weight, bias, _, rms, _ = inputs = inputs_of(call)
        residual, _, _, mean, rstd = OPS.residual_norm_forward(*inputs, "triton")
        gradients = [upstream[name] if name in arrives else None for name in ("residual", "normalized")]
        saved = (x if branch is None else residual, None if rms else mean, rstd)
        wanted = [name for name in DIFFERENTIABLE if name in call and ("normalized" in arrives or name[0] not in "wb")]
        call_of = (*gradients, *saved, branch, layer_scale, drop_path, weight, bias, torch.float16)
        for names in (wanted, wanted[:1], []):
            opcheck(OPS.residual_norm_backward.default, (*call_of, " ".join(names), "triton"))

    def test_a_branch_is_kept_only_where_its_values_are_needed(self) -> None:
        kept = []
        for wanted in (DIFFERENTIABLE, ("x", "branch", "weight")):
            call = make_call(Spec())
            leaves = {name: call[name].requires_grad_() for name in wanted}
            result = residual_layer_norm(**{**call, **leaves}, backend="triton")
            kept.append(sum(t is not None and t.ndim == 3 for t in result.normalized.grad_fn.saved_tensors))
        assert kept == [2, 1]  # the residual, and the branch

    def test_a_branch_that_is_simply_added_shares_the_gradient_of_x(self) -> None:
        """One write for both; by themselves afterwards, so that changing one leaves the other."""
        call = make_call(Spec(layer_scale=False, drop_path=False))
        x, branch = call["x"].requires_grad_(), call["branch"].requires_grad_()
        residual_layer_norm(**call, backend="triton").normalized.square().sum().backward()
        assert torch.equal(x.grad, branch.grad)
        x.grad.zero_()
        assert branch.grad.any()
