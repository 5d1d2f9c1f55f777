"""A call that comes again gives triton's launcher what it would be given if the call were described anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402

from benchmarks.host_cost import NoGPU, active  # noqa: E402
from vitreg_kernels import TokenLayout  # noqa: E402
from vitreg_kernels._triton import replay  # noqa: E402
from vitreg_kernels._triton.launch import Launch, strided  # noqa: E402
from vitreg_kernels._triton.replay import recording, run_launches  # noqa: E402
from vitreg_kernels.ops.assemble.backends import triton as assemble  # noqa: E402
from vitreg_kernels.ops.assemble.types import AssembleGradients, AssembleInputs, sizes_of  # noqa: E402
from vitreg_kernels.ops.attention.backends import triton as attention  # noqa: E402
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES, AttentionInputs, Rope, empty_output  # noqa: E402
from vitreg_kernels.ops.residual_norm.backends import triton as residual_norm  # noqa: E402
from vitreg_kernels.ops.residual_norm.types import NormGradients, NormGradInputs, NormInputs  # noqa: E402
from vitreg_kernels.ops.token_norms.backends import triton as token_norms  # noqa: E402
from vitreg_kernels.ops.token_norms.types import NormDistribution  # noqa: E402

F16 = torch.float16
Call = tuple[Any, ...]


class Driver(NoGPU):
    """Keeps what the launcher is given; tensors by their address, which is all that the launcher takes of them."""

    def __init__(self) -> None:
        super().__init__(lambda *launch: self.launches.append(by_address(launch)))
        self.launches: list[Any] = []

    def launches_of(self, describe: Callable[..., list[Launch]], call: Call) -> list[Any]:
        self.launches = []
        run_launches(describe, *call)
        return self.launches


def by_address(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "address", value.data_ptr(), value.dtype
    return tuple(map(by_address, value)) if isinstance(value, (tuple, list)) else value


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setattr(replay, "_known", {})
    with active(Driver()) as driver:
        yield driver


def tokens(*shape: int, offset: int = 0) -> Tensor:
    """``[B, H, N, D]`` in memory of ``[B, N, H, D]``, moved by ``offset`` elements."""
    batch, heads, number, head_dim = shape
    memory = torch.randn(batch * number * heads * head_dim + offset).to(F16)[offset:]
    return memory.view(batch, number, heads, head_dim).transpose(1, 2)


def forward(inputs: AttentionInputs) -> tuple[Callable[..., list[Launch]], Call]:
    return attention._forward_launches, (inputs, attention._allocate(inputs, 90), 90)


def backward(inputs: AttentionInputs, grad_output: Tensor | None = None) -> tuple[Callable[..., list[Launch]], Call]:
    statistics = (torch.randn(inputs.query.shape[:3]) for _ in range(3))
    gradients = (empty_output(inputs.query) for _ in range(3))
    grad_output = tokens(*inputs.query.shape) if grad_output is None else grad_output
    return attention._backward_launches, (inputs, empty_output(inputs.query), *statistics, grad_output, *gradients, 90)


def plain(number: int = 22, offset: int = 0, dtype: torch.dtype = F16, **changes: Any) -> AttentionInputs:
    query, key, value = (tokens(2, 2, number, 16, offset=offset).to(dtype) for _ in range(3))
    return AttentionInputs(query, key, value, scale=0.25, num_prefix_tokens=5)._replace(**changes)


def packed() -> AttentionInputs:
    query, key, value = (tokens(1, 2, 44, 16) for _ in range(3))
    bounds = torch.tensor([0, 22, 44], dtype=torch.int32)
    return AttentionInputs(query, key, value, cu_seqlens=bounds, max_seqlen=22, num_prefix_tokens=5)


def twice() -> AttentionInputs:
    same = tokens(2, 2, 22, 16)
    return plain(query=same, key=same)


def norm_backward(inputs: NormGradInputs, gradients: NormGradients) -> tuple[Callable[..., list[Launch]], Call]:
    return residual_norm._backward_launches, (inputs, gradients, residual_norm.empty_sums(inputs, gradients))


def norm_inputs() -> NormInputs:
    x, branch = torch.randn(2, 2, 7, 48).to(F16)
    scale, weight, bias = torch.randn(3, 48).to(F16)
    return NormInputs(x, branch, scale, torch.ones(2).to(F16), weight, bias, 1e-6, False, F16)


def norm_grad_inputs() -> tuple[NormGradInputs, NormGradients]:
    grad_residual, grad_normalized, residual, branch, grad_x, grad_branch = torch.randn(6, 2, 7, 48).to(F16)
    scale, weight, *of_parameters = torch.randn(5, 48).to(F16)
    mean, rstd = torch.randn(2, 2, 7)
    inputs = NormGradInputs(grad_residual, grad_normalized, residual, mean, rstd, branch, scale, None, weight)
    return inputs, NormGradients(grad_x, grad_branch, *of_parameters)


def assemble_inputs() -> AssembleInputs:
    def empty(*shape: int) -> Tensor:
        return torch.randn(shape).to(F16)

    return AssembleInputs(empty(2, 48, 9).transpose(1, 2), empty(1, 1, 48), empty(1, 4, 48), empty(1, 10, 48), F16)


def assemble_gradients() -> Call:
    inputs = assemble_inputs()
    gradients = AssembleGradients(*(torch.empty(rows, 48).to(F16) for rows in (1, 4, 10)))
    return torch.randn(2, 14, 48).to(F16), sizes_of(*inputs), gradients


def counted() -> Call:
    norms = torch.rand(2, 14)
    into = NormDistribution.zeros((3,), "cpu")
    return norms, TokenLayout(9), into, token_norms.empty_partial(norms)


CALLS: dict[str, Callable[[], tuple[Callable[..., list[Launch]], Call]]] = {
    "forward": lambda: forward(plain()),
    "forward, the query given as the key too": lambda: forward(twice()),
    "forward, another shape": lambda: forward(plain(40)),
    "forward, another dtype": lambda: forward(plain(dtype=torch.bfloat16)),
    "forward, another alignment": lambda: forward(plain(offset=1)),
    "forward, other outputs": lambda: forward(plain(outputs=("lse", "token_norms"))),
    "forward, all outputs": lambda: forward(plain(70, outputs=OUTPUT_NAMES)),
    "forward, another scale": lambda: forward(plain(scale=-0.5)),
    "forward, packed": lambda: forward(packed()),
    "forward, rope": lambda: forward(plain(rope=Rope(*torch.randn(2, 17, 16).to(F16)))),
    "forward, mask": lambda: forward(plain(attn_mask=torch.rand(2, 1, 1, 22) < 0.5)),
    "forward, one mask for all": lambda: forward(plain(attn_mask=torch.rand(1, 1, 1, 22) < 0.5)),
    "backward": lambda: backward(plain()),
    "backward, the query given as the key too": lambda: backward(twice()),
    "backward, of a sum": lambda: backward(plain(), torch.ones(1, dtype=F16).expand(2, 2, 22, 16)),
    "backward, packed": lambda: backward(packed()),
    "backward, rope": lambda: backward(plain(rope=Rope(*torch.randn(2, 17, 16).to(F16), interleaved=True))),
    "residual_norm": lambda: (
        residual_norm._forward_launches,
        ((inputs := norm_inputs()), residual_norm._allocate(inputs)),
    ),
    "residual_norm, backward": lambda: norm_backward(*norm_grad_inputs()),
    "token_norms": lambda: (token_norms._norms_launches, (torch.randn(2, 7, 48), torch.empty(2, 7))),
    "token_norms, counting": lambda: (token_norms._counting_launches, counted()),
    "assemble": lambda: (assemble._forward_launches, (assemble_inputs(), torch.empty(2, 14, 48).to(F16))),
    "assemble, backward": lambda: (assemble._backward_launches, assemble_gradients()),
}


def test_a_call_that_comes_again_launches_what_it_would_if_described_anew(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls on new tensors, all of them known by now, each between others."""
    for make in CALLS.values():
        driver.launches_of(*make())

    def refuse(*_: Any) -> None:
        pytest.fail("this call was known")

    for name, make in CALLS.items():
        describe, call = make()
        with recording(run=True) as described:
            expected = driver.launches_of(describe, call)
        with monkeypatch.context() as known:
            known.setattr(Launch, "run", refuse)
            actual = driver.launches_of(describe, call)
        assert len(expected) == len(described) > 0
        for (*launched, _, arguments), (*launched_anew, _, arguments_anew) in zip(actual, expected, strict=True):
            assert (launched, arguments) == (launched_anew, arguments_anew), name


@triton.jit
def _copy_kernel(x, out, LENGTH: tl.constexpr):
    column = tl.arange(0, LENGTH)
    tl.store(out + column, tl.load(x.pointer + column * x.strides[0]))


def copy(x: Tensor, out: Tensor) -> list[Launch]:
    return [Launch(_copy_kernel, (1,), {"x": strided(x), "out": out}, {"LENGTH": 16}, 1, 1)]


def copy_by_way_of_another(x: Tensor, out: Tensor) -> list[Launch]:
    return copy(x.clone(), out)


def copy_nothing(x: Tensor, out: Tensor) -> list[Launch]:
    return [copy(x, out)[0]._replace(grid=(0,))]


def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(16), torch.empty(16)


@pytest.mark.parametrize("first", [0, 1], ids=["two tensors first", "one tensor first"])
def test_the_launcher_is_given_the_tensors_of_this_call(driver: Driver, first: int) -> None:
    """Whether or not, of this call or of the one before, one tensor is given in both places."""
    same = torch.randn(16)
    for x, out in (pair(), (same, same), pair(), (same, same))[first:]:
        ((*_, ((pointer, strides), destination, length)),) = driver.launches_of(copy, (x, out))
        assert pointer[1] == x.data_ptr()
        assert destination[1] == out.data_ptr()
        assert (strides, length) == ((1,), 16)
    assert len(replay._known) == 1


def test_calls_of_another_description(driver: Driver) -> None:
    for describe, launches in ((copy, 1), (copy_nothing, 0), (copy, 1), (copy_nothing, 0)):
        assert len(driver.launches_of(describe, pair())) == launches
    assert len(replay._known) == 2


def test_tensors_that_are_no_part_of_the_call_are_not_remembered(driver: Driver) -> None:
    for _ in range(2):
        assert len(driver.launches_of(copy_by_way_of_another, pair())) == 1
    assert not replay._known


def test_no_tensor_is_kept(driver: Driver) -> None:
    x, out = pair()
    driver.launches_of(copy, (x, out))
    kept = weakref.ref(x), weakref.ref(out)
    storages = [weakref.ref(t.untyped_storage()) for t in (x, out)]
    del x, out
    gc.collect()
    assert [ref() for ref in (*kept, *storages)] == [None] * 4


def test_a_grid_without_programs(driver: Driver) -> None:
    with recording(run=True) as launches:
        assert driver.launches_of(copy_nothing, pair()) == []
    assert launches == []


def test_the_current_stream(driver: Driver) -> None:
    for driver.stream in (0, 7, 0):
        ((_, _, stream, *_),) = driver.launches_of(copy, pair())
        assert stream == driver.stream


def test_hooks_are_told(driver: Driver) -> None:
    driver.launches_of(copy, pair())
    told: list[str] = []

    def hook(metadata: Any) -> None:
        told.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        ((_, _, _, (enter, _), _),) = driver.launches_of(copy, pair())
        assert enter is knobs.runtime.launch_enter_hook
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    ((_, _, _, (enter, _), _),) = driver.launches_of(copy, pair())
    assert enter is None


def test_settings_that_launches_depend_on(driver: Driver) -> None:
    for setting in ("ieee", "tf32", "ieee"):
        run_launches(copy, *pair(), depends_on=setting)
    assert len(replay._known) == 2


def test_few_calls_are_remembered(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST_CALLS", 3)
    for step in range(1, 9):
        run_launches(copy, torch.randn(16 * step)[::step], torch.empty(16))
        assert 0 < len(replay._known) <= 3


@pytest.mark.parametrize("run", [False, True])
def test_recorded_launches_are_described_anew(driver: Driver, run: bool) -> None:
    driver.launches_of(copy, pair())
    x, out = pair()
    with recording(run=run) as launches:
        seen = driver.launches_of(copy, (x, out))
    assert [launch.arguments["x"].pointer for launch in launches] == [x]
    assert len(seen) == run
    assert len(driver.launches_of(copy, pair())) == 1
