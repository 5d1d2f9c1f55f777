"""timm's tests of models: forward, backward, TorchScript, torch.fx, features, resizing, checkpoints."""

from __future__ import annotations

from .peer import Peer

# Whatever has Attention, AttentionRope, EvaAttention or NaFlexVit.
_MODULES = ("vision_transformer", "deit", "eva", "naflexvit")
# Tests of a few small models that they name themselves.
_FUNCTIONS = (
    "test_naflexvit_*",
    "test_eva_*",
    "test_vit_*",
    "test_hybrid_vit_*",
    "test_model_init_weights_*",
)


def _all_groups() -> tuple[str, ...]:
    from timm import list_models

    return (*(model for module in _MODULES for model in list_models(module=module)), *_FUNCTIONS)


PEER = Peer(
    name="timm",
    built_by="timm:create_model",
    tests=("test_models.py",),
    groups=(
        "test_vit",
        "test_vit3",
        "vit_tiny_patch16_dinov3_qkvb",
        "vit_small_patch16_rope_224",
        *_FUNCTIONS,
    ),
    all_groups=_all_groups,
    left_out=("test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained"),
)
