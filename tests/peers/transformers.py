"""transformers' common tests of every model: saving and loading, attention outputs, training, checkpointing, casts.

Its source distribution holds these tests, and not the files that apply them to each model: ``vision_models`` does.
"""

from __future__ import annotations

from pathlib import Path

from .peer import Peer

_GROUPS = ("Dinov2WithRegistersTest", "Dinov2Test", "DINOv3ViTTest", "ViTTest", "CLIPVisionTest", "SiglipVisionTest")
_MORE = ("DeiTTest", "IJepaTest", "ViTMSNTest", "Aimv2VisionTest")

PEER = Peer(
    name="transformers",
    built_by="transformers:PreTrainedModel.post_init",
    tests=(Path(__file__).with_name("vision_models.py"),),
    groups=_GROUPS,
    all_groups=lambda: (*_GROUPS, *_MORE),
    needs=("parameterized",),
)
