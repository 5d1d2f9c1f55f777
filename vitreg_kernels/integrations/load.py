"""A RegisterViT with the weights of a pretrained model of another library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn.config import ViTConfig
from ..nn.position import resample_positions
from ..nn.tokens import patch_like_registers
from ..nn.vit import RegisterViT
from .libraries import LIBRARIES

_NESTED = ("teacher", "model", "state_dict")  # where training checkpoints keep the state dict


def load_vit(
    source: str | PathLike | Mapping[str, Any],
    *,
    num_registers: int | None = None,
    num_heads: int | None = None,
    image_size: int | None = None,
    backend: str | Mapping[str, str | None] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RegisterViT:
    """A ``RegisterViT`` that computes what the model computes whose weights these are.

    Served are timm's ``VisionTransformer`` and DINOv3; Hugging Face's Dinov2, Dinov2WithRegisters, DINOv3ViT and ViT;
    DINOv2's and DINOv3's own files. Sizes are read off the shapes. What no shape tells is taken from the published
    models: the norms' epsilon, how positions are resampled, GELU in an MLP without a gate, and the number of heads (64
    channels a head but in a few known models). Classifiers and other heads are left out, with a warning that names
    them; mask tokens in silence.

    The state dict of a ``RegisterViT`` does not say all of its configuration: keep that beside it, and load it with
    ``RegisterViT(config).load_state_dict(...)``.

    Args:
        source: a ``.safetensors`` file, a ``.pt``, ``.pth`` or ``.bin`` file (read with ``weights_only=True``), or a
            state dict.
        num_registers: registers of the model. Those of weights without registers are made like patches of a plain
            image, which changes the features least; see ``patch_like_registers``.
        num_heads: H, where it is not the published model's of that width.
        image_size: resample the position rows to square images of this size, once and for all.
        backend: of the ops, as ``RegisterViT`` takes it.
        device, dtype: of the model's parameters; torch's defaults if None.

    Raises:
        ValueError: if the file is of another kind, the weights are of no known library, a weight is missing, unknown or
            of another shape, or ``num_registers`` is not that of weights with registers.
        ModuleNotFoundError: if a ``.safetensors`` file is given and safetensors is not installed.
    """
    weights = _state_dict(_read(source) if isinstance(source, str | PathLike) else source)
    config, weights = _convert(weights, num_heads)
    _check(config, weights)
    if num_registers not in (None, config.num_registers):
        config, weights = _with_registers(config, weights, num_registers)
    if image_size is not None:
        config, weights = _for_images_of(image_size, config, weights)
    # On the meta device first: no weights are drawn for nothing.
    model = RegisterViT(config, backend=backend, device="meta", dtype=dtype)
    model.to_empty(device=torch.get_default_device() if device is None else device)
    model.load_state_dict(weights)
    return model


def _read(path: str | PathLike) -> Mapping[str, Any]:
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{path} needs safetensors: run `pip install safetensors`") from error
        return load_file(path)
    if suffix in (".pt", ".pth", ".bin"):
        return torch.load(path, map_location="cpu", weights_only=True)
    raise ValueError(f"{path} must end in .safetensors, .pt, .pth or .bin")


def _state_dict(weights: Any) -> dict[str, Tensor]:
    """The tensors by name, out of what a training checkpoint puts around them."""
    while nested := [key for key in _NESTED if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping)]:
        weights = weights[nested[0]]
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"the source must hold a state dict, tensors by name, not a {type(weights).__name__}")
    return dict(weights)


def _convert(weights: Mapping[str, Tensor], num_heads: int | None) -> tuple[ViTConfig, dict[str, Tensor]]:
    readers = [library for library in LIBRARIES if library.convert is not None]
    for library in readers:
        if (converted := library.convert(weights, num_heads=num_heads)) is not None:
            return converted
    known = ", ".join(library.name for library in readers)
    raise ValueError(
        f"the weights, {_some(weights)}, are of no model known of {known}; those of a RegisterViT go into "
        "RegisterViT(config).load_state_dict"
    )


def _check(config: ViTConfig, weights: Mapping[str, Tensor]) -> None:
    expected = RegisterViT(config, device="meta").state_dict()
    if unknown := weights.keys() - expected.keys():
        raise ValueError(f"RegisterViT has no place for {_some(unknown)}, and would give other features without")
    if missing := expected.keys() - weights.keys():
        raise ValueError(f"the weights lack {_some(missing)}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} must have the shape {tuple(expected[name].shape)}, not {tuple(tensor.shape)}")


def _with_registers(config: ViTConfig, weights: dict[str, Tensor], num_registers: int) -> tuple[ViTConfig, dict]:
    if config.num_registers:
        raise ValueError(
            f"num_registers={num_registers} disagrees with the weights, which have {config.num_registers} registers"
        )
    if config.position == "rope":
        raise ValueError(
            f"num_registers={num_registers} new registers would be made from position rows, of which the weights, with "
            "rope, have none; leave it out"
        )
    registers = patch_like_registers(
        weights["pos_embed"][:, config.num_prefix_rows :], weights["patch_embed.proj.bias"], num_registers
    )
    return dataclasses.replace(config, num_registers=num_registers), {**weights, "register_tokens": registers}


def _for_images_of(image_size: int, config: ViTConfig, weights: dict[str, Tensor]) -> tuple[ViTConfig, dict]:
    resized = dataclasses.replace(config, image_size=image_size)
    if config.position == "absolute":
        rows = resample_positions(
            weights["pos_embed"],
            (resized.side, resized.side),
            num_prefix_rows=config.num_prefix_rows,
            antialias=config.antialias,
            offset=config.interpolate_offset,
        )
        weights = {**weights, "pos_embed": rows}
    return resized, weights


def _some(names: Any) -> str:
    """Up to four names, and how many more there are."""
    first = sorted(names)[:4]
    return ", ".join(first) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
