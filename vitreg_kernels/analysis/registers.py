"""Register neurons, and test-time registers, which take over from them what makes artifacts.

After "Vision Transformers Don't Need Trained Registers" (Jiang et al., arXiv 2506.08010): few neurons of the MLPs make
all outliers, and an untrained token appended to the sequence holds what they write as well as any patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..integrations.attention.attend import Attend
from ..integrations.patching.method import fused_method
from ..integrations.residual_stream import ResidualStream, residual_stream, unwrapped
from ..nn.attention import RegisterAttention
from ..nn.vit import RegisterViT
from .findings import Neuron
from .outliers import Rule, outliers
from .record import patches_of, record

# Pixels as ``record`` takes them; with them, where images are padded, ``valid`` ``[B, M]``, as ``record`` takes it.
Batch: TypeAlias = Tensor | tuple[Tensor, Tensor | None]


class NeuronTable(NamedTuple):
    """The register neurons of a model.

    Attributes:
        neurons: those with the highest scores, highest first.
        layers: the blocks that were searched.
    """

    neurons: list[Neuron]
    layers: list[int]

    @property
    def indices(self) -> list[tuple[int, int]]:
        """Layer and index of each, as ``TestTimeRegisters`` takes them."""
        return [(neuron.layer, neuron.index) for neuron in self.neurons]


@torch.no_grad()
def find_register_neurons(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    rule: Rule,
    top_k: int = 1,
    layers: Sequence[int] | None = None,
    score: Literal["contrast", "mean"] = "contrast",
) -> NeuronTable:
    """The neurons that are active where outliers are (arXiv 2506.08010, Algorithm 1).

    Outliers are valid patches that leave the last block above the rule's threshold. A neuron's activation at them and
    at the other valid patches of the same image, as a magnitude, is averaged over each image that has any, and over
    these images. The paper ranks by the mean at outliers; neurons that are active everywhere rank high by it, so that
    the default is the contrast with the other patches.

    Args:
        model: as ``record`` takes it.
        batches: of pixels, and of padded images which patches are valid, see ``Batch``; gone through twice.
        rule: which patches are outliers.
        top_k: how many neurons to give.
        layers: blocks to search, from 0; by default those up to the first behind which one of those patches is an
            outlier already, since later ones cannot have made it (A.4).
        score: what they are ranked by.

    Raises:
        TypeError: if the batches are an iterator, which cannot be gone through twice.
        ValueError: if no patch is an outlier, there is no such layer, its MLP is not known, ``top_k`` is below 1 or
            ``score`` is neither; or as ``record``.
    """
    if iter(batches) is batches:
        raise TypeError("batches are gone through twice: give a list of them, not an iterator")
    if score not in ("contrast", "mean"):
        raise ValueError(f"score must be 'contrast' or 'mean', not {score!r}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    # Of all images the norms alone are kept.
    recordings = [
        record(model, pixels, valid=valid)._replace(embeddings=torch.empty(0))
        for pixels, valid in map(with_valid, batches)
    ]
    found = outliers(patches_of(recordings), rule)
    last = found[-1]
    if not last.any():
        raise ValueError(f"no patch leaves the last block as an outlier by the rule {rule}: no neuron makes any")
    if layers is None:
        first = int((found & last).any(dim=1).nonzero()[0])
        layers = range(first + 1)
    stream = known_stream(model)
    linears = {layer: neurons_of(stream, layer) for layer in layers}
    prefix = recordings[0].layout.num_prefix_tokens

    sums = {layer: torch.zeros(2, linear.in_features, dtype=torch.float64) for layer, linear in linears.items()}
    images = 0
    masks = last.split([int(recording.valid.sum()) for recording in recordings])
    for (pixels, _), recording, mask in zip(map(with_valid, batches), recordings, masks, strict=True):
        outlier = torch.zeros_like(recording.valid)
        outlier[recording.valid] = mask
        weights = _weights(outlier, recording.valid).to(pixels.device)
        images += int(outlier.any(dim=1).sum())

        def add(layer: int, _: nn.Module, args: tuple[Any, ...], weights: Tensor = weights) -> None:
            patches = _by_token(args[0], prefix + weights.shape[2])[:, prefix:].abs().float()
            sums[layer] += torch.einsum("kbm,bmh->kh", weights, patches).cpu()

        with ExitStack() as stack:
            for layer, linear in linears.items():
                stack.enter_context(linear.register_forward_pre_hook(partial(add, layer)))
            record(model, pixels)

    at_outliers, elsewhere = (torch.cat(list(sums.values()), dim=1) / images).unbind(0)
    scores = {"contrast": at_outliers - elsewhere, "mean": at_outliers}
    orders = {name: values.argsort(descending=True, stable=True) for name, values in scores.items()}
    ranks = {name: order.argsort() + 1 for name, order in orders.items()}
    places = [(layer, index) for layer, linear in linears.items() for index in range(linear.in_features)]
    neurons = [
        Neuron(
            *places[i],
            contrast=scores["contrast"][i].item(),
            mean=scores["mean"][i].item(),
            contrast_rank=int(ranks["contrast"][i]),
            mean_rank=int(ranks["mean"][i]),
        )
        for i in orders[score][:top_k].tolist()
    ]
    return NeuronTable(neurons, list(linears))


class TestTimeRegisters:
    """For the length of a ``with`` the model has one register more, to which register neurons write instead of patches.

    One token of zeros, without positions, enters the first block at the end of the prefix. At each register neuron it
    is given the activation of largest magnitude, with its sign, among the patches of its image, and the patches are
    given 0 (arXiv 2506.08010, Algorithm 2). The model attends to padding as to any patch, and so it
    counts as one here. Without neurons it is an empty token, the control that says what any further token costs:

        neurons = find_register_neurons(model, batches, rule=Rule.parse("3xmedian"), top_k=10)
        with TestTimeRegisters(model, neurons.indices) as register:
            recording = record(model, pixels, layout=register.layout)

    A ``RegisterViT`` is in every respect one with that ``layout``, and gives the token among its registers. Any other
    model takes it out again before the final norm, and gives what it always gives; what reads the stream behind a
    block, as hooks and intermediate layers without that norm do, sees it where ``layout`` says. Rotations by position
    meet the patches alone, as ever. Weights are not touched, and everything is as before at the end.

    Args:
        model: a ``RegisterViT``, or a Vision Transformer that ``integrations.residual_stream`` knows and in which all
            tokens attend to all; not compiled.
        neurons: layer and index of each; of a gated MLP those behind the gate.
        move_from_cls: whether CLS tokens are given 0, too.

    Attributes:
        layout: the order of the tokens within.

    Raises:
        ValueError: if the model is not known, is compiled, or has no such layer or neuron; when it is run, if it takes
            images of several sizes at once, or its final norm is not of all tokens.
        RuntimeError: on entering, if the model has a test-time register already.
    """

    __test__ = False  # pytest takes a class of such a name for a test

    def __init__(self, model: nn.Module, neurons: Iterable[tuple[int, int]], *, move_from_cls: bool = False) -> None:
        self._model = unwrapped(model)
        # A graph that was compiled before knows nothing of hooks.
        if any(map(_compiled, model.modules())):
            raise ValueError("a compiled model would not see a test-time register: give the model that was compiled")
        self._stream = known_stream(model)
        self._neurons = _by_layer(self._stream, neurons)
        self._move_from_cls = move_from_cls
        own = self._stream.layout
        self.layout = replace(own, num_patches=None, grid=None, num_registers=own.num_registers + 1)
        self._tokens = 0  # of the call that is running

    def __enter__(self) -> TestTimeRegisters:
        first, vit = self._stream.blocks[0][1], _register_vit(self._model)
        if first in _with_register:
            raise RuntimeError(f"{type(self._model).__name__} has a test-time register already: leave that one first")
        with ExitStack() as stack:
            _with_register.add(first)
            stack.callback(_with_register.discard, first)
            stack.enter_context(first.register_forward_pre_hook(self._insert))
            if vit is None:
                stack.enter_context(self._stream.norm.register_forward_pre_hook(self._remove))
            else:
                stack.enter_context(_changed(vit, "layout", self.layout))
            for block in dict(self._stream.blocks).values():
                for counting, name, value in self._counts(block):
                    stack.enter_context(_changed(counting, name, value))
            for layer, indices in self._neurons.items():
                linear = self._stream.neurons[layer]
                stack.enter_context(linear.register_forward_pre_hook(partial(self._move, indices)))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def _counts(self, block: nn.Module) -> Iterator[tuple[Any, str, Any]]:
        """What in a block counts the prefix, and what it counts now: object, attribute and value."""
        for module in block.modules():
            if isinstance(module, RegisterAttention):
                yield module, "layout", self.layout
            elif isinstance(getattr(module, "num_prefix_tokens", None), int):  # timm's, which rotate the others
                yield module, "num_prefix_tokens", self.layout.num_prefix_tokens
            fused = fused_method(module)
            if fused is not None and isinstance(fused.op, Attend) and fused.op.num_prefix_tokens is not None:
                yield fused.op, "num_prefix_tokens", self.layout.num_prefix_tokens

    def _insert(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        stream, *rest = args
        listed = isinstance(stream, list)  # DINOv3's: a tensor for each size of crop
        if listed and len(stream) != 1:
            raise ValueError(f"a test-time register takes images of one size at a time, not of {len(stream)} sizes")
        x = stream[0] if listed else stream
        at = self.layout.num_prefix_tokens - 1
        x = torch.cat((x[:, :at], x.new_zeros(x.shape[0], 1, x.shape[2]), x[:, at:]), dim=1)
        self._tokens = x.shape[1]
        return ([x] if listed else x, *rest)

    def _remove(self, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        if x.dim() != 3 or x.shape[1] != self._tokens:
            raise ValueError(
                f"the test-time register cannot be taken out of this model: its final norm is given "
                f"{tuple(x.shape)}, not all {self._tokens} tokens"
            )
        at = self.layout.num_prefix_tokens - 1
        return (torch.cat((x[:, :at], x[:, at + 1 :]), dim=1), *rest)

    def _move(self, indices: list[int], _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        activations, *rest = args
        own = self.layout.split(_by_token(activations[..., indices], self._tokens))  # [B, ., K]
        largest = own.patches.gather(1, own.patches.abs().argmax(dim=1, keepdim=True))
        classes = torch.zeros_like(own.cls) if self._move_from_cls else own.cls
        moved = torch.cat((classes, own.registers[:, :-1], largest, torch.zeros_like(own.patches)), dim=1)
        activations = activations.clone()
        activations[..., indices] = moved.view(*activations.shape[:-1], len(indices))
        return (activations, *rest)


@contextmanager
def zeroed(model: nn.Module, neurons: Iterable[tuple[int, int]]) -> Iterator[None]:
    """For the length of a ``with`` some neurons are 0 at all tokens: what the model is without them.

    Args:
        model: as ``TestTimeRegisters`` takes it.
        neurons: layer and index of each.

    Raises:
        ValueError: if the model is not known, or has no such layer or neuron.
    """
    stream = known_stream(model)

    def zero(indices: list[int], _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        activations = args[0].clone()
        activations[..., indices] = 0
        return (activations, *args[1:])

    with ExitStack() as stack:
        for layer, indices in _by_layer(stream, neurons).items():
            stack.enter_context(stream.neurons[layer].register_forward_pre_hook(partial(zero, indices)))
        yield


def with_valid(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Pixels, and which patches are valid; ``None`` if all are."""
    return batch if isinstance(batch, tuple) else (batch, None)


def known_stream(model: nn.Module) -> ResidualStream:
    """The residual stream of a model.

    Raises:
        ValueError: if it is not known.
    """
    stream = residual_stream(model)
    if stream is None:
        raise ValueError(
            f"{type(unwrapped(model)).__name__} is and has no Vision Transformer known here in which all tokens attend "
            "to all: give one that integrations.residual_stream knows"
        )
    return stream


def neurons_of(stream: ResidualStream, layer: int) -> nn.Module:
    """The last linear layer of a block's MLP, which is called with the neurons.

    Raises:
        ValueError: if there is no such block, or its MLP is not known.
    """
    if not 0 <= layer < len(stream.blocks):
        raise ValueError(f"the model has the blocks 0 to {len(stream.blocks) - 1}, not {layer}")
    linear = stream.neurons[layer]
    if linear is None:
        name, block = stream.blocks[layer]
        raise ValueError(f"the neurons of {name} are not known: {type(block).__name__} has no MLP of a known name")
    return linear


# First blocks of the models that have a test-time register.
_with_register: WeakSet[nn.Module] = WeakSet()


def _by_layer(stream: ResidualStream, neurons: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """The indices of neurons by layer.

    Raises:
        ValueError: if there is no such layer or neuron.
    """
    found: dict[int, list[int]] = {}
    for layer, index in neurons:
        count = neurons_of(stream, layer).in_features
        if not 0 <= index < count:
            raise ValueError(f"block {layer} has the neurons 0 to {count - 1}, not {index}")
        found.setdefault(layer, []).append(index)
    return found


def _weights(outlier: Tensor, valid: Tensor) -> Tensor:
    """``[2, B, M]``: what averages over the outliers ``[B, M]`` of each image, and over its other valid patches.

    Images without outliers count nothing.
    """
    kinds = torch.stack((outlier, valid & ~outlier & outlier.any(dim=1, keepdim=True))).float()
    return kinds / kinds.sum(dim=2, keepdim=True).clamp(min=1)


def _by_token(activations: Tensor, tokens: int) -> Tensor:
    """``[B, N, K]`` of what may be flattened over images of one size, as DINOv3's MLPs are called."""
    images = activations.shape[:-1].numel() // tokens
    return activations.reshape(images, tokens, activations.shape[-1])


def _register_vit(model: nn.Module) -> RegisterViT | None:
    return next((module for module in model.modules() if isinstance(module, RegisterViT)), None)


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute is another for the length of a ``with``."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
