"""What the contract asks of an op: an adapter says how it is called, and everything else is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vitreg_kernels._triton.mode import INTERPRETING
from vitreg_kernels.dispatch import Backend, Request, Requirements
from vitreg_kernels.measure import accuracy

Call = dict[str, Any]  # arguments by name, all but the backend; tensors may lie in named tuples
Tensors = dict[str, Tensor]
Arrange = Callable[[Tensor], Tensor]


class Op(ABC):
    """One op. A spec is a named tuple of plain numbers, with ``batch`` and ``dtype``, and a ``str`` that tells them.

    Attributes:
        BACKENDS: the op's registry.
        KINDS: a call of every kind that all backends serve; the first is the fullest.
        TRACED: a call of which ``TOKENS`` alone have the size of the batch and of the sequence.
        INPUTS: tensors that gradients are asked of.
        TOKENS: inputs that are as large as the batch: those that may be anywhere in memory.
        OUTPUTS: outputs that carry gradients; all others are statistics.
        EXAMPLES: how many random calls are drawn.
        NAMESPACE: that its operators have in ``torch.ops``.
        OUTPUTS_SHARE_MEMORY: whether outputs are views of one tensor.
        TRACED_AS_ANOTHER: whether the compiler sees the same of it as of another op of the list.
    """

    BACKENDS: ClassVar[Sequence[Backend]]
    KINDS: ClassVar[Sequence[Any]]
    TRACED: ClassVar[Any]
    INPUTS: ClassVar[tuple[str, ...]]
    TOKENS: ClassVar[tuple[str, ...]]
    OUTPUTS: ClassVar[tuple[str, ...]]
    EXAMPLES: ClassVar[int] = 100
    NAMESPACE: ClassVar[str] = "vitreg"
    OUTPUTS_SHARE_MEMORY: ClassVar[bool] = False
    TRACED_AS_ANOTHER: ClassVar[bool] = False

    def __str__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def make_call(self, spec: Any) -> Call:
        """The tensors of a spec, from its seed."""

    @abstractmethod
    def outputs(self, backend: str | None, call: Call) -> Tensors:
        """What the public function gives, by name."""

    @abstractmethod
    def resized(self, spec: Any, batch: int, tokens: int) -> Any:
        """The spec with other sizes."""

    @abstractmethod
    def specs(self, serves: Requirements) -> st.SearchStrategy[Any]:
        """Any call that a backend declares to serve and whose eager formula makes an error to be measured by."""

    @abstractmethod
    def terms(self, call: Call, name: str) -> int:
        """K of the accuracy rule for an output, or for the gradient ``grad_...`` of an input."""

    def scale_of(self, exact: Tensors, name: str) -> Tensor | None:
        """What the rounding of an accumulator scales with, if not with the result."""
        return None

    def under_autocast(self, backend: str, call: Call, dtype: torch.dtype) -> Tensors:
        """The outputs that a call must give under autocast."""
        return self.outputs(backend, call)

    def statistic_dtype(self, name: str) -> torch.dtype:
        """Of an output without gradient, whatever the inputs' dtype but fp64."""
        return torch.float32

    def aliases(self, call: Call) -> set[str]:
        """Outputs that are an input."""
        return set()

    def traced(self, backend: Backend, spec: Any) -> bool:
        """Whether torch.compile can trace the call."""
        return True

    @property
    def backends(self) -> list[Backend]:
        """Those held to the contract in this process: the Triton kernels in the interpreter's, else all others."""
        plain = Request("any", "cpu", 0, torch.float32, head_dim=16, channels=16)
        return [b for b in self.BACKENDS if (b.name == "triton") == INTERPRETING and not b.reasons_against(plain)]


def mapped(call: Mapping[str, Any], change: Arrange) -> Call:
    """A call with its floating-point tensors changed."""
    return tree_map_only(Tensor, lambda x: change(x) if x.is_floating_point() else x, dict(call))


def run(
    op: Op,
    backend: str | None,
    call: Call,
    *,
    inputs: Sequence[str] | None = None,
    at: Sequence[str] | None = None,
    arrange: Arrange = lambda x: x,
    function: Callable[..., Tensors] | None = None,
) -> Tensors:
    """Outputs and gradients by name.

    Args:
        op, backend, call: what runs.
        inputs: whose gradients are asked for; by default all.
        at: outputs that a gradient arrives at; by default all.
        arrange: lays the upstream gradients out in memory.
        function: runs instead of ``op.outputs``.
    """
    leaves = {name: call[name].detach().requires_grad_() for name in inputs or op.INPUTS if name in call}
    outputs = (function or op.outputs)(backend, call | leaves)
    found = {name: x.detach() for name, x in outputs.items()}
    ends = {name: outputs[name] for name in at or op.OUTPUTS if outputs[name].requires_grad}
    if not ends:
        return found
    upstream = [arrange(_upstream(name, x, call[op.TOKENS[0]].dtype)) for name, x in ends.items()]
    gradients = torch.autograd.grad(list(ends.values()), list(leaves.values()), upstream, allow_unused=True)
    return found | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def _upstream(name: str, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers that the dtype of a call can hold, so that they are the same where the call is repeated in fp64."""
    generator = torch.Generator().manual_seed(len(name))
    numbers = torch.randn(output.shape, generator=generator)
    return numbers.to(torch.float16 if dtype == torch.float64 else dtype).to(output.dtype)


def errors(op: Op, calls: Sequence[Call], results: Sequence[Tensors]) -> list[str]:
    """The tensors that break the accuracy rule, each with its errors.

    A small tensor may owe its eager error to luck: the results of some calls, alike but for their random numbers, are
    judged as one.
    """
    eager = _pooled([run(op, "reference", call) for call in calls])
    exact = _pooled([run(op, "reference", mapped(call, Tensor.double)) for call in calls])
    found = _pooled(results)
    assert found.keys() == exact.keys()
    broken = []
    for name, x in found.items():
        if not x.is_floating_point():
            broken += [] if torch.equal(x, exact[name]) else [f"{name} is another count"]
            continue
        terms, scale_of = op.terms(calls[0], name), op.scale_of(exact, name)
        judged = accuracy.compare(x, exact[name], eager[name], terms=terms, scale_of=scale_of)
        broken += [] if judged.passed else [f"{name}: {judged}"]
    return broken


def _pooled(results: Sequence[Tensors]) -> Tensors:
    return {name: torch.cat([result[name].flatten() for result in results]) for name in results[0]}
