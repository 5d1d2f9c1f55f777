"""The whole Vision Transformer with registers (Darcet et al., arXiv 2309.16588), built on the fused ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional
from ..layout import TokenGroups, TokenLayout
from ..ops.catalogue import backend_by_op
from .block import LayerScale, RegisterBlock, Residual, ResidualLayerNorm, normed
from .config import PRESETS, ViTConfig
from .hooks import hooked, warn_of_hook_on_list
from .inputs import check_meets
from .position import resample_positions
from .rope import PatchRope
from .tracing import as_leaf, traced

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..ops.attention.types import AttentionOutputs, Rope


class PatchEmbed(nn.Module):
    """One linear map of every patch, as a convolution, under timm's name ``proj``."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, channels, height, width]`` to ``[B, M, C]``, patches row by row.

        Raises:
            ValueError: if the images have another rank, other channels, sides that are no multiple of a patch's, or
                another device than the weights.
            TypeError: if they have another dtype than the weights, without autocast.
        """
        if traced(images):
            return as_leaf(self, images)
        channels, patch = self.proj.in_channels, self.proj.kernel_size[0]
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(f"images must be [B, {channels}, height, width], not of shape {tuple(images.shape)}")
        height, width = images.shape[2:]
        if not (height and width) or height % patch or width % patch:
            raise ValueError(
                f"the sides of an image must be multiples of the patch size {patch}, not {height} x {width}; resize, "
                f"pad or crop it"
            )
        check_meets("images", images, self.proj)
        return self.proj(images).flatten(2).transpose(1, 2)


class RegisterViT(nn.Module):
    """A pre-norm Vision Transformer over ``[CLS | registers | patches]``; timm's and DINOv2's checkpoints load.

    Parameters have timm's names, registers apart: ``cls_token`` ``[1, K, C]``, ``register_tokens`` ``[1, R, C]``,
    ``pos_embed`` ``[1, rows, C]``, ``patch_embed.proj``, ``blocks.i``, ``norm``; what would be empty is absent.
    The adds and norms are fused from block to block, see ``RegisterBlock``.

    Hooks on a module itself, forward and backward, see what those on timm's modules see: tensors, ``[B, N, C]`` on a
    block, which is then not fused with its neighbours. Hooks on all modules, as of
    ``torch.nn.modules.module.register_module_forward_hook``, see the fused calls; under autocast the norms give its
    dtype, where timm's give fp32. Register hooks before compiling, and after tracing with ``torch.fx``, which traces
    the model with its modules as leaves.

    Args:
        config: sizes and choices.
        backend: a name, for every op that has a backend of it, or a mapping by op, such as ``{"attention": "sdpa",
            "residual_norm": "composite", "assemble": "composite"}``; ``None`` takes the default of each.
        device, dtype: of the parameters.

    Attributes:
        config: as given.
        layout: the order of the tokens, ``TokenLayout``.
        checkpointing: set to True to recompute each block's activations in the backward instead of keeping them (Chen
            et al., arXiv 1604.06174).
        residual_norms: called with the L2 norms ``[B, N]`` of the tokens after the last block, before the final
            LayerNorm, which hides them; ``blocks[i].residual_norms`` with those before block i. Forward hooks on them
            see the norms at no cost.

    Raises:
        ValueError: if no op has a backend of the name.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        backend: str | Mapping[str, str | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.layout = config.layout
        self.checkpointing = False
        backend = backend_by_op(backend, ("attention", "residual_norm", "assemble"))
        self._assemble_backend = backend.pop("assemble")

        def rows(count: int) -> nn.Parameter | None:
            # No parameter rather than an empty one, which would never receive a gradient: DDP objects to that.
            return nn.Parameter(torch.empty(1, count, config.dim, **factory)) if count else None

        absolute = config.position == "absolute"
        self.cls_token = rows(config.num_cls_tokens)
        self.register_tokens = rows(config.num_registers)
        self.pos_embed = rows(config.num_position_rows if absolute else 0)
        self.rope = None if absolute else PatchRope(config.head_dim, config.rope_base)
        self.patch_embed = PatchEmbed(config.in_channels, config.dim, config.patch_size, **factory)
        self.blocks = nn.ModuleList(
            RegisterBlock(
                config.dim,
                config.num_heads,
                num_registers=config.num_registers,
                num_cls_tokens=config.num_cls_tokens,
                mlp=config.mlp,
                hidden_dim=config.hidden_dim,
                qkv_bias=config.qkv_bias,
                proj_bias=config.proj_bias,
                qk_norm=config.qk_norm,
                layer_scale=config.layer_scale,
                drop_path=config.drop_path * i / max(config.depth - 1, 1),
                attn_drop=config.attn_drop,
                proj_drop=config.proj_drop,
                eps=config.eps,
                backend=backend,
                **factory,
            )
            for i in range(config.depth)
        )
        self.residual_norms = nn.Identity()
        self.norm = ResidualLayerNorm(config.dim, eps=config.eps, backend=backend["residual_norm"], **factory)
        self.reset_parameters()

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        backend: str | Mapping[str, str | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> RegisterViT:
        """A model of a well-known shape, with new weights: ``RegisterViT.preset("vit_base_patch14", num_registers=8)``.

        Args:
            name: one of ``PRESETS``.
            backend, device, dtype: as of the class.
            changes: fields of ``ViTConfig`` that are to differ.

        Raises:
            ValueError: if no preset has the name.
            TypeError: if a change is no field of ``ViTConfig``.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}")
        return cls(replace(PRESETS[name], **changes), backend=backend, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, for instance after ``to_empty`` on a model built on the meta device.

        As timm and DINOv2 do: linear layers and position rows normal with a standard deviation of 0.02 cut at 2, biases
        0, CLS tokens and registers normal with 1e-6; the patch embedding as torch's convolutions.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d | LayerScale):
                module.reset_parameters()
        for tokens in (self.cls_token, self.register_tokens):
            if tokens is not None:
                nn.init.normal_(tokens, std=1e-6)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> TokenGroups:
        """Features by group.

        Args:
            images: ``[B, in_channels, height, width]``, normalized; sides that are multiples of the patch size.

        Returns:
            CLS tokens, registers and patches after the final LayerNorm: views of one ``[B, N, C]``.

        Raises:
            ValueError, TypeError: if the images have another rank, channels, sides, device or dtype.
        """
        return _split(self.forward_features(images), self.layout)

    @overload
    def forward_features(self, images: Tensor, *, outputs: tuple[()] = ()) -> Tensor: ...
    @overload
    def forward_features(
        self, images: Tensor, *, outputs: tuple[str, Unpack[tuple[str, ...]]]
    ) -> tuple[Tensor, AttentionOutputs]: ...
    @overload
    def forward_features(
        self, images: Tensor, *, outputs: Sequence[str]
    ) -> Tensor | tuple[Tensor, AttentionOutputs]: ...
    def forward_features(
        self, images: Tensor, *, outputs: Sequence[str] = ()
    ) -> Tensor | tuple[Tensor, AttentionOutputs]:
        """Features of all tokens.

        Args:
            images: as ``forward`` takes them.
            outputs: statistics of the last block's attention to return, names of the fields of ``AttentionOutputs``.

        Returns:
            ``[B, N, C]`` after the final LayerNorm, or ``(that, AttentionOutputs)`` if ``outputs`` names any.

        Raises:
            ValueError, TypeError: if the images have another rank, channels, sides, device or dtype.
        """
        stream, rope = self._embed(images)
        *blocks, last = self.blocks
        for block in blocks:
            stream = self._run(block, stream, rope)
        stream = self._run(last, stream, rope, outputs)
        stream, statistics = stream if outputs else (stream, None)
        _, normalized, token_norms = normed(self.norm, stream, plain=traced(stream))
        self.residual_norms(token_norms)
        return (normalized, statistics) if outputs else normalized

    def intermediate_layers(self, images: Tensor, layers: int | Sequence[int], *, norm: bool) -> list[TokenGroups]:
        """The stream after some of the blocks, with everything the block adds in it.

        Args:
            images: as ``forward`` takes them.
            layers: the last so many blocks, or the indices of blocks, which may count from the end; no block after the
                last one named is run.
            norm: whether the final LayerNorm is applied, as for features; without it these are the tokens whose norms
                tell artifacts apart, which that LayerNorm hides. There is no default because both are wanted.

        Returns:
            A ``TokenGroups`` a layer, in the order of ``layers``.

        Raises:
            ValueError: if the model has no such layers, or as ``forward``.
        """
        depth = len(self.blocks)
        wanted = range(depth - layers, depth) if isinstance(layers, int) else [i + depth * (i < 0) for i in layers]
        if not wanted or not all(0 <= i < depth for i in wanted):
            raise ValueError(f"layers must be 1 to {depth} last ones, or indices of the {depth} blocks, not {layers!r}")
        stream, rope = self._embed(images)
        found, last = {}, max(wanted)
        for i in range(last + 1):
            stream = self._run(self.blocks[i], stream, rope)
            if i in wanted:
                residual, normalized, token_norms = normed(self.norm, stream, plain=traced(stream))
                if i == last:  # no block follows, whose first norm would show these
                    after = self if i == depth - 1 else self.blocks[i + 1]
                    after.residual_norms(token_norms)
                found[i] = normalized if norm else residual
                stream = Residual(residual)
        return [_split(found[i], self.layout) for i in wanted]

    def _embed(self, images: Tensor) -> tuple[Residual, Rope | None]:
        """The sequence before the first block, and the rotation of its patches."""
        if hooked(self.blocks):
            warn_of_hook_on_list(self.blocks)
        config, positions = self.config, self.pos_embed
        patches = self.patch_embed(images)
        grid = (images.shape[2] // config.patch_size, images.shape[3] // config.patch_size)
        if torch.jit.is_tracing():  # where sizes are tensors; a trace is of images of one size
            grid = (int(grid[0]), int(grid[1]))
        if positions is not None:
            positions = _resampled(
                positions,
                grid,
                from_grid=config.grid,
                num_prefix_rows=config.num_prefix_rows,
                antialias=config.antialias,
                offset=config.interpolate_offset,
            )
        x = _assembled(patches, self.cls_token, self.register_tokens, positions, backend=self._assemble_backend)
        return Residual(x), None if self.rope is None else self.rope(grid, x=x)

    def _run(
        self, block: RegisterBlock, stream: Residual, rope: Rope | None, outputs: Sequence[str] = ()
    ) -> Residual | tuple[Residual, AttentionOutputs]:
        # Always by calling the block as a module: FSDP2 gathers its parameters in hooks of that call. And with one
        # positional argument: a hook may replace it alone.
        tracing = traced(stream)
        plain = tracing or hooked(block)
        given = stream.added() if plain else stream
        if self.checkpointing and torch.is_grad_enabled() and not tracing:
            result = checkpoint(block, given, rope=rope, outputs=outputs, use_reentrant=False)
        else:
            result = block(given, rope=rope, outputs=outputs)
        if not plain:
            return result
        return (Residual(result[0]), result[1]) if outputs else Residual(result)


# What reads the shapes of its inputs, and so is a leaf of torch.fx, as the modules are.


@torch.fx.wrap
def _resampled(pos_embed: Tensor, grid: tuple[int, int], **options: Any) -> Tensor:
    return resample_positions(pos_embed, grid, **options)


@torch.fx.wrap
def _assembled(*tokens: Tensor | None, backend: str | None) -> Tensor:
    return functional.assemble_tokens(*tokens, backend=backend)


@torch.fx.wrap
def _split(x: Tensor, layout: TokenLayout) -> TokenGroups:
    return layout.split(x)
