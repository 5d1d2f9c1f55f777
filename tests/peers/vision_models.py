"""transformers' ``ModelTesterMixin``, applied to small models of its vision encoders.

Read by the pytest of ``tests.peers transformers`` alone, with what it fetched in the path.
"""

from __future__ import annotations

import sys
import unittest
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
import transformers


def _stand_in(module: str, name: str) -> None:
    """An empty class where the mixin imports one whose file is not distributed; export and generation do without."""
    stand_in = ModuleType(module)
    setattr(stand_in, name, type(name, (), {}))
    sys.modules[module] = stand_in


_stand_in("transformers_tests.exporters.test_export", "ExportTesterMixin")
_stand_in("transformers_tests.generation.test_utils", "GenerationTesterMixin")

from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402

_COMMON = {
    "image_size": 24,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
}
_REGISTERS = {"num_register_tokens": 3}


class Family(NamedTuple):
    """Models of one config.

    Attributes:
        name: of the config, without "Config", and of the test class, without "Test".
        models: classes, without the name before.
        prefix: CLS and register tokens.
        fields: of the config, beside the common ones.
        unfit: tests of the mixin that these models do not pass as they are.
    """

    name: str
    models: tuple[str, ...]
    prefix: int
    fields: dict[str, Any]
    unfit: tuple[str, ...] = ()


_CHECKPOINTING = tuple(
    f"test_training_gradient_checkpointing{how}" for how in ("", "_use_reentrant_false", "_use_reentrant_true")
)
_DINOV2 = ("Model", "ForImageClassification", "Backbone")
_FAMILIES = (
    # Their mask token has no gradient.
    Family("Dinov2WithRegisters", _DINOV2, 4, {**_REGISTERS, "mlp_ratio": 2}, _CHECKPOINTING),
    Family("Dinov2", _DINOV2, 1, {"mlp_ratio": 2}, _CHECKPOINTING),
    Family("DINOv3ViT", ("Model", "Backbone"), 4, _REGISTERS),
    Family("ViT", ("Model", "ForImageClassification", "ForMaskedImageModeling"), 1, {"encoder_stride": 4}),
    # These give no loss.
    Family("CLIPVision", ("Model", "ModelWithProjection"), 1, {}, ("test_training", *_CHECKPOINTING)),
    Family("SiglipVision", ("Model",), 0, {}),
    Family("DeiT", ("Model", "ForMaskedImageModeling"), 2, {"encoder_stride": 4}),
    Family("IJepa", ("Model",), 0, {}),
    Family("ViTMSN", ("Model",), 1, {}),
    Family("Aimv2Vision", ("Model",), 0, {}),
)


class _Tester:
    """What the mixin asks for the config, the inputs and the sizes of a model."""

    batch_size = 3
    is_training = True
    image_size = _COMMON["image_size"]
    patch_size = _COMMON["patch_size"]
    hidden_size = _COMMON["hidden_size"]
    num_hidden_layers = _COMMON["num_hidden_layers"]
    num_attention_heads = _COMMON["num_attention_heads"]

    def __init__(self, family: Family) -> None:
        self._config = getattr(transformers, f"{family.name}Config")
        self._fields = {**_COMMON, **family.fields}
        self.mask_length = (self.image_size // self.patch_size) ** 2
        self.num_masks = self.mask_length // 2
        self.seq_length = family.prefix + self.mask_length

    def get_config(self) -> transformers.PreTrainedConfig:
        return self._config(**self._fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[transformers.PreTrainedConfig, dict[str, torch.Tensor]]:
        images = torch.rand(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": images}


class _Images:
    """What sets models of images apart for the mixin. It stands before it."""

    test_resize_embeddings = False
    test_model_get_set_embeddings = None  # asks for an embedding of words
    family: ClassVar[Family]

    def setUp(self) -> None:
        self.model_tester = _Tester(self.family)


for _family in _FAMILIES:
    _attributes = {
        "__module__": __name__,
        "family": _family,
        "all_model_classes": tuple(getattr(transformers, f"{_family.name}{model}") for model in _family.models),
        **dict.fromkeys(_family.unfit),
    }
    globals()[f"{_family.name}Test"] = type(
        f"{_family.name}Test", (_Images, ModelTesterMixin, unittest.TestCase), _attributes
    )
del ModelTesterMixin  # or pytest would collect it too
