"""Small models of other libraries with random weights that let no mistake hide, and what their features must be."""

from __future__ import annotations

import copy
from functools import partial

import torch

from tests.integrations.patching import dinov2_like, dinov3_like, perception_models_like
from vitreg_kernels import RegisterViT, ViTConfig
from vitreg_kernels.measure.accuracy import compare

DIM = 128


@torch.no_grad()
def scramble(model):
    """Weights that tell a swapped, lost or wrongly split tensor; tokens so small that a norm's epsilon tells too."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if any(part in name for part in ("patch_embed", "pos_embed", "position_embeddings", "token")):
            parameter.copy_(3e-3 * noise / (parameter[0].numel() ** 0.5 if parameter.dim() == 4 else 1))
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * (0.5 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5))
    return model.eval()


def timm_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": DIM, "depth": 2, "num_heads": 2}
    return scramble(VisionTransformer(**{**sizes, "num_classes": 0, "dynamic_img_size": True, **options}))


def timm_dinov3(**options):
    from timm.layers import LayerNorm
    from timm.models.eva import Eva

    fixed = {
        **{"img_size": 64, "patch_size": 16, "embed_dim": DIM, "depth": 2, "num_heads": 2, "num_classes": 0},
        **{"init_values": 1.0, "num_reg_tokens": 4, "use_fc_norm": False, "norm_layer": partial(LayerNorm, eps=1e-5)},
        **{"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_temperature": 100},
        **{"rope_rotate_half": True, "dynamic_img_size": True},
    }
    return scramble(Eva(**{**fixed, **options}))


def hugging_face(name, *, kind="Model", **options):
    import transformers

    sizes = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    config = getattr(transformers, f"{name}Config")(**{**sizes, "intermediate_size": 256, **options})
    return scramble(getattr(transformers, f"{name}{kind}")(config))


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return scramble(VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=DIM, mlp_dim=2 * DIM))


def open_clip_vit(**options):
    from open_clip.transformer import VisionTransformer

    return scramble(VisionTransformer(64, 16, DIM, 2, 2, 2.0, output_dim=32, **options))


def dinov2_vit(registers=3, **options):
    blocks = [dinov2_like.NestedTensorBlock(DIM, 2, **options) for _ in range(2)]
    return scramble(dinov2_like.DinoVisionTransformer(blocks, registers, 16))


def dinov3_vit(registers=3):
    blocks = [dinov3_like.SelfAttentionBlock(DIM, 2) for _ in range(2)]
    return scramble(dinov3_like.DinoVisionTransformer(blocks, registers, 16))


def perception_vit(**options):
    return scramble(perception_models_like.VisionTransformer(16, DIM, 2, 2, **options))


def register_vit(**changes):
    sizes = {"image_size": 64, "patch_size": 16, "dim": DIM, "depth": 2, "num_heads": 2}
    return scramble(RegisterViT(ViTConfig(**sizes, **changes)))


def features(model, images):
    """``[B, N, C]`` after the final norm."""
    if not hasattr(model, "base_model_prefix"):
        return model.forward_features(images)
    resampled = {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}
    return model(pixel_values=images, **resampled).last_hidden_state


@torch.no_grad()
def assert_features(ours, theirs, *, sides=((64, 64), (48, 80))):
    """By the accuracy rule against their model in fp64, on the images it is made for and on others."""
    for height, width in sides:
        images = torch.randn(2, 3, height, width)
        exact = features(copy.deepcopy(theirs).double(), images.double())
        accuracy = compare(ours.eval().forward_features(images), exact, features(theirs, images), terms=512)
        assert accuracy.passed, f"{height} x {width}: {accuracy}"


def assert_same(ours, other):
    """Two ``RegisterViT`` of one configuration and the same weights, bit for bit."""
    assert ours.config == other.config
    weights = other.state_dict()
    assert ours.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())
