"""What is calibrated: calls of the four ops, of sizes that are named or that a model makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ...dispatch import Request
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
from ..poison import copied

NUM_PREFIX_TOKENS = 5  # CLS and four registers

_FEWEST_CHANNELS = 16
_KINDS = {"cu_seqlens": "packed images", "rope": "rope", "attn_mask": "masked"}  # options in words

# What a second run would not repeat, and calls that somebody watches.
_NOT_CALIBRATED = (attention_features.DROPOUT, attention_features.MASK_GRADIENT, *observers.ALL)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One call of an op, on random numbers.

    Attributes:
        op: the op's name.
        size: in words.
        tokens, heads: of a call, as ``tables.size_of`` takes them.
        make: ``make(gradients)`` gives the call, with or without its backward.
        variant: as of ``dispatch.Workload``.
        has_gradients: whether the op has any.
        images: how many there are, each of which the op serves by itself; 0 where the call has to be taken as a whole.
    """

    op: str
    size: str
    tokens: int
    heads: int
    make: Callable[[bool], Call]
    variant: str = ""
    has_gradients: bool = True
    images: int = 0

    @property
    def modes(self) -> tuple[bool, ...]:
        """Without gradients, and with them if there are any."""
        return (False, True) if self.has_gradients else (False,)

    def __str__(self) -> str:
        return f"{self.size}, {self.variant}" if self.variant else self.size


def of_shape(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, rope: bool = False, mask: bool = False
) -> list[Subject]:
    """What a block of a ViT calls whose attention has query ``[B, H, N, D]``.

    Attention both of a packed projection, as ``RegisterAttention`` calls it, and of separate query, key and value.

    Args:
        shape: B, H, N, D.
        dtype: of all tensors.
        device: where they are.
        rope: whether the patches are rotated.
        mask: whether keys are padding.

    Raises:
        ValueError: if that is no shape of a query.
    """
    shape = tuple(shape)
    if len(shape) != 4 or min(shape) < 1 or shape[1] * shape[3] < _FEWEST_CHANNELS:
        raise ValueError(
            f"a shape must be that of a query, B,H,N,D, each at least 1 and H * D at least {_FEWEST_CHANNELS}; got "
            f"{','.join(map(str, shape))}"
        )
    batch, heads, tokens, head_dim = shape
    prefix = min(NUM_PREFIX_TOKENS, tokens - 1)
    channels = heads * head_dim
    numbers = _numbers(device)
    turned = None
    if rope:
        angles = numbers(tokens - prefix, head_dim // 2).repeat(1, 2)
        turned = Rope(angles.cos(), angles.sin())
    padding = None
    if mask:
        padding = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=device)
        padding[:, :, :, tokens - tokens // 8 :] = False
    options = {"num_prefix_tokens": prefix, "rope": turned, "attn_mask": padding}
    x = (batch, tokens, channels)
    norm = {name: numbers(channels).to(dtype) for name in ("weight", "bias", "layer_scale")}
    parameters = {"cls_token": numbers(1, 1, channels), "pos_embed": numbers(1, tokens - prefix, channels)}
    if prefix > 1:
        parameters["register_tokens"] = numbers(1, prefix - 1, channels)
    parameters = {name: parameter.to(dtype) for name, parameter in parameters.items()}
    return [
        *(_attention(shape, dtype, device, options, packed_projection=packed) for packed in (True, False)),
        _residual_norm(x, dtype, device, norm, branch=dtype, normalized=dtype),
        _token_norms(x, dtype, device),
        _assemble((batch, tokens - prefix, channels), dtype, device, parameters),
    ]


def of_model(model: nn.Module, batch: Tensor) -> list[Subject]:
    """What a model calls when it is run on a batch, each call once, in the order of the calls.

    The model is run once, without gradients and uncompiled, in the mode that it is in.
    """
    device = batch.device
    subjects: dict[Any, Subject] = {}

    def meet(request: Request, inputs: Any, qkv: Tensor | None = None) -> None:
        if set(request.features) & set(_NOT_CALIBRATED):
            return
        subject = _of_call(inputs, device, packed_projection=qkv is not None)
        subjects.setdefault((subject.op, str(subject), request._replace(workload=None)), subject)

    uncompiled = torch.compiler.set_stance("force_eager")
    with met(meet), torch.no_grad(), torch.random.fork_rng(), uncompiled:
        model(batch)
    return list(subjects.values())


@contextmanager
def met(meet: Callable[..., None]) -> Iterator[None]:
    """Within, ``meet`` is given the request and the arguments of whatever describes a call of any op.

    The functions that describe calls are replaced, so that no other call pays for being watched.
    """

    def watching(describe: Callable[..., Request]) -> Callable[..., Request]:
        def described(*arguments: Any) -> Request:
            request = describe(*arguments)
            meet(request, *arguments)
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
            stack.enter_context(mock.patch.object(module, name, watching(getattr(module, name))))
        yield


def part(call: Call, image: int) -> Call:
    """One image of a call whose tensors are of many."""
    return _of_images(call, lambda x: x[image : image + 1])


def repeating(call: Call, count: int) -> Call:
    """The call with its first ``count`` images again and again: what is right for these is right for all."""

    def repeated(x: Tensor) -> Tensor:
        again = copied(x)
        for image in range(count, len(x)):
            again[image] = x[image % count]
        return again

    return _of_images(call, repeated)


def _of_images(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """The call with those of its tensors changed that have a row an image."""
    count = call.arguments["qkv"].shape[0]

    def changed(x: Any) -> Any:
        if isinstance(x, Rope) and x.cos.ndim == 3 and x.cos.shape[0] == count:
            return Rope(change(x.cos), change(x.sin), x.interleaved)
        return change(x) if isinstance(x, Tensor) and x.ndim >= 4 and x.shape[0] == count else x

    return replace(call, arguments={name: changed(x) for name, x in call.arguments.items()})


def _of_call(inputs: Any, device: torch.device, *, packed_projection: bool) -> Subject:
    """The subject of a call that was met, with its rotation and masks but random numbers."""
    if isinstance(inputs, AttentionInputs):
        options = inputs._asdict()
        shape, dtype = tuple(inputs.query.shape), inputs.query.dtype
        for name in ("query", "key", "value"):
            del options[name]
        if inputs.cu_seqlens is None:
            del options["max_seqlen"]
        if inputs.attn_mask is not None:
            options["attn_mask"] = inputs.attn_mask.detach()  # a call that wants its gradient is another
        return _attention(shape, dtype, device, options, packed_projection=packed_projection)
    numbers = _numbers(device)
    if isinstance(inputs, NormInputs):
        given = {name: getattr(inputs, name) for name in ("weight", "bias", "layer_scale", "drop_path")}
        options = {n: numbers(*t.shape).to(t.dtype) for n, t in given.items() if t is not None}
        options |= {"eps": inputs.eps, "rms": inputs.rms}
        branch = None if inputs.branch is None else inputs.branch.dtype
        x = inputs.x
        return _residual_norm(tuple(x.shape), x.dtype, device, options, branch=branch, normalized=inputs.dtype)
    if isinstance(inputs, AssembleInputs):
        given = inputs._asdict()
        patches = given.pop("patches")
        del given["dtype"]
        options = {n: numbers(*t.shape).to(t.dtype) for n, t in given.items() if t is not None}
        return _assemble(tuple(patches.shape), patches.dtype, device, options)
    if inputs.ndim == 3:
        return _token_norms(tuple(inputs.shape), inputs.dtype, device)
    images, tokens = inputs.shape
    layout = TokenLayout(num_registers=min(4, tokens - 1))
    return Subject(
        op="token_norms",
        size=f"{images} x {tokens} norms, statistics, {short(inputs.dtype)}",
        tokens=tokens,
        heads=images,
        make=lambda gradients: token_norms.statistics_call(
            30 * _numbers(device)(images, tokens).to(inputs.dtype).abs(), layout
        ),
        has_gradients=False,
    )


def _attention(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
    *,
    packed_projection: bool,
) -> Subject:
    batch, heads, tokens, head_dim = shape
    packed = options.get("cu_seqlens") is not None
    images, longest = (len(options["cu_seqlens"]) - 1, options["max_seqlen"]) if packed else (batch, tokens)

    def make(gradients: bool) -> Call:
        numbers = _numbers(device, torch.randn)
        qkv = numbers(batch, tokens, 3, heads, head_dim).to(dtype)
        upstream = numbers(batch, tokens, heads, head_dim).to(dtype).transpose(1, 2) if gradients else None
        return attention.call(
            qkv, packed_projection=packed_projection, backward=gradients, grad_output=upstream, **options
        )

    kinds = [f"{images} x {heads} heads, {longest} tokens, head dim {head_dim}"]
    kinds += [kind for name, kind in _KINDS.items() if options.get(name) is not None]
    return Subject(
        op="attention",
        size=f"{', '.join(kinds)}, {short(dtype)}",
        tokens=longest,
        heads=images * heads,
        make=make,
        variant=attention_features.variant_of(
            packed_projection=packed_projection,
            statistics=bool(options.get("outputs")),
            tf32=dtype == torch.float32 and attention_features.tf32_is_allowed(device.type),
        ),
        images=0 if packed else batch,
    )


def _residual_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
    *,
    branch: torch.dtype | None,
    normalized: torch.dtype,
) -> Subject:
    def make(gradients: bool) -> Call:
        numbers = _numbers(device)
        upstream = {"residual": numbers(*shape).to(dtype), "normalized": numbers(*shape).to(normalized)}
        with torch.autocast(device.type, normalized, enabled=normalized != dtype):
            call = residual_norm.call(
                numbers(*shape).to(dtype),
                branch=None if branch is None else numbers(*shape).to(branch),
                upstream=upstream if gradients else {},
                **options,
            )
        return call if normalized == dtype else replace(call, function=_under_autocast(call, device, normalized))

    return Subject(
        op="residual_norm",
        size=_of_tokens(shape, dtype),
        tokens=shape[1],
        heads=shape[0],
        make=make,
        variant=residual_norm_features.variant_of(
            rms=options.get("rms", False),
            branch=branch,
            scaled="layer_scale" in options,
            dropped="drop_path" in options,
            normalized=normalized,
        ),
    )


def _under_autocast(call: Call, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    def under_autocast(**arguments: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return call.function(**arguments)

    return under_autocast


def _token_norms(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Subject:
    return Subject(
        op="token_norms",
        size=_of_tokens(shape, dtype),
        tokens=shape[1],
        heads=shape[0],
        make=lambda gradients: token_norms.call(_numbers(device)(*shape).to(dtype)),
        has_gradients=False,
    )


def _assemble(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, parameters: dict[str, Tensor]
) -> Subject:
    def make(gradients: bool) -> Call:
        return assemble.call(_numbers(device)(*shape).to(dtype), backward=gradients, **parameters)

    return Subject(op="assemble", size=_of_tokens(shape, dtype), tokens=shape[1], heads=shape[0], make=make)


def _numbers(device: torch.device, draw: Callable[..., Tensor] = torch.rand) -> Callable[..., Tensor]:
    """Draws numbers of any shape, the same in every run: normal ones, or between -2 and 2, see ``tensors.uniform``."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        drawn = draw(shape, generator=generator, device=device)
        return drawn if draw is torch.randn else drawn.mul_(4).sub_(2)

    return numbers


def _of_tokens(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{' x '.join(map(str, shape))}, {short(dtype)}"
