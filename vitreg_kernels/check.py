"""Accuracy of the backends on this machine: the measurement behind ``vitreg check``, the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional
from .accuracy import Accuracy, compare
from .ops.attention.api import explain
from .ops.attention.backends import BACKENDS
from .ops.attention.types import OUTPUT_NAMES, Rope

GRADIENTS = ("grad_query", "grad_key", "grad_value")


class Case(NamedTuple):
    """A call to check.

    Attributes:
        name: what it exercises.
        qkv: ``[B, N, 3, H, D]``; query, key and value are views of it.
        options: further arguments of ``register_attention``.
    """

    name: str
    qkv: Tensor
    options: dict[str, Any]


class Result(NamedTuple):
    """One case on one backend.

    Attributes:
        backend, case, dtype: what ran.
        errors: by tensor (the output, gradients, statistics); empty if there are none.
        reasons: why the backend does not serve the case.
        crash: what it raised although it said that it serves the case.
    """

    backend: str
    case: str
    dtype: torch.dtype
    errors: dict[str, Accuracy]
    reasons: list[str]
    crash: str

    @property
    def failed(self) -> list[str]:
        """The tensors that break the accuracy rule, or what the backend raised."""
        broken = [name for name, accuracy in self.errors.items() if not accuracy.passed]
        return [*broken, *filter(None, [self.crash])]


class Yardstick:
    """What the output, the gradients and the statistics of one call ought to be, and how near each has to come.

    Args:
        qkv: ``[B, N, 3, H, D]``; query, key and value are views of it.
        backward: whether gradients count too.
        grad_output: the upstream gradient, ``[B, H, N, D]``; random by default.
        options: further arguments of ``register_attention``.
    """

    def __init__(
        self, qkv: Tensor, *, backward: bool = True, grad_output: Tensor | None = None, **options: Any
    ) -> None:
        self.qkv, self.options = qkv, options
        self.grad_output = grad_output
        if backward and grad_output is None:
            generator = torch.Generator(qkv.device).manual_seed(0)
            grad = torch.randn(qkv[:, :, 0].shape, generator=generator, device=qkv.device)
            self.grad_output = grad.to(qkv.dtype).transpose(1, 2)
        self.eager = _run("reference", qkv, self.grad_output, options)
        double = (None if x is None else x.double() for x in (qkv, self.grad_output))
        self.exact = _run("reference", *double, _in_double(options))

    def errors(self, backend: str) -> dict[str, Accuracy]:
        """A backend's errors by tensor; raises as ``run`` does."""
        return self.compare(self.run(backend))

    def run(self, backend: str) -> dict[str, Tensor]:
        """What a backend makes of the call, by the names that ``compare`` takes.

        Raises:
            UnsupportedError: if the backend cannot serve the call.
            ValueError: if it leaves something out.
        """
        tensors = _run(backend, self.qkv, self.grad_output, self.options)
        if tensors.keys() != self.exact.keys():
            raise ValueError(f"{backend} gave {sorted(tensors)} where {sorted(self.exact)} were asked for")
        return tensors

    def compare(self, tensors: dict[str, Tensor]) -> dict[str, Accuracy]:
        """Errors of any of ``output``, ``grad_query``, ``grad_key``, ``grad_value`` and the statistics asked for."""
        tokens, head_dim = self.qkv.shape[1], self.qkv.shape[-1]
        # The three gradients are made of the same rounded dS = P * (dP - delta), a difference that may all but vanish
        # (with one token it does), so their errors scale with the largest of the three.
        largest = max((self.exact[g] for g in GRADIENTS if g in self.exact), key=lambda g: g.abs().max(), default=None)
        return {
            name: compare(
                tensor,
                self.exact[name],
                self.eager[name],
                terms=tokens + head_dim,
                scale_of=largest if name in GRADIENTS else None,
            )
            for name, tensor in tensors.items()
        }


def check(backends: tuple[str, ...], device: str) -> Iterator[Result]:
    """Every case on every backend named, forward, backward and statistics; results come one by one."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in cases(dtype, device):
            yardstick = Yardstick(case.qkv, outputs=OUTPUT_NAMES, **case.options)
            for backend in backends:
                reasons = not_served(backend, case)
                errors, crash = {}, ""
                if not reasons:
                    try:
                        errors = yardstick.errors(backend)
                    except Exception as error:  # whatever a kernel raises, the other backends are still to be checked
                        crash = f"{type(error).__name__}: {error}"
                yield Result(backend, case.name, dtype, errors, reasons, crash)


def usable_backends(device: str) -> tuple[str, ...]:
    """Backends that can serve a plain fp32 call on a device, in the order of preference."""
    query = torch.empty(1, 1, 1, 64, device=device)
    return tuple(b.NAME for b in BACKENDS if not _reasons(b.NAME, query))


def not_served(backend: str, case: Case) -> list[str]:
    """Why a backend does not serve a case; empty if it does."""
    return _reasons(backend, *case.qkv.permute(2, 0, 3, 1, 4).unbind(0), **case.options)


def _reasons(backend: str, *qkv: Tensor, **options: Any) -> list[str]:
    return explain(*qkv, backend=backend, **options).reasons.get(backend, [])


def _run(backend: str, qkv: Tensor, grad_output: Tensor | None, options: dict[str, Any]) -> dict[str, Tensor]:
    qkv = qkv.detach().requires_grad_(grad_output is not None)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    result = functional.register_attention(query, key, value, backend=backend, **options)
    output, statistics = result if isinstance(result, tuple) else (result, None)
    tensors = {"output": output.detach()}
    if grad_output is not None:
        tensors |= zip(GRADIENTS, torch.autograd.grad(output, (query, key, value), grad_output), strict=True)
    if statistics is not None:
        tensors |= {name: x for name, x in statistics._asdict().items() if x is not None}
    return tensors


def _in_double(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    mask, rope = options.get("attn_mask"), options.get("rope")
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask.double()
    if rope is not None:
        options["rope"] = Rope(rope.cos.double(), rope.sin.double(), rope.interleaved)
    return options


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The named ViT shapes, and each feature of a call once."""
    generator = torch.Generator().manual_seed(0)

    def qkv(batch: int, tokens: int, heads: int = 2, head_dim: int = 64) -> Tensor:
        return torch.randn(batch, tokens, 3, heads, head_dim, generator=generator).to(device, dtype)

    for tokens in (1, 54, 201, 261, 1029, 1374):
        yield Case(f"{tokens} tokens", qkv(1, tokens), {"num_prefix_tokens": min(5, tokens)})
    for head_dim in (16, 72, 80, 128):
        yield Case(f"201 tokens, head dim {head_dim}", qkv(1, 201, 1, head_dim), {"num_prefix_tokens": 5})

    if dtype != torch.float32:
        # One token of norm 500 among tokens of norm 20: logits above a thousand. In fp32 the rule cannot hold for any
        # kernel that recomputes probabilities from a saved log-sum-exp, which fp32 resolves to 1e-4 there; the eager
        # formula keeps the probabilities themselves. Not in query and key at once, which overflows fp16's own logits.
        for i, name in enumerate(("query", "key", "value")):
            massive = qkv(8, 69)
            massive *= 20 / massive.float().norm(dim=-1, keepdim=True)
            massive[:, 41, i] *= 25
            yield Case(f"69 tokens, one {name} massive", massive, {"num_prefix_tokens": 5})

    keep = torch.rand(2, 1, 1, 201, generator=generator) > 0.3
    keep[1] = False
    yield Case(
        "201 tokens, padded, one image wholly", qkv(2, 201), {"num_prefix_tokens": 5, "attn_mask": keep.to(device)}
    )

    scattered = torch.rand(2, 2, 201, 201, generator=generator) > 0.3
    bias = torch.randn(1, 2, 201, 201, generator=generator).to(device, dtype)
    for name, mask in (("boolean mask", scattered.to(device)), ("additive mask", bias)):
        yield Case(f"201 tokens, {name}", qkv(2, 201), {"num_prefix_tokens": 5, "attn_mask": mask})

    angles = torch.rand(256, 32, generator=generator) * 6.28
    half = torch.cat((angles, angles), -1).to(device)
    pairs = angles.repeat_interleave(2, -1).to(device)
    for name, rope in (
        ("rope by halves", Rope(half.cos(), half.sin())),
        ("rope by pairs", Rope(pairs.cos(), pairs.sin(), interleaved=True)),
    ):
        yield Case(f"261 tokens, {name}", qkv(1, 261), {"num_prefix_tokens": 5, "rope": rope})

    lengths = torch.tensor([261, 261, 54, 54, 54])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device, torch.int32)
    yield Case("2 x 261 + 3 x 54 tokens, packed", qkv(1, 684, 1), {"num_prefix_tokens": 5, "cu_seqlens": cu_seqlens})
