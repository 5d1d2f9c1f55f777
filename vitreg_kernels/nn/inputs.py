"""Whether a module's input and its weights can be multiplied, said before torch says it in the words of a kernel."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops._shared.arguments import DTYPES, autocast_dtype

_CAST = tuple(dtype for dtype in DTYPES if dtype.itemsize < 8)  # autocast leaves fp64 as it is


def check_meets(name: str, x: Tensor, layer: nn.Module) -> None:
    """Refuse an input on another device than a layer's weights, or of another dtype where autocast does not mend it.

    Nothing is refused where what stands in the model is no plain layer (quantised weights, say), or where it has a
    ``forward`` of its own or a hook before it, which may bring its weights or cast them.

    Args:
        name: what the module calls x.
        x: the input.
        layer: what it goes into, an ``nn.Linear`` or ``nn.Conv2d``.

    Raises:
        ValueError: if they are on two devices.
        TypeError: if they are of two dtypes.
    """
    weight = layer._parameters.get("weight")
    if weight is not None and weight.dtype == x.dtype and weight.device == x.device:
        return  # nearly always, and quickly told
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer._forward_pre_hooks or "forward" in layer.__dict__:
        return
    weight = layer.weight
    if not weight.is_floating_point():
        return
    if weight.is_meta and not x.is_meta:
        raise ValueError(
            f"the model is on the meta device and has no weights for {name} yet; give it some with "
            f"model.to_empty(device=...) and load_state_dict or reset_parameters"
        )
    if x.device != weight.device:
        raise ValueError(
            f"{name} and the model must be on one device, got {x.device} and {weight.device}; bring {name} there with "
            f'{name}.to("{weight.device}")'
        )
    if x.dtype == weight.dtype:
        return
    castable = x.dtype in _CAST and weight.dtype in _CAST
    if not (castable and autocast_dtype(x)):
        ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (x.dtype, weight.dtype))
        raise TypeError(
            f"{name} and the model's weights must have one dtype, got {ours} and {theirs}; cast one, as with "
            f"{name}.to(torch.{theirs})" + (", or run under torch.autocast" if castable else "")
        )
