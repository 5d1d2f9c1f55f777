"""Lets timm be imported on a CPU-only torch.

torchvision's wheel brings operators built against a CUDA torch. Where they cannot be loaded, importing torchvision ends
at the fake kernels it registers for two of them, so their bare schemas are declared first. The tests never call them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def declare_missing_torchvision_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
            return
    except OSError:
        pass
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare_missing_torchvision_operators()
