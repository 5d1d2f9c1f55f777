"""Multi-head self-attention over ``[CLS | registers | patches]``, with timm's and DINOv2's parameter names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from .._symbolic import known
from ..layout import TokenLayout
from ..ops._shared.arguments import described, without_autocast
from ..ops.attention import reference
from ..ops.attention.features import DROPOUT
from ..ops.attention.types import unpack_qkv
from ..ops.attention.validation import validated
from ..ops.catalogue import backend_by_op, check_serves
from .hooks import does_nothing, only_drops
from .inputs import check_meets
from .tracing import as_leaf, traced

if TYPE_CHECKING:
    from ..ops.attention.types import AttentionOutputs, Rope


class RegisterAttention(nn.Module):
    """Self-attention of a Vision Transformer block, in place of timm's ``Attention`` or DINOv2's ``MemEffAttention``.

    Their state dicts load with no renaming; give ``qkv_bias``, ``qk_norm`` and ``proj_bias`` as the model has them
    (timm and DINOv2 models mostly set ``qkv_bias=True``, the default here).

    Hooks on a module itself, forward and backward, see what those on timm's modules see. One on ``attn_drop`` asks for
    the attention probabilities ``[B, H, N, N]``, which no fused kernel has: for as long as it is there, attention is
    computed by the formula, whatever the backend, and needs that memory; ``outputs=("prefix_attention",)`` gives those
    of the prefix tokens without. So it is with another module than a dropout in its place. Register hooks before
    compiling, and after tracing with ``torch.fx``, which takes the module as a leaf.

    Args:
        dim: C, channels in and out; a multiple of ``num_heads``.
        num_heads: H.
        num_registers, num_cls_tokens: the prefix in front of the patches, what ``rope`` leaves alone and
            ``"prefix_attention"`` reports; the plain output does not depend on them.
        qkv_bias, proj_bias: whether the two projections have a bias.
        qk_norm: normalise queries and keys by head with ``norm_layer``.
        attn_drop: dropout of attention weights, in training mode only.
        proj_drop: dropout of the output, in training mode only.
        norm_layer: called ``norm_layer(head_dim, device=, dtype=)``.
        backend: attention's, or a mapping with one for ``"attention"``; ``None`` takes the default for each call.
        device, dtype: of the parameters.

    Raises:
        ValueError: if ``dim`` or ``num_heads`` is not a positive int, ``dim`` is no multiple of ``num_heads``,
            ``attn_drop`` is not a probability below 1, or no backend has the name.
        UnsupportedError: if ``attn_drop`` is not 0 and the backend that is named has no dropout.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_registers: int = 4,
        num_cls_tokens: int = 1,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        backend: str | Mapping[str, str | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive int, not {value!r}")
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if not 0.0 <= attn_drop < 1.0:
            raise ValueError(f"attn_drop must be at least 0 and below 1, not {attn_drop}")
        self.backend = backend_by_op(backend, ("attention",))["attention"]
        if attn_drop:
            check_serves("attention", self.backend, DROPOUT, f"attn_drop={attn_drop}")
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.layout = TokenLayout(num_registers=num_registers, num_cls_tokens=num_cls_tokens)
        self.qk_norm = qk_norm

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm: nn.Module = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        rope: Rope | None = None,
        *,
        outputs: Sequence[str] = (),
        is_causal: bool = False,
    ) -> Tensor | tuple[Tensor, AttentionOutputs]:
        """Attend.

        Args:
            x: ``[B, N, C]``, CLS tokens first, then registers, then patches.
            attn_mask: broadcastable to ``[B, H, N, N]``; bool (True takes part) or additive. Padded keys are
                ``[B, 1, 1, N]``.
            rope: rotation of the patch tokens.
            outputs: statistics to return, names of the fields of ``AttentionOutputs``. ``"token_norms"`` is of the
                attention output before ``proj``.
            is_causal: timm's blocks pass it; only False is served.

        Returns:
            ``[B, N, C]``, or ``(that, AttentionOutputs)`` if ``outputs`` names any.

        Raises:
            ValueError: if ``x`` has another rank, other channels, fewer tokens than the prefix or another device than
                the weights, or ``is_causal``.
            TypeError: if ``x`` has another dtype than the weights, without autocast, or is a nested tensor.
        """
        if traced(x):
            return as_leaf(self, x, attn_mask=attn_mask, rope=rope, outputs=outputs, is_causal=is_causal)
        if x.is_nested:
            raise TypeError(
                "x is a nested tensor, which this module does not take; give functional.register_attention_qkv the "
                "projection of x.values()[None] with cu_seqlens=x.offsets(), or pad x and give an attn_mask"
            )
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x must be [B, N, {self.dim}], not of shape {tuple(x.shape)}")
        parts = self._modules  # quicker to ask than self
        check_meets("x", x, parts["qkv"])
        prefix = self.layout.num_prefix_tokens
        if known(x.shape[1] < prefix):
            raise ValueError(
                f"x has {x.shape[1]} tokens, fewer than the {self.layout.num_cls_tokens} CLS and "
                f"{self.layout.num_registers} register tokens of this module; set num_cls_tokens and num_registers"
            )
        if is_causal:
            raise ValueError(
                "is_causal=True is not served; give a lower-triangular bool attn_mask of shape [1, 1, N, N]"
            )

        projected = parts["qkv"](x)
        try:
            qkv = projected.unflatten(2, (3, self.num_heads, self.head_dim))
        except RuntimeError as error:
            raise ValueError(
                f"qkv must give whole [B, N, {3 * self.dim}], got {described(projected)}: a column-wise split of it "
                "parts queries from keys and values, not heads; leave qkv and proj whole, or make q, k and v three "
                "column-wise layers around functional.register_attention"
            ) from error
        drop = parts["attn_drop"]
        fused = only_drops(drop)
        explicit = not (fused or does_nothing(drop))
        options = {
            "num_prefix_tokens": prefix,
            "attn_mask": attn_mask,
            "dropout_p": drop.p if fused and self.training else 0.0,
            "rope": rope,
            "outputs": outputs,
        }
        if explicit or not (does_nothing(parts["q_norm"]) and does_nothing(parts["k_norm"])):
            query, key, value = unpack_qkv(qkv)
            # A norm may answer in another dtype than its input's, as under autocast.
            query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
            if explicit:
                result = self._attend(self._by_formula, query, key, value, **options)
            else:
                op = functional.register_attention
                result = self._attend(op, query, key, value, **options, backend=self.backend)
            attended, statistics = result if outputs else (result, None)
            attended = attended.transpose(1, 2).flatten(2)
        else:
            result = self._attend(functional.register_attention_qkv, qkv, **options, backend=self.backend)
            attended, statistics = result if outputs else (result, None)
        attended = parts["proj_drop"](parts["proj"](attended))
        return (attended, statistics) if outputs else attended

    def _attend(
        self, op: Callable[..., Any], *tensors: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, AttentionOutputs]:
        """The one way into the op. ``capture`` puts another in its place, which sees what goes in and comes out."""
        return op(*tensors, **options)

    def _by_formula(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, AttentionOutputs]:
        """The attention of a module whose ``attn_drop`` is to be called, with the probabilities."""
        inputs = validated(query, key, value, scale=None, cu_seqlens=None, max_seqlen=None, **options)
        with without_autocast(query):  # the inputs have been cast
            output, statistics = reference.attention(inputs, self.attn_drop)
        return (output, statistics) if inputs.outputs else output

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_heads={self.num_heads}, num_registers={self.layout.num_registers}, "
            f"num_cls_tokens={self.layout.num_cls_tokens}, backend={self.backend!r}"
        )
