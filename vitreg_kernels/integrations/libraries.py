"""The model libraries that this package knows: the one list."""

from __future__ import annotations

from . import dinov2, dinov3, open_clip, perception_models, timm, torchvision, transformers
from .library import Library

# A state dict is asked of one after another, the most particular names first. timm comes behind DINOv2 and DINOv3,
# which name the patch embedding as it does: whatever has that and is not theirs, timm's ``convert`` takes for its own,
# and it raises where there is no CLS token. Modules tell their library by their class, in any order.
LIBRARIES: tuple[Library, ...] = (
    transformers.LIBRARY,
    perception_models.LIBRARY,
    dinov3.LIBRARY,
    dinov2.LIBRARY,
    timm.LIBRARY,
    torchvision.LIBRARY,
    open_clip.LIBRARY,
)
