"""How many CLS and register tokens lead the sequence of a model of transformers, as its configuration says it."""

from __future__ import annotations

from torch import nn

from ..modules import derives_from

# CLS tokens, by model_type. Registers are counted by the configuration of the models that have them. Eomt and Videomt
# are not here: from some layer on their queries lead the sequence, and before it the CLS token and registers do.
# fmt: off
_ONE_CLS_TOKEN = (
    "altclip_vision_model", "beit", "blip_2_vision_model", "chinese_clip_vision_model", "clip_vision_model",
    "clipseg_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "dpt", "git_vision_model",
    "instructblip_vision_model", "internvl_vision", "kosmos_2_vision_model", "metaclip_2_vision_model",
    "mlcd_vision_model", "owlv2_vision_model", "owlvit_vision_model", "sapiens2", "tipsv2_vision_model", "vit",
    "vit_mae", "vit_msn", "vivit", "yolos",
)
_NO_CLS_TOKEN = (
    "aimv2_vision_model", "idefics2_vision", "idefics3_vision", "ijepa", "janus_vision_model", "siglip2_vision_model",
    "siglip_vision_model", "smolvlm_vision", "videomae", "vitpose_backbone", "vjepa2",
)
# fmt: on
_CLS_TOKENS = {
    **dict.fromkeys(_ONE_CLS_TOKEN, 1),
    **dict.fromkeys(_NO_CLS_TOKEN, 0),
    "deit": 2,  # beside the CLS token one that learns from a teacher
}
_COUNTED = {"pixio": "n_cls_tokens", "radio": "num_cls_tokens"}  # of models that have more CLS tokens or fewer
_REGISTERS = ("num_register_tokens", "num_registers")


def prefix_tokens(module: nn.Module) -> int | None:
    """The tokens before the patches of a model of transformers, or of one of its layers; None of anything else."""
    config = getattr(module, "config", None)
    if not derives_from(config, "transformers", "PreTrainedConfig"):
        return None
    model = config.model_type
    classes = getattr(config, _COUNTED[model], None) if model in _COUNTED else _CLS_TOKENS.get(model)
    if classes is None:
        return None
    return classes + sum(getattr(config, name, 0) for name in _REGISTERS)
