"""What is calibrated: calls of the four ops, of sizes that are named or that a model makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ...layout import TokenLayout
from ...ops._shared import observers
from ...ops.assemble import features as assemble_features
from ...ops.assemble.types import AssembleInputs
from ...ops.attention import features as attention_features
from ...ops.attention.types import AttentionInputs, Rope
from ...ops.residual_norm import features as residual_norm_features
from ...ops.residual_norm.types import NormInputs
from ...ops.token_norms import features as token_norms_features
from ..cases import assemble, attention, residual_norm, token_norms
from ..cases.tensors import short
from ..oracle import Call

NUM_PREFIX_TOKENS = 5  # CLS and four registers

# Of attention, what no second run repeats or no timing of another mask tells.
_NOT_CALIBRATED = (attention_features.DROPOUT, attention_features.MASK_GRADIENT, *observers.ALL)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One call of an op, on random numbers.

    Attributes:
        op: the op's name.
        size: in words.
        tokens, heads: of a call, as ``tables.size_of`` takes them.
        make: ``make(gradients)`` gives the call, with or without its backward.
        has_gradients: whether the op has any.
        statistics: whether it asks for more than the output.
        images: those that the oracle is asked about, each by itself; none where it takes the call as a whole.
    """

    op: str
    size: str
    tokens: int
    heads: int
    make: Callable[[bool], Call]
    has_gradients: bool = True
    statistics: bool = False
    images: tuple[int, ...] = ()

    @property
    def modes(self) -> tuple[bool, ...]:
        """With gradients and without, as far as there are any."""
        return (False, True) if self.has_gradients else (False,)


def of_shape(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, rope: bool = False, mask: bool = False
) -> list[Subject]:
    """What a block of a ViT calls whose attention has query ``[B, H, N, D]``: one subject an op.

    Args:
        shape: B, H, N, D.
        dtype: of all tensors.
        device: where they are.
        rope: whether the patches are rotated.
        mask: whether keys are padding.

    Raises:
        ValueError: if the shape is none of attention.
    """
    shape = tuple(shape)
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"a shape is that of a query, B,H,N,D, each at least 1; got {','.join(map(str, shape))}")
    batch, heads, tokens, head_dim = shape
    prefix = min(NUM_PREFIX_TOKENS, tokens - 1)
    channels = heads * head_dim
    turned = None
    if rope:
        angles = torch.rand(tokens - prefix, head_dim // 2, device=device).repeat(1, 2)
        turned = Rope(angles.cos(), angles.sin())
    padding = None
    if mask:
        padding = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=device)
        padding[:, :, :, tokens - tokens // 8 :] = False
    numbers = _numbers(device)
    x = (batch, tokens, channels)
    norm = {name: numbers(channels).to(dtype) for name in ("weight", "bias", "layer_scale")}
    tokens_of = {"cls_token": numbers(1, 1, channels), "pos_embed": numbers(1, tokens - prefix, channels)}
    if prefix > 1:
        tokens_of["register_tokens"] = numbers(1, prefix - 1, channels)
    return [
        _attention(shape, dtype, device, {"num_prefix_tokens": prefix, "rope": turned, "attn_mask": padding}),
        _residual_norm(x, dtype, device, norm, branch=dtype),
        Subject(
            op="token_norms",
            size=_of_tokens(x, dtype),
            tokens=tokens,
            heads=batch,
            make=lambda gradients: token_norms.call(numbers(*x).to(dtype)),
            has_gradients=False,
        ),
        _assemble((batch, tokens - prefix, channels), dtype, device, {n: t.to(dtype) for n, t in tokens_of.items()}),
    ]


def of_model(model: nn.Module, batch: Tensor) -> list[Subject]:
    """What a model calls when it is run on a batch, each call once, in the order of the calls.

    The model is run once, without gradients and uncompiled, in the mode that it is in.
    """
    device = batch.device
    subjects: dict[Any, Subject] = {}
    uncompiled = torch.compiler.set_stance("force_eager")
    with recorded() as calls, torch.no_grad(), torch.random.fork_rng(), uncompiled:
        model(batch)
    for request, inputs in calls:
        if not set(request.features) & set(_NOT_CALIBRATED):
            subject = _of_call(inputs, device)
            if subject is not None:
                subjects.setdefault((subject.op, subject.size, request._replace(workload=None)), subject)
    return list(subjects.values())


@contextmanager
def recorded() -> Iterator[list[tuple[Any, Any]]]:
    """The calls of all ops meanwhile, each as its request and its validated inputs.

    The functions that describe calls are replaced within, so that no other call pays for being asked.
    """
    calls: list[tuple[Any, Any]] = []

    def recording(describe: Callable[..., Any]) -> Callable[..., Any]:
        def described(inputs: Any, *more: Any) -> Any:
            request = describe(inputs, *more)
            calls.append((request, inputs))
            return request

        return described

    describing = (
        (attention_features, "request_of"),
        (residual_norm_features, "request_of"),
        (assemble_features, "request_of"),
        (token_norms_features, "norms_request"),
        (token_norms_features, "statistics_request"),
    )
    with ExitStack() as stack:
        for module, name in describing:
            stack.enter_context(mock.patch.object(module, name, recording(getattr(module, name))))
        yield calls


def part(call: Call, image: int) -> Call:
    """One image of a call whose tensors are of many."""
    count = call.arguments["qkv"].shape[0]

    def of_image(x: Any) -> Any:
        if isinstance(x, Rope):
            return Rope(of_image(x.cos), of_image(x.sin), x.interleaved) if x.cos.ndim == 3 else x
        return x[image : image + 1] if isinstance(x, Tensor) and x.shape[0] == count else x

    return replace(call, arguments={name: of_image(x) for name, x in call.arguments.items()})


def _of_call(inputs: Any, device: torch.device) -> Subject | None:
    """The subject of a recorded call, with its rotation and masks but random numbers."""
    if isinstance(inputs, AttentionInputs):
        options = inputs._asdict()
        shape, dtype = inputs.query.shape, inputs.query.dtype
        for name in ("query", "key", "value"):
            del options[name]
        if inputs.cu_seqlens is None:
            del options["max_seqlen"]
        return _attention(tuple(shape), dtype, device, options)
    if isinstance(inputs, NormInputs):
        x = inputs.x
        numbers = _numbers(device)
        given = {name: getattr(inputs, name) for name in ("weight", "bias", "layer_scale", "drop_path")}
        options = {n: numbers(*t.shape).to(t.dtype) for n, t in given.items() if t is not None}
        options |= {"eps": inputs.eps, "rms": inputs.rms}
        branch = None if inputs.branch is None else inputs.branch.dtype
        autocast = None if inputs.dtype == x.dtype else inputs.dtype
        return _residual_norm(tuple(x.shape), x.dtype, device, options, branch=branch, autocast=autocast)
    if isinstance(inputs, AssembleInputs):
        numbers = _numbers(device)
        given = inputs._asdict()
        patches = given.pop("patches")
        del given["dtype"]
        options = {n: numbers(*t.shape).to(t.dtype) for n, t in given.items() if t is not None}
        return _assemble(tuple(patches.shape), patches.dtype, device, options)
    shape, dtype = tuple(inputs.shape), inputs.dtype
    numbers = _numbers(device)
    if inputs.ndim == 3:
        return Subject(
            op="token_norms",
            size=_of_tokens(shape, dtype),
            tokens=shape[1],
            heads=shape[0],
            make=lambda gradients: token_norms.call(numbers(*shape).to(dtype)),
            has_gradients=False,
        )
    layout = TokenLayout(num_registers=min(4, shape[1] - 1))
    return Subject(
        op="token_norms",
        size=f"{shape[0]} x {shape[1]} norms, statistics, {short(dtype)}",
        tokens=shape[1],
        heads=shape[0],
        make=lambda gradients: token_norms.statistics_call(30 * numbers(*shape).to(dtype).abs(), layout),
        has_gradients=False,
    )


def _attention(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, options: dict[str, Any]) -> Subject:
    batch, heads, tokens, head_dim = shape
    numbers = _numbers(device, torch.randn)
    packed = options.get("cu_seqlens") is not None
    images, longest = (len(options["cu_seqlens"]) - 1, options["max_seqlen"]) if packed else (batch, tokens)

    def make(gradients: bool) -> Call:
        qkv = numbers(batch, tokens, 3, heads, head_dim).to(dtype)
        upstream = numbers(batch, tokens, heads, head_dim).to(dtype).transpose(1, 2) if gradients else None
        return attention.call(qkv, backward=gradients, grad_output=upstream, **options)

    kinds = [f"{images} x {heads} heads, {longest} tokens, head dim {head_dim}"]
    if packed:
        kinds.append("packed")
    if options.get("rope") is not None:
        kinds.append("rope")
    if options.get("attn_mask") is not None:
        kinds.append("masked")
    if options.get("outputs"):
        kinds.append(f"with {' and '.join(options['outputs'])}")
    return Subject(
        op="attention",
        size=f"{', '.join(kinds)}, {short(dtype)}",
        tokens=longest,
        heads=images * heads,
        make=make,
        statistics=bool(options.get("outputs")),
        images=() if packed else tuple(sorted({0, batch // 2, batch - 1})),
    )


def _residual_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
    *,
    branch: torch.dtype | None,
    autocast: torch.dtype | None = None,
) -> Subject:
    numbers = _numbers(device)

    def make(gradients: bool) -> Call:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            call = residual_norm.call(
                numbers(*shape).to(dtype),
                branch=None if branch is None else numbers(*shape).to(branch),
                upstream={
                    "residual": numbers(*shape).to(dtype),
                    "normalized": numbers(*shape).to(autocast or dtype),
                }
                if gradients
                else {},
                **options,
            )
        return call if autocast is None else replace(call, function=_under_autocast(call.function, device, autocast))

    kinds = [_of_tokens(shape, dtype)]
    if autocast is not None:
        kinds.append(f"normalized in {short(autocast)}")
    return Subject(op="residual_norm", size=", ".join(kinds), tokens=shape[1], heads=shape[0], make=make)


def _under_autocast(function: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    def under_autocast(**arguments: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return function(**arguments)

    return under_autocast


def _assemble(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, parameters: dict[str, Tensor]
) -> Subject:
    numbers = _numbers(device)

    def make(gradients: bool) -> Call:
        return assemble.call(numbers(*shape).to(dtype), backward=gradients, **parameters)

    return Subject(op="assemble", size=_of_tokens(shape, dtype), tokens=shape[1], heads=shape[0], make=make)


def _numbers(device: torch.device, draw: Callable[..., Tensor] = torch.rand) -> Callable[..., Tensor]:
    """Numbers of any shape, the same in every run: normal ones, or between -2 and 2, see ``cases.tensors.uniform``."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        drawn = draw(shape, generator=generator, device=device)
        return drawn if draw is torch.randn else drawn.mul_(4).sub_(2)

    return numbers


def _of_tokens(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{' x '.join(map(str, shape))}, {short(dtype)}"
