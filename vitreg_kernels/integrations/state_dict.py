"""What the conversions of all libraries share: prefixes, renaming, joining, and sizes read off the shapes.

A conversion renames with regular expressions. A tensor that is only a part of one of ``RegisterViT`` gets that one's
name, ``#`` and its place: the weight of a key projection is ``blocks.0.attn.qkv.weight#1``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn.config import ViTConfig

_PARTS = {"qkv": 3, "fc1": 2}  # query, key, value; gate, value


class Backbone(NamedTuple):
    """The part of a state dict that is a ViT.

    Attributes:
        weights: by name, without what stands before all of their names.
        others: full names of all else.
    """

    weights: dict[str, Tensor]
    others: list[str]

    def without(self, heads: Collection[str], unused: Collection[str] = ()) -> dict[str, Tensor]:
        """The weights but for those of some modules.

        Args:
            heads: modules that make something of the features. One warning names those that there are, and what is not
                the backbone's.
            unused: modules and parameters that have no part in the features; they go in silence.
        """
        lost = {".".join(name.split(".")[:-1][:2]) or name for name in self.others}
        lost |= {head for head in heads if any(_within(name, (head,)) for name in self.weights)}
        if lost:
            warnings.warn(f"left out what RegisterViT has no place for: {', '.join(sorted(lost))}", stacklevel=2)
        return {name: tensor for name, tensor in self.weights.items() if not _within(name, (*heads, *unused))}


def backbone(weights: Mapping[str, Tensor], patch_embed: str) -> Backbone | None:
    """The ViT in a state dict.

    The weight of the patch embedding, which every ViT has, tells the prefix of its names. Where there are several, as
    in the checkpoint of a self-supervised training, the teacher's is taken.

    Args:
        weights: a state dict.
        patch_embed: regular expression of that weight's name.

    Returns:
        None if no name fits.

    Raises:
        ValueError: if there are several and none is the teacher's.
    """
    fits = (re.fullmatch(rf"((?:.*\.)?){patch_embed}", name) for name in weights)
    prefixes = {fit[1] for fit in fits if fit}
    if len(prefixes) > 1:
        prefixes = {prefix for prefix in prefixes if prefix.startswith("teacher.")} or prefixes
    if len(prefixes) > 1:
        raise ValueError(
            f"the weights are of several models, {', '.join(map(repr, sorted(prefixes)))}: give those of one"
        )
    if not prefixes:
        return None
    (prefix,) = prefixes
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return Backbone(own, [name for name in weights if not name.startswith(prefix)])


def renamed(weights: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The weights under new names, parts joined: each rule, a regular expression and what replaces it, one by one.

    Parts of a bias that are absent are zero, for what is added to no query, key or value is zero.
    """
    result, parts = {}, defaultdict(dict)
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        whole, _, place = name.partition("#")
        if place:
            parts[whole][int(place)] = tensor
        else:
            result[name] = tensor
    for whole, found in parts.items():
        places = range(_PARTS[whole.split(".")[-2]])
        if whole.endswith(".bias"):
            found = {place: found.get(place, torch.zeros_like(next(iter(found.values())))) for place in places}
        if len(found) == len(places):  # else it counts as missing
            result[whole] = torch.cat([found[place] for place in places])
    return result


def infer_config(
    weights: dict[str, Tensor],
    *,
    num_heads: int | None,
    head_dims: Mapping[int, int],
    rope_base: float | None = None,
    **fixed: Any,
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """The whole configuration of a model from its weights under ``RegisterViT``'s names.

    Args:
        weights: by name; the bias of an MLP that has none is made, of zeros.
        num_heads: H; None for what the weight of a query norm tells, or else ``head_dims``.
        head_dims: D by C; 64 for any other C.
        rope_base: of a model with rope; None for one with a position embedding.
        fixed: what else no shape tells: ``eps`` and how positions are resampled.

    Raises:
        ValueError: if a weight that tells a size is missing, patches or their grid are not square, or ``num_heads``
            cannot be told.
    """
    dim, in_channels, patch_size, width = _required(weights, "patch_embed.proj.weight", rank=4).shape
    if patch_size != width:
        raise ValueError(f"patches must be square, and those of the weights are {patch_size} x {width}")
    hidden_dim = _required(weights, "blocks.0.mlp.fc2.weight", rank=2).shape[1]
    fc1_width = _required(weights, "blocks.0.mlp.fc1.weight", rank=2).shape[0]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if re.match(r"blocks\.\d+\.", name))
    counts = {
        f"num_{tokens}": weights[name].shape[1] if name in weights else 0
        for tokens, name in (("cls_tokens", "cls_token"), ("registers", "register_tokens"))
    }
    if not counts["num_registers"]:  # Hugging Face keeps empty ones
        weights.pop("register_tokens", None)
    for layer in ("fc1", "fc2"):
        if not any(name.endswith(f".mlp.{layer}.bias") for name in weights):
            for i in range(depth):
                weight = _required(weights, f"blocks.{i}.mlp.{layer}.weight", rank=2)
                weights[f"blocks.{i}.mlp.{layer}.bias"] = weight.new_zeros(len(weight))
    qk_norm = "blocks.0.attn.q_norm.weight" in weights
    head_dim = len(weights["blocks.0.attn.q_norm.weight"]) if qk_norm else head_dims.get(dim, 64)
    if num_heads is None and dim % head_dim:
        raise ValueError(f"the number of heads does not follow from dim={dim}: give num_heads")
    config = ViTConfig(
        patch_size=patch_size,
        in_channels=in_channels,
        dim=dim,
        depth=depth,
        num_heads=num_heads or dim // head_dim,
        mlp="swiglu" if fc1_width == 2 * hidden_dim else "gelu",
        hidden_dim=hidden_dim,
        qkv_bias=any(name.endswith(".attn.qkv.bias") for name in weights),
        proj_bias=any(name.endswith(".attn.proj.bias") for name in weights),
        qk_norm=qk_norm,
        layer_scale=1e-5 if any(".ls1." in name for name in weights) else None,
        **_positions(weights, patch_size, **counts) if rope_base is None else _rope(patch_size, rope_base),
        **counts,
        **fixed,
    )
    return config, weights


def _positions(weights: Mapping[str, Tensor], patch_size: int, num_cls_tokens: int, num_registers: int) -> dict:
    """The fields of a configuration about the position embedding."""
    rows = _required(weights, "pos_embed", rank=3).shape[1]
    prefixes = {"patches": 0, "cls": num_cls_tokens, "prefix": num_cls_tokens + num_registers}
    for position_rows, prefix in prefixes.items():
        side = math.isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix:
            return {"position": "absolute", "position_rows": position_rows, "image_size": side * patch_size}
    raise ValueError(
        f"the {rows} position rows are no square grid of patches, with or without a row for each of {num_cls_tokens} "
        f"CLS tokens and {num_registers} registers"
    )


def _rope(patch_size: int, base: float) -> dict:
    return {"position": "rope", "rope_base": base, "image_size": 14 * patch_size}  # any size will do


def _required(weights: Mapping[str, Tensor], name: str, *, rank: int) -> Tensor:
    if name not in weights:
        raise ValueError(f"the weights lack {name}")
    if weights[name].dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, not the shape {tuple(weights[name].shape)}")
    return weights[name]


def _within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
