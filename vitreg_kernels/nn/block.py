"""The pre-norm block, its adds and norms fused: within the block, and from one block to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..ops.catalogue import backend_by_op
from ..ops.residual_norm.types import ResidualNorm
from .attention import RegisterAttention
from .hooks import untouched
from .mlp import Mlp, SwiGLU
from .tracing import as_leaf, traced

if TYPE_CHECKING:
    from ..ops.attention.types import AttentionOutputs, Rope

_MLPS = {"gelu": Mlp, "swiglu": SwiGLU}


class Residual(NamedTuple):
    """The residual stream with a branch that is not added yet, so that the next norm can add it in its own pass.

    Attributes:
        x: ``[B, N, C]``, the stream before the branch.
        branch: ``[B, N, C]``, what attention or the MLP gave; ``None`` if nothing is to be added.
        layer_scale: ``[C]``, LayerScale's factor on the branch, or ``None``.
        drop_path: ``[B]``, stochastic depth's factor on each image's branch, or ``None``.
    """

    x: Tensor
    branch: Tensor | None = None
    layer_scale: Tensor | None = None
    drop_path: Tensor | None = None

    def added(self) -> Tensor:
        """The stream, ``x + drop_path * layer_scale * branch``, in the dtype of x."""
        if self.branch is None:
            return self.x
        branch, factor = self.branch, self.layer_scale
        if self.drop_path is not None:
            each = self.drop_path[:, None, None]
            branch, factor = (branch, each) if factor is None else (branch * each, factor)
        total = self.x + branch if factor is None else torch.addcmul(self.x, branch, factor)
        return total.to(self.x.dtype)


class ResidualLayerNorm(nn.LayerNorm):
    """LayerNorm that first adds what a ``Residual`` carries: one ``functional.residual_layer_norm``.

    Called with a tensor, it is a plain LayerNorm; see ``normed``. ``torch.fx`` takes it as a leaf.

    Args:
        dim: C, channels of a token.
        eps: added to the variance.
        backend: the op's, or a mapping with one for ``"residual_norm"``; ``None`` takes the default.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        backend: str | Mapping[str, str | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.backend = backend_by_op(backend, ("residual_norm",))["residual_norm"]

    def forward(self, stream: Tensor | Residual) -> Tensor | ResidualNorm:
        """The stream with its branch added, its LayerNorm, and the norm of each token; of a tensor its LayerNorm."""
        if traced(stream):
            return as_leaf(self, stream)
        given = stream if isinstance(stream, Residual) else Residual(stream)
        result = functional.residual_layer_norm(
            **given._asdict(), weight=self.weight, bias=self.bias, eps=self.eps, backend=self.backend
        )
        return result if isinstance(stream, Residual) else result.normalized


def normed(norm: nn.Module, stream: Residual, *, plain: bool = False) -> ResidualNorm:
    """``norm(stream)``; or the same with ``norm`` called with and giving a tensor.

    That is if ``plain``, as a traced stream needs it, or if ``norm`` is hooked, is of another class or has a forward of
    its own.
    """
    if not plain and isinstance(norm, ResidualLayerNorm) and untouched(norm):
        return norm(stream)
    x = stream.added()
    return ResidualNorm(x, norm(x), _token_norms(x))


@torch.fx.wrap  # it reads the shape of its input, and so is a leaf of torch.fx
def _token_norms(x: Tensor) -> Tensor:
    return functional.token_norms(x)


class LayerScale(nn.Module):
    """A learnt factor a channel on a branch (Touvron et al., arXiv 2103.17239).

    Whoever adds the branch applies it, and calls this module only if it is hooked or has a forward of its own.

    Args:
        dim: C.
        initial: value the factors start from.
        device, dtype: of the parameter.
    """

    def __init__(
        self,
        dim: int,
        initial: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to its initial value."""
        nn.init.constant_(self.gamma, self.initial)

    def forward(self, branch: Tensor) -> Tensor:
        """``branch * gamma`` in the dtype of the branch ``[..., C]``."""
        return (branch * self.gamma).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, initial={self.initial}"


class RegisterBlock(nn.Module):
    """``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``, with the parameter names of timm and DINOv2.

    Every add, LayerScale, stochastic depth, LayerNorm and token norm is one ``functional.residual_layer_norm``. The one
    at the end of a block belongs with the first norm of the next: a stack of blocks hands a ``Residual`` along, and
    whoever wants the stream itself calls its ``added()``.

    ``residual_norms`` is called with the L2 norms ``[B, N]`` of the tokens the block receives, before ``norm1``: a
    forward hook on it sees them at no cost.

    Hooks on a module itself, forward and backward, see what those on timm's modules see. ``norm1``, ``norm2``, ``ls1``
    and ``ls2``, fused into that one call otherwise, are called with plain tensors for as long as they have a hook or a
    forward of their own, and so is another module in their place; attention's own are told of at ``RegisterAttention``.
    A hook on the block itself sees what the block is called with and gives, which a ``RegisterViT`` makes the stream
    ``[B, N, C]``. Hooks on all modules, as of ``torch.nn.modules.module.register_module_forward_hook``, see the fused
    calls: ``Residual`` and ``ResidualNorm``. Under autocast the norms give its dtype, where timm's give fp32. Register
    hooks before compiling, and after tracing with ``torch.fx``, which takes the block as a leaf.

    Args:
        dim: C, channels in and out; a multiple of ``num_heads``.
        num_heads: H.
        num_registers, num_cls_tokens: the prefix in front of the patches.
        mlp: ``"gelu"`` or ``"swiglu"``.
        hidden_dim: channels between the two linear layers of the MLP; ``None`` for ``4 * dim``.
        qkv_bias, proj_bias: whether attention's projections have a bias.
        qk_norm: LayerNorm of queries and keys, head by head.
        layer_scale: initial value of LayerScale's factors; ``None`` for no LayerScale.
        drop_path: probability that a branch leaves an image out, drawn for each image and branch, in training only
            (Huang et al., arXiv 1603.09382).
        attn_drop, proj_drop: dropout of attention weights, and after attention's projection and both linear layers of
            the MLP; in training only.
        eps: of the LayerNorms.
        backend: a name, for attention and for the norms if they have one of that name, or a mapping with one for
            ``"attention"``, ``"residual_norm"`` or both; ``None`` takes the default of each.
        device, dtype: of the parameters.

    Raises:
        ValueError: if ``mlp`` is neither, ``drop_path`` is not a probability below 1, or as ``RegisterAttention``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_registers: int = 4,
        num_cls_tokens: int = 1,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        hidden_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = 1e-5,
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        backend: str | Mapping[str, str | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mlp not in _MLPS:
            raise ValueError(f"mlp must be one of {', '.join(map(repr, _MLPS))}, not {mlp!r}")
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must be at least 0 and below 1, not {drop_path}")
        factory = {"device": device, "dtype": dtype}
        backend = backend_by_op(backend, ("attention", "residual_norm"))
        norm = partial(ResidualLayerNorm, dim, eps=eps, backend=backend["residual_norm"], **factory)
        self.drop_path = drop_path

        self.residual_norms = nn.Identity()
        self.norm1 = norm()
        self.attn = RegisterAttention(
            dim,
            num_heads,
            num_registers=num_registers,
            num_cls_tokens=num_cls_tokens,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=partial(nn.LayerNorm, eps=eps),
            backend=backend["attention"],
            **factory,
        )
        self.ls1 = None if layer_scale is None else LayerScale(dim, layer_scale, **factory)
        self.norm2 = norm()
        self.mlp = _MLPS[mlp](dim, hidden_dim or 4 * dim, drop=proj_drop, **factory)
        self.ls2 = None if layer_scale is None else LayerScale(dim, layer_scale, **factory)

    def forward(
        self, x: Tensor | Residual, rope: Rope | None = None, *, outputs: Sequence[str] = ()
    ) -> Tensor | Residual | tuple[Tensor | Residual, AttentionOutputs]:
        """Run the block.

        Args:
            x: the stream ``[B, N, C]``, or one whose last branch is still to be added.
            rope: rotation of the patch tokens.
            outputs: attention's statistics to return, names of the fields of ``AttentionOutputs``.

        Returns:
            What was given: the stream for the stream, a ``Residual`` that carries the MLP's branch for a ``Residual``.
            ``(that, AttentionOutputs)`` if ``outputs`` names any.

        Raises:
            ValueError: if x has another rank, other channels or fewer tokens than the prefix.
        """
        if traced(x):
            return as_leaf(self, x, rope=rope, outputs=outputs)
        parts = self._modules  # quicker to ask than self; what is None may not be there
        fused = isinstance(x, Residual)
        residual, normalized, token_norms = normed(parts["norm1"], x if fused else Residual(x))
        parts["residual_norms"](token_norms)
        attended = parts["attn"](normalized, rope=rope, outputs=outputs)
        attended, statistics = attended if outputs else (attended, None)
        residual, normalized, _ = normed(parts["norm2"], self._adding(residual, attended, parts.get("ls1")))
        stream = self._adding(residual, parts["mlp"](normalized), parts.get("ls2"))
        if not fused:
            result = stream.added()
        elif stream.layer_scale is None:
            result = stream
        else:  # a copy, because FSDP2 frees a block's parameters when the block ends
            result = stream._replace(layer_scale=stream.layer_scale.clone())
        return (result, statistics) if outputs else result

    def _adding(self, x: Tensor, branch: Tensor, scale: nn.Module | None) -> Residual:
        drop_path = None
        if self.training and self.drop_path:
            keep = 1.0 - self.drop_path
            dtype = torch.promote_types(x.dtype, torch.float32)  # 1 / keep unrounded
            drop_path = torch.empty(x.shape[0], device=x.device, dtype=dtype).bernoulli_(keep) / keep
        if scale is None:
            return Residual(x, branch, None, drop_path)
        if type(scale) is LayerScale and untouched(scale):
            return Residual(x, branch, scale.gamma, drop_path)
        return Residual(x, scale(branch), None, drop_path)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}" if self.drop_path else ""
