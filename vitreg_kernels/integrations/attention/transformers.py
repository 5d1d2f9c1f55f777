"""transformers' vision models: whatever asks for its attention function by name is given this library's.

Those modules project, rotate and norm in a forward of their own, and look up the one function in between by the name
that their configuration has. So what is patched here runs that forward with another name in sight.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedError
from ..kind import Heads, Kind
from .attend import Attend
from .transformers_prefix import prefix_tokens

NAME = "vitreg"

# What models hand on to every layer and no attention function makes use of.
_HARMLESS = {"num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "use_cache"}
_registered = False


def register_transformers() -> None:
    """Make ``attn_implementation="vitreg"`` known to transformers, for models that are built, loaded or set with it.

    ``patch`` needs no such call, and is the better choice where a model has text in it, too: the name is then that of
    both parts, and the text, which attends causally, is served through a ``[B, 1, N, N]`` mask.

    Raises:
        ImportError: if transformers is not installed, or older than 5.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    global _registered
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
    _registered = True


def attention_function(
    module: nn.Module | Overlay,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls by the name "vitreg", with its own arguments.

    Args:
        module: the module that calls.
        query, key, value: ``[B, H, N, D]``; key and value may have fewer heads.
        attention_mask: boolean or additive, ``[B or 1, H or 1, N or 1, N]``; or ``[B, N]``, true where a token is none
            of padding.
        dropout: the probability.
        scaling: of the logits; ``D ** -0.5`` by default.
        is_causal: refused without a mask. By default what the module says of itself.
        options: whatever else the model was called with.

    Returns:
        ``[B, N, H, D]``, and ``[B, H, P, N]`` probabilities of the CLS and register tokens if a model is called with
        ``output_attentions=True``, else None.

    Raises:
        UnsupportedError: if an option asks for what the op does not do, the mask is no tensor, the attention is
            causal and has no mask, or attentions are asked of a model that is not known to have CLS or register tokens.
    """
    attend = module.attend if isinstance(module, Overlay) else Attend(prefix_tokens(module))
    if unknown := sorted(name for name, given in options.items() if given is not None and name not in _HARMLESS):
        raise UnsupportedError(f"attention by {NAME!r} does not know {', '.join(unknown)}: take 'sdpa' or 'eager'")
    if attention_mask is None:
        if getattr(module, "is_causal", True) if is_causal is None else is_causal:
            raise UnsupportedError(f"attention by {NAME!r} is causal by a mask alone, and none was given: take 'sdpa'")
    elif not isinstance(attention_mask, Tensor):
        raise UnsupportedError(f"attention by {NAME!r} takes a tensor as a mask, not {type(attention_mask).__name__}")
    elif attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None].bool()
    rows: list[Tensor] = []
    if _asked_for_attentions(module, options):
        if not attend.num_prefix_tokens:
            raise UnsupportedError(
                f"output_attentions by {NAME!r} gives the attention of CLS and register tokens, of which this model is "
                "not known to have any: take 'eager'"
            )
        attend = replace(attend, takers=[*attend.takers, ("prefix_attention", rows.append)])
    attended = attend.heads(query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    return attended.transpose(1, 2), rows[0] if rows else None


def mask_function(
    *,
    attention_mask: Tensor | None = None,
    kv_length: int,
    allow_is_bidirectional_skip: bool = False,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """Makes the masks for ``attention_function``, with the arguments of transformers' own.

    Padding alone is ``[B, 1, 1, N]``, true where a token is none of it, the form that the kernels take. Whether there
    is any is not looked up, since that would wait for the device. All else is as for 'sdpa', and a causal mask always
    made.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    padding_alone = allow_is_bidirectional_skip and options.get("mask_function") is bidirectional_mask_function
    if padding_alone and attention_mask is not None and attention_mask.shape == (options["batch_size"], kv_length):
        return attention_mask[:, None, None].bool()
    return sdpa_mask(
        attention_mask=attention_mask,
        kv_length=kv_length,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        allow_is_causal_skip=False,
        **options,
    )


class Overlay:
    """An object with some attributes in the place of its own, for one call; it stays as it is for everybody else."""

    def __init__(self, under: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _under=under)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._under, name)


def attention(module: nn.Module, attend: Attend, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The forward of a module that asks for its attention function by name, which is "vitreg" to it.

    The configuration is left alone: other modules, and other models, may share it. Where attentions are asked for, a
    model set to "eager" gives all rows, with gradients, as ever; others, that would give none, those of the prefix.
    """
    if not _registered:  # of a model that was unpickled
        register_transformers()
    name = module.config._attn_implementation
    gives_rows = attend.num_prefix_tokens and name != "eager"
    if not _is_transformers_own(name) or (not gives_rows and _asked_for_attentions(module, options)):
        return type(module).forward(module, *args, **options)
    config = Overlay(module.config, _attn_implementation=NAME)
    return type(module).forward(Overlay(module, attend=attend, config=config), *args, **options)


def siglip2_vision(
    module: nn.Module,
    attend: None,
    pixel_values: Tensor,
    pixel_attention_mask: Tensor | None,
    spatial_shapes: Tensor,
    **options: Any,
) -> Any:
    """``Siglip2VisionModel.forward``, with padding as ``[B, 1, 1, N]`` where it would be ``[B, 1, N, N]``.

    Masks of four dimensions are handed on as they are. Under other names than "sdpa" the model makes masks of other
    kinds, which a module that was left alone may need.
    """
    mask = pixel_attention_mask
    if mask is not None and mask.dim() == 2 and module.config._attn_implementation == "sdpa":
        mask = mask[:, None, None].bool()
    return type(module).forward(module, pixel_values, mask, spatial_shapes, **options)


def _asked_for_attentions(module: nn.Module | Overlay, options: dict[str, Any]) -> bool:
    """Whether this call was, or the model that is running, which records them by a hook on this module.

    Few models tell their modules. Where there is no such hook nobody is asked: ``torch.compile`` could not trace the
    answer in a layer that is compiled by itself.
    """
    if options.get("output_attentions"):
        return True
    if not any(getattr(hook, "__name__", "") == "output_capturing_hook" for hook in module._forward_hooks.values()):
        return False
    from transformers.utils.output_capturing import _active_collector

    return "attentions" in (_active_collector.get() or ())


def _is_transformers_own(name: str | None) -> bool:
    """Whether an attention function computes attention and nothing else: one that a user registered may do anything."""
    return name in (None, NAME, "eager", "sdpa", "flex_attention") or name.startswith("flash_attention_")


def _refuses(module: nn.Module) -> str:
    if not _is_transformers_own(name := module.config._attn_implementation):
        return f"is set to the attention function {name!r}, which is not transformers' own"
    if "ALL_ATTENTION_FUNCTIONS" not in inspect.unwrap(type(module).forward).__code__.co_names:
        return "does not ask for its attention function by name in this version"
    if "Text" in type(module.config).__name__:
        return "of the text part"
    return "attends causally" if getattr(module, "is_causal", False) else ""


def _heads(module: nn.Module) -> Heads:
    number = getattr(module, "num_attention_heads", None) or module.num_heads
    head_dim = getattr(module, "head_dim", None) or module.attention_head_size
    return Heads(number, head_dim)


# fmt: off
_CLASSES = (
    "Aimv2Attention", "AltCLIPAttention", "BeitAttention", "Blip2Attention", "ChineseCLIPVisionAttention",
    "CLIPAttention", "CLIPSegAttention", "DeiTAttention", "Dinov2SelfAttention", "Dinov2WithRegistersSelfAttention",
    "DINOv3ViTAttention", "DPTSelfAttention", "EomtAttention", "EomtDinov3Attention", "GitVisionAttention",
    "Idefics2VisionAttention", "Idefics3VisionAttention", "IJepaAttention", "InstructBlipAttention",
    "InternVLVisionAttention", "JanusVisionAttention", "Kosmos2VisionAttention", "MetaClip2Attention",
    "MLCDAttention", "Ovis2VisionAttention", "Owlv2Attention", "OwlViTAttention", "PixioAttention",
    "RadioSelfAttention", "Sapiens2Attention", "Siglip2Attention", "SiglipAttention", "SmolVLMVisionAttention",
    "Tipsv2VisionSelfAttention", "VideoMAESelfAttention", "VideomtAttention", "ViTAttention", "ViTMAEAttention",
    "ViTMSNAttention", "VitPoseBackboneSelfAttention", "VivitAttention", "VJEPA2RopeAttention", "XCLIPAttention",
    "YolosSelfAttention",
)
# fmt: on

KINDS = (
    Kind(
        _CLASSES,
        "transformers",
        attention,
        _heads,
        ("config",),
        refuses=_refuses,
        serves="masks, dropout, Siglip2's padding as a key mask; output_attentions gives the prefix's rows",
        leaves="text and causal attention; rotated before the op, by the model; repeated before it: grouped keys",
    ),
    Kind(("Siglip2VisionModel",), "transformers", siglip2_vision, None, ("config",)),
)
