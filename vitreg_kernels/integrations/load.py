"""A RegisterViT with the weights of a pretrained model of another library."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..nn.config import ViTConfig
from ..nn.position import resample_positions
from ..nn.tokens import patch_like_registers
from ..nn.vit import RegisterViT
from . import files
from .configuration import FIELDS, configure, described
from .libraries import LIBRARIES
from .library import Converted, Library
from .nests import find_weights


def load_vit(
    source: str | PathLike[str] | Mapping[str, Any],
    *,
    grid: tuple[int, int] | None = None,
    backend: str | Mapping[str, str | None] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> RegisterViT:
    """A ``RegisterViT`` that computes what the model computes whose weights these are.

    Served are timm's ``VisionTransformer`` and DINOv3, and what has the names of the former (DeiT, MAE, DINO, MoCo v3);
    Hugging Face's Dinov2, Dinov2WithRegisters, DINOv3ViT and ViT; DINOv2's and DINOv3's own files.

    Sizes are read off the shapes, and off the ``config.json`` of a folder. Weights alone do not tell the number of
    heads, the norms' epsilon, the activation of an MLP (``mlp="gelu"`` is the exact GELU, ``"swiglu"`` a gate of SiLU
    before the value), how positions are resampled, the base of a rotation, or the grid that position rows were learnt
    on: 576 rows may be of 24 x 24 patches or of 18 x 32. What is known of none of these is taken as the published
    models have it, with 64 channels a head but in a few known models and a square grid, and one warning says what was
    assumed; give these fields, and there is none. Where the position rows may be read in several ways, with rows for
    CLS tokens and registers or without, nothing is assumed and you are asked.

    Nor do weights under timm's names tell that each norm stands before its branch, or that no rotation turns queries
    and keys. Without a ``config.json`` these are taken for such, and the warning says "pre-norm blocks without
    rotation": those of a ``ResPostBlock``, or of an ``Eva`` other than DINOv3, would give other features.

    Classifiers and other heads are left out, with a warning that names them; mask tokens in silence. Of the several
    state dicts of a training's file, or models in one, that of the teacher is taken, or else of state dicts what timm's
    loader takes, averaged weights first, with a warning that says so; names may hold the parts that
    DistributedDataParallel, ``torch.compile``, FSDP and activation checkpointing put into them.

    The state dict of a ``RegisterViT`` does not say all of its configuration: keep that beside it, and load it with
    ``RegisterViT(config).load_state_dict(...)``.

    Args:
        source: a state dict, or a mapping that holds one; a ``.safetensors`` file; a ``.pt``, ``.pth``, ``.bin``,
            ``.ckpt`` or ``.pth.tar`` file (read with ``weights_only=True``, and ``argparse.Namespace`` allowed); or a
            folder as transformers and timm write it, with ``config.json`` and the weights, whole or split.
        grid: rows and columns of patches that the position rows were learnt on.
        backend: of the ops, as ``RegisterViT`` takes it.
        device, dtype: of the model's parameters; torch's defaults if None. On the meta device there are no numbers.
        changes: fields of ``ViTConfig``. What the weights or ``config.json`` tell must agree, but for two:
            ``image_size``, an int or height and width, resamples the position rows to these images, once and for all;
            ``num_registers`` gives a model without registers so many, made like patches of a plain image, which changes
            the features least (see ``patch_like_registers``).

    Raises:
        TypeError: if a change is no field of ``ViTConfig``.
        ValueError: if the file is of another kind or cannot be read, the weights are of no known library or of several
            models, a weight is missing, unknown, of another shape, or no dense floating tensor of 16 bits or more,
            the position rows can be read in several ways or in none, ``config.json`` disagrees with the weights or
            names what ``RegisterViT`` does not compute, or a change is of no use or disagrees with either.
        pickle.UnpicklingError: if the file holds objects of a class that torch does not call safe.
        FileNotFoundError: if there is no such file or folder.
        ModuleNotFoundError: if a ``.safetensors`` file is given and safetensors is not installed.
    """
    if unknown := sorted(changes.keys() - set(FIELDS)):
        raise TypeError(f"{', '.join(unknown)} is no field of ViTConfig, which has {', '.join(FIELDS)}")
    content, description = files.read(source) if isinstance(source, str | PathLike) else (source, None)
    weights, taken = find_weights(content)
    _check_tensors(weights)
    library, found = _convert(weights)
    said = {} if description is None else described(library, description, found)
    _check_names(found)
    config, unsure = configure(found, said, changes, grid)
    weights = found.weights
    _check(config, weights)
    if "num_registers" in changes and changes["num_registers"] != config.num_registers:
        config, weights = _with_registers(config, weights, changes["num_registers"])
    if "image_size" in changes:
        config, weights = _for_images_of(changes["image_size"], config, weights)
    left_out = f"left out what RegisterViT has no place for: {', '.join(found.left_out)}" if found.left_out else None
    assumption = _assumption(unsure, found.blocks_assumed, folder=description is not None)
    for sentence in (taken, left_out, assumption):
        if sentence:
            warnings.warn(sentence, stacklevel=2)
    # On the meta device first: no weights are drawn for nothing.
    model = RegisterViT(config, backend=backend, device="meta", dtype=dtype)
    device = torch.device(torch.get_default_device() if device is None else device)
    if device.type != "meta":
        model.to_empty(device=device)
        model.load_state_dict(weights)
    return model


def _convert(weights: Mapping[str, Tensor]) -> tuple[Library, Converted]:
    readers = [library for library in LIBRARIES if library.convert is not None]
    for library in readers:
        if (converted := library.convert(weights)) is not None:
            return library, converted
    known = ", ".join(library.name for library in readers)
    raise ValueError(
        f"the weights, {_some(weights)}, are of no model known of {known}; those of a RegisterViT go into "
        "RegisterViT(config).load_state_dict"
    )


def _check_tensors(weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, and has no numbers: give the weights as they were loaded")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be dense, not of the layout {tensor.layout}: give it with to_dense()")
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise ValueError(
                f"{name} is of {tensor.dtype}, which needs a scale: give the weights in fp32, fp16 or bf16"
            )


def _check_names(found: Converted) -> None:
    """Before position rows are read: what is unknown may have rows of its own."""
    one = {"depth": 1, "num_heads": 1, "image_size": found.told["patch_size"]}
    known = RegisterViT(ViTConfig(**{**found.told, **one}), device="meta").state_dict().keys()
    if unknown := [name for name in found.weights if re.sub(r"^blocks\.\d+\.", "blocks.0.", name) not in known]:
        raise ValueError(f"RegisterViT has no place for {_some(unknown)}, and would give other features without")


def _assumption(unsure: Mapping[str, Any], blocks: bool, *, folder: bool) -> str | None:
    if not unsure:
        return None
    nobody = "neither the weights nor config.json tell" if folder else "the weights do not tell"
    values = ", ".join(f"{field}={value!r}" for field, value in unsure.items())
    if blocks and not folder:
        values += ", and pre-norm blocks without rotation"
    return f"assumed what {nobody}: {values}; give load_vit any of these fields to say otherwise"


def _check(config: ViTConfig, weights: Mapping[str, Tensor]) -> None:
    expected = RegisterViT(config, device="meta").state_dict()
    if missing := expected.keys() - weights.keys():
        raise ValueError(f"the weights lack {_some(missing)}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} must have the shape {tuple(expected[name].shape)}, not {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, not {tensor.dtype}: give the weights unquantised")


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
    if config.position_rows == "prefix":
        raise ValueError(
            f"position_rows='prefix' would be of num_registers={num_registers} new registers too, for which the "
            "weights have no rows: give 'cls'"
        )
    registers = patch_like_registers(
        weights["pos_embed"][:, config.num_prefix_rows :], weights["patch_embed.proj.bias"], num_registers
    )
    return dataclasses.replace(config, num_registers=num_registers), {**weights, "register_tokens": registers}


def _for_images_of(
    image_size: int | tuple[int, int], config: ViTConfig, weights: dict[str, Tensor]
) -> tuple[ViTConfig, dict]:
    resized = dataclasses.replace(config, image_size=image_size)
    if config.position == "absolute":
        rows = resample_positions(
            weights["pos_embed"],
            resized.grid,
            from_grid=config.grid,
            num_prefix_rows=config.num_prefix_rows,
            antialias=config.antialias,
            offset=config.interpolate_offset,
        )
        weights = {**weights, "pos_embed": rows}
    return resized, weights


def _some(names: Collection[str]) -> str:
    """Up to four names, and how many more there are."""
    first = sorted(names)[:4]
    return ", ".join(first) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
