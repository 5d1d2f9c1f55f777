"""What one call ought to give, whichever op it is of, and how near each tensor of a backend comes to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import dispatch
from ..dispatch import Request
from ..ops.catalogue import OPS
from .accuracy import Accuracy, compare

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an op, with the gradients that come back to its outputs.

    Attributes:
        name: what it exercises; no two calls of an op's cases share one.
        request: what it needs of a backend; names the op.
        function: ``function(backend=, **arguments)`` gives every output, gradient and statistic by name.
        arguments: all but the backend. Tensors may lie in dicts and named tuples.
        terms: K of the accuracy rule, by the name of a tensor.
        same_scale: tensors that are made of the same rounded terms, so that the errors of all scale with the largest.
    """

    name: str
    request: Request
    function: Callable[..., Tensors]
    arguments: Mapping[str, Any]
    terms: Callable[[str], int]
    same_scale: tuple[str, ...] = ()

    def run(self, backend: str) -> Tensors:
        """What a backend makes of it.

        Raises:
            UnsupportedError: if the backend cannot serve it.
        """
        return self.function(backend=backend, **self.arguments)

    def reasons_against(self, backend: str) -> list[str]:
        """Why a backend cannot serve it, as sentences; empty if it can."""
        return dispatch.find(OPS[self.request.op].backends, backend).reasons_against(self.request)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with ``change`` made to its floating-point tensors; masks of bool and indices stay."""

        def changed(x: Tensor) -> Tensor:
            return change(x) if x.is_floating_point() else x

        return replace(self, arguments=tree_map_only(Tensor, changed, dict(self.arguments)))


class Oracle:
    """The reference's answer to a call in fp64, which is exact, and in the call's own dtype, which bounds the error.

    Args:
        call: any call that the reference serves; it is run twice, here and now.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.eager = call.run("reference")
        self.exact = call.changed(Tensor.double).run("reference")

    @classmethod
    def of_parts(cls, call: Call, parts: Sequence[Call], count: int) -> Oracle:
        """The answer to a call of ``count`` images, which are those of ``parts`` one after another, again and again.

        Only the parts are run, one at a time; every tensor of theirs has a row for its image.
        """
        oracle = cls.__new__(cls)
        oracle.call = call
        answers = [cls(part) for part in parts]
        order = torch.arange(count) % len(parts)
        for kind in ("eager", "exact"):
            of_parts = [getattr(answer, kind) for answer in answers]
            whole = {name: torch.cat([its[name] for its in of_parts]) for name in of_parts[0]}
            setattr(oracle, kind, {name: x[order.to(x.device)] for name, x in whole.items()})
        return oracle

    def errors(self, backend: str) -> dict[str, Accuracy]:
        """A backend's errors by tensor; raises as ``run`` does."""
        return self.compare(self.run(backend))

    def run(self, backend: str) -> Tensors:
        """What a backend makes of the call, by the names that ``compare`` takes.

        Raises:
            UnsupportedError: if the backend cannot serve the call.
            ValueError: if it leaves something out.
        """
        tensors = self.call.run(backend)
        if tensors.keys() != self.exact.keys():
            raise ValueError(f"{backend} gave {sorted(tensors)} where {sorted(self.exact)} were asked for")
        return tensors

    def compare(self, tensors: Tensors) -> dict[str, Accuracy]:
        """Errors of any of the outputs, gradients and statistics that the reference gives."""
        same_scale = [self.exact[name] for name in self.call.same_scale if name in self.exact]
        largest = max(same_scale, key=lambda x: x.abs().max(), default=None)
        return {
            name: compare(
                tensor,
                self.exact[name],
                self.eager[name],
                terms=self.call.terms(name),
                scale_of=largest if name in self.call.same_scale else None,
            )
            for name, tensor in tensors.items()
        }


def outputs_and_gradients(function: Callable[..., Tensors], inputs: Tensors, upstream: Tensors) -> Tensors:
    """The outputs of ``function(**inputs)`` and, named ``grad_...``, the gradients of its inputs.

    Args:
        function: gives outputs by name.
        inputs: by name; none of them is touched.
        upstream: gradients by output; those that are named alone send one back. If there is none, no graph is made.
    """
    inputs = {name: x.detach().requires_grad_(bool(upstream)) for name, x in inputs.items()}
    outputs = function(**inputs)
    found = {name: x.detach() for name, x in outputs.items()}
    if upstream:
        ends = [outputs[name] for name in upstream]
        gradients = torch.autograd.grad(ends, list(inputs.values()), list(upstream.values()))
        found |= {f"grad_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return found


def with_defaults(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """All arguments of a public function but the backend: those given, and the defaults of the others."""
    bound = inspect.signature(function).bind(**arguments)
    bound.apply_defaults()
    return {name: x for name, x in bound.arguments.items() if name != "backend"}
