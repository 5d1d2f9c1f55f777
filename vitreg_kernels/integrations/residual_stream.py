"""Where the residual stream of somebody's model can be seen."""

from __future__ import annotations

from torch import nn

from ..nn.vit import RegisterViT
from .libraries import LIBRARIES
from .library import ResidualStream
from .modules import named

__all__ = ["ResidualStream", "residual_stream", "unwrapped"]

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under ``torch.compile``, data parallelism and FSDP."""
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The layers of a Vision Transformer and the order of its tokens.

    Known are ``RegisterViT`` and the models of timm, Hugging Face transformers, DINOv2, DINOv3, torchvision, open_clip
    and perception_models, alone or within another model (a classifier, say), wrapped or not.

    Args:
        model: the model; the layers' names are those in it without its wrappers.

    Returns:
        None if there is no such model.

    Raises:
        ValueError: if there are several.
    """
    model = unwrapped(model)
    found = [(name, stream) for name, module in model.named_modules() if (stream := _stream_of(module))]
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise ValueError(f"{type(model).__name__} holds several Vision Transformers, {names}: give one of them")
    for prefix, stream in found:
        return stream._replace(layers=_within(prefix, stream.layers), blocks=_within(prefix, stream.blocks))
    return None


def streams_of(model: nn.Module) -> list[ResidualStream]:
    """The residual streams of all Vision Transformers in a model; names are those in each of them."""
    return list(filter(None, map(_stream_of, model.modules())))


def modules_in_blocks(model: nn.Module) -> set[nn.Module]:
    """Every module in the blocks of the Vision Transformers in a model, however many it holds."""
    return {part for stream in streams_of(model) for _, block in stream.layers for part in block.modules()}


def _within(prefix: str, modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    return [(f"{prefix}.{name}" if prefix else name, module) for name, module in modules]


def _stream_of(module: nn.Module) -> ResidualStream | None:
    if isinstance(module, RegisterViT):
        taps = [*(block.residual_norms for block in module.blocks), module.residual_norms]
        names = ["embedding", *(f"blocks.{i}" for i in range(len(module.blocks)))]
        blocks = named("blocks", module.blocks)
        of_blocks = ResidualStream.of_blocks(module.layout, blocks, patch_embed=module.patch_embed, norm=module.norm)
        return of_blocks._replace(layers=list(zip(names, taps, strict=True)))
    return next(filter(None, (library.residual_stream(module) for library in LIBRARIES)), None)
