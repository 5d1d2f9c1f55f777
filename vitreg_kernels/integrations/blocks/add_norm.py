"""The add of a branch and the norm behind it, of modules of any library, as one call of the op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import functional
from ...nn.hooks import untouched

SERVES = "the add behind attention, LayerScale and stochastic depth, and the LayerNorm that follows (level='block')"
LEAVES = (
    "other norms than LayerNorm; calls with a hook on what is fused; the add behind the MLP, whose norm is another's"
)


_NORMS = ("norm2", "layernorm_after", "layer_norm2", "ln_2")  # what the norm behind attention is called


class AddNorm(NamedTuple):
    """``x + drop_path(layer_scale(branch))`` and its LayerNorm.

    Attributes:
        backend: of the residual norm.
    """

    backend: str | None = None

    def __call__(
        self, x: Tensor, branch: Tensor, scale: Tensor | None, drop_path: nn.Module | None, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """The stream with the branch added, and its norm.

        Args:
            x: ``[B, N, C]``, the stream.
            branch: ``[B, N, C]``.
            scale: ``[C]``, LayerScale's factors, or ``None``.
            drop_path: what ``can_drop`` says yes to, or ``None``.
            norm: what ``can_norm`` says yes to.
        """
        # Under autocast a branch in bf16 has a scale in fp32: the block then adds, and draws, in the wider dtype, while
        # the op leaves the stream in its own.
        added = branch.dtype if scale is None else torch.promote_types(branch.dtype, scale.dtype)
        result = functional.residual_layer_norm(
            x.to(torch.promote_types(x.dtype, added)),
            branch,
            layer_scale=scale,
            drop_path=_drawn(drop_path, branch, added),
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            backend=self.backend,
        )
        return result.residual, result.normalized


def can_norm(norm: nn.Module) -> bool:
    """Whether a module does what torch's LayerNorm over channels does, to one tensor, and nobody looks."""
    known = (
        isinstance(norm, nn.LayerNorm)
        and type(norm).__name__ == "LayerNorm"
        and _package(norm) in ("torch", "timm", "open_clip")
    )
    return known and norm.weight is not None and len(norm.normalized_shape) == 1 and untouched(norm)


def can_drop(drop_path: nn.Module) -> bool:
    """Whether a module is stochastic depth over images, or nothing, and nobody looks."""
    named = type(drop_path).__name__.endswith("DropPath") and _package(drop_path) in ("timm", "transformers")
    return (named or type(drop_path) is nn.Identity) and untouched(drop_path)


def norm_of(block: nn.Module) -> nn.Module:
    """The norm behind the attention of a block of any class known here."""
    return next(getattr(block, name) for name in _NORMS if hasattr(block, name))


def against(block: nn.Module, drop_path: nn.Module | None = None) -> str:
    """Why the add behind a block's attention and its norm cannot be fused, in a few words; empty if they can."""
    name = next(name for name in _NORMS if hasattr(block, name))
    if not can_norm(norm := getattr(block, name)):
        return f"its {name} is a {type(norm).__name__} or hooked, and a plain LayerNorm alone is fused"
    if drop_path is not None and not can_drop(drop_path):
        return f"its stochastic depth is a {type(drop_path).__name__} or hooked, and a plain DropPath alone is fused"
    return ""


def scaled(scale: nn.Module, branch: Tensor, block: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A branch and the factors that are still to be applied to it, if a module is LayerScale and nobody looks.

    Whatever else the module is, it is called. A LayerScale is timm's, transformers' or of the package whose forward the
    block has: a block that derives from that in somebody's own code may have any LayerScale.
    """
    known = ("timm", "transformers", type(block).forward.__module__.partition(".")[0])
    named = type(scale).__name__.endswith("LayerScale") and _package(scale) in known
    if named and not getattr(scale, "inplace", False) and untouched(scale):
        return branch, next(scale.parameters())
    return scale(branch), None


def _package(module: nn.Module) -> str:
    """Where a module's class is from: one of a well-known name in somebody's own code may do anything."""
    return type(module).__module__.partition(".")[0]


def _drawn(drop_path: nn.Module, branch: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``[B]``, each image's factor, as the module itself draws it in a dtype; None where it drops nothing."""
    if drop_path is None or type(drop_path) is nn.Identity or not drop_path.training:
        return None
    return drop_path(branch.new_ones(branch.shape[0], 1, 1, dtype=dtype)).view(-1)
