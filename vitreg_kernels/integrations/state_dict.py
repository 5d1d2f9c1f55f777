"""What the conversions of all libraries share: prefixes, renaming, joining, and sizes read off the shapes.

A conversion renames with regular expressions. A tensor that is only a part of one of ``RegisterViT`` gets that one's
name, ``#`` and its place: the weight of a key projection is ``blocks.0.attn.qkv.weight#1``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import Converted

# The weight that every ViT has, as timm, DINOv2 and DINOv3 name it, and as transformers does.
PATCH_EMBED = r"patch_embed\.proj\.weight"
HUGGING_FACE_PATCH_EMBED = r"embeddings\.patch_embeddings(?:\.projection)?\.weight"
_ANY_PATCH_EMBED = re.compile(rf"((?:.*\.)?)(?:{PATCH_EMBED}|{HUGGING_FACE_PATCH_EMBED})")
_PARTS = {"qkv": 3, "fc1": 2}  # query, key, value; gate, value


class Backbone(NamedTuple):
    """The part of a state dict that is a ViT.

    Attributes:
        weights: by name, without what stands before all of their names.
        others: full names of all else.
    """

    weights: dict[str, Tensor]
    others: list[str]

    def without(self, heads: Collection[str], unused: Collection[str] = ()) -> tuple[dict[str, Tensor], list[str]]:
        """The weights but for those of some modules, and what of it is worth a word.

        Args:
            heads: modules that make something of the features. They are named, and what is not the backbone's.
            unused: modules and parameters that have no part in the features; they go in silence.
        """
        lost = {".".join(name.split(".")[:-1][:2]) or name for name in self.others}
        lost |= {head for head in heads if any(_within(name, (head,)) for name in self.weights)}
        weights = {name: tensor for name, tensor in self.weights.items() if not _within(name, (*heads, *unused))}
        return weights, sorted(lost)


def vit_prefixes(names: Iterable[str]) -> set[str]:
    """What stands before the names of each ViT known here; the weight of its patch embedding, which all have, tells."""
    return {fit[1] for fit in map(_ANY_PATCH_EMBED.fullmatch, names) if fit}


def backbone(weights: Mapping[str, Tensor], patch_embed: str) -> Backbone | None:
    """The ViT in a state dict.

    Args:
        weights: a state dict.
        patch_embed: regular expression of that weight's name.

    Returns:
        None if no name fits.

    Raises:
        ValueError: if there are several ViTs, of whatever library.
    """
    prefixes = vit_prefixes(weights)
    if len(prefixes) > 1:
        raise ValueError(
            f"the weights are of several models, {', '.join(map(repr, sorted(prefixes)))}: give those of one"
        )
    if not prefixes:
        return None
    (prefix,) = prefixes
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not any(re.fullmatch(patch_embed, name) for name in own):
        return None
    return Backbone(own, [name for name in weights if not name.startswith(prefix)])


def renamed(weights: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The weights under new names, parts joined: each rule, a regular expression and what replaces it, one by one.

    Parts of a bias that are absent are zero, for what is added to no query, key or value is zero.

    Raises:
        ValueError: if two weights get one name.
    """
    result, parts = {}, defaultdict(dict)
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        whole, _, place = name.partition("#")
        if name in result or (place and int(place) in parts[whole]):
            raise ValueError(f"the weights have {whole} twice, under two names: give those of one model")
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


def converted(
    weights: dict[str, Tensor],
    left_out: list[str],
    *,
    head_dims: Mapping[int, int] | None = None,
    rope: bool = False,
    told: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any],
    assumed: Mapping[str, Any],
    activation_assumed: bool = True,
    square: bool = False,
    blocks_assumed: bool = False,
) -> Converted:
    """A conversion, from weights that have ``RegisterViT``'s names already.

    Args:
        weights: by name; the bias of an MLP that has none is made, of zeros.
        left_out: see ``Converted``.
        head_dims: D by C of the published models, if no weight tells the heads; 64 for any other C.
        rope: whether the model has rope, not a position embedding.
        told: fields that weights tell which only this library has.
        fixed, assumed, square, blocks_assumed: see ``Converted``.
        activation_assumed: whether the library's MLPs may have another activation than those of ``ViTConfig``.

    Raises:
        ValueError: if a weight that tells a size is missing or of another rank, or patches are not square.
    """
    dim, in_channels, patch_size, width = _required(weights, "patch_embed.proj.weight", rank=4).shape
    if patch_size != width:
        raise ValueError(f"patches must be square, and those of the weights are {patch_size} x {width}")
    hidden_dim = _required(weights, "blocks.0.mlp.fc2.weight", rank=2).shape[1]
    fc1_width = _required(weights, "blocks.0.mlp.fc1.weight", rank=2).shape[0]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if re.match(r"blocks\.\d+\.", name))
    num_cls_tokens, num_registers = (
        _required(weights, name, rank=3).shape[1] if name in weights else 0 for name in ("cls_token", "register_tokens")
    )
    if not num_registers:  # Hugging Face keeps empty ones
        weights.pop("register_tokens", None)
    for layer in ("fc1", "fc2"):
        if not any(name.endswith(f".mlp.{layer}.bias") for name in weights):
            for i in range(depth):
                weight = _required(weights, f"blocks.{i}.mlp.{layer}.weight", rank=2)
                weights[f"blocks.{i}.mlp.{layer}.bias"] = weight.new_zeros(len(weight))
    qk_norm = "blocks.0.attn.q_norm.weight" in weights
    told = {
        **(told or {}),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "dim": dim,
        "depth": depth,
        "num_registers": num_registers,
        "num_cls_tokens": num_cls_tokens,
        "mlp": "swiglu" if fc1_width == 2 * hidden_dim else "gelu",
        "hidden_dim": hidden_dim,
        "qkv_bias": any(name.endswith(".attn.qkv.bias") for name in weights),
        "proj_bias": any(name.endswith(".attn.proj.bias") for name in weights),
        "qk_norm": qk_norm,
        "layer_scale": 1e-5 if any(".ls1." in name for name in weights) else None,
        "position": "rope" if rope else "absolute",
    }
    assumed = dict(assumed)
    head_dim = len(weights["blocks.0.attn.q_norm.weight"]) if qk_norm else (head_dims or {}).get(dim, 64)
    if "num_heads" not in told and dim % head_dim == 0:
        # A norm of all channels may be that of one head, or of all heads together.
        (told if qk_norm and head_dim < dim else assumed)["num_heads"] = dim // head_dim
    if activation_assumed:
        assumed["mlp"] = told["mlp"]
    return Converted(weights, told, dict(fixed), assumed, square, left_out, blocks_assumed)


def _required(weights: Mapping[str, Tensor], name: str, *, rank: int) -> Tensor:
    if name not in weights:
        raise ValueError(f"the weights lack {name}")
    if weights[name].dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, not the shape {tuple(weights[name].shape)}")
    return weights[name]


def _within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
