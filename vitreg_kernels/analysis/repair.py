"""What a test-time register makes of a model's outliers, beside the controls that tell what did it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from .findings import Repair
from .outliers import Rule
from .record import Recording, record
from .registers import Batch, TestTimeRegisters, known_stream, neurons_of, with_valid, zeroed


def repairs(
    model: nn.Module,
    batches: Iterable[Batch],
    neurons: Sequence[tuple[int, int]],
    *,
    rule: Rule,
    reference: nn.Module | None = None,
    seed: int = 0,
) -> list[Repair]:
    """Norms behind the last block of the model as it is, with a test-time register, and with the controls.

    The controls are an empty token, since any further token changes the others a little; a test-time register that
    takes over as many random neurons of the same blocks, which moves no outlier (Jiang et al., arXiv 2506.08010); and
    the register neurons set to 0 beside an empty token.

    Args:
        model: as ``TestTimeRegisters`` takes it, in evaluation mode.
        batches: of pixels, and of padded images which patches are valid, see ``registers.Batch``; all numbers are of
            valid patches.
        neurons: layer and index of each register neuron.
        rule: which patches are outliers, in each of these by a threshold of its own.
        reference: the model that the drift is measured from, of as many tokens and channels; by default the model as
            it is. Of a planted model it is the one without, which shows whether the register gives that back.
        seed: of the random neurons.

    Raises:
        ValueError: if there are no neurons or no batches, or as ``TestTimeRegisters`` and ``record``.
    """
    if not neurons:
        raise ValueError("without register neurons there is nothing to repair")
    others = _random_neurons(model, neurons, seed)
    variants: dict[str, tuple[Sequence[tuple[int, int]] | None, Sequence[tuple[int, int]]]] = {
        "as it is": (None, ()),
        "empty token": ((), ()),
        "test-time register": (neurons, ()),
        "random neurons moved": (others, ()),
        "neurons zeroed, empty token": ((), neurons),
    }
    seen = {name: _Seen() for name in variants}
    base = model if reference is None else reference
    for batch in batches:
        start = _recorded(base, batch, None, ())
        for name, (moved, silent) in variants.items():
            seen[name].add(_recorded(model, batch, moved, silent), start, moved is not None)
    if not seen["as it is"].norms:
        raise ValueError("there is no batch of images to repair the model for")
    norms = torch.cat(seen["as it is"].norms)
    normal = norms <= rule.threshold(norms)
    found = [one.repair(name, rule, normal) for name, one in seen.items()]
    if reference is None:
        found[0].drift = None
    return found


class _Seen:
    """Of one variant, over all images.

    Attributes:
        norms: of valid patches, ``[T]`` a batch.
        registers: norms of the added token, ``[B]`` a batch; none without one.
        drifts: of valid patches, ``[T]`` a batch.
    """

    def __init__(self) -> None:
        self.norms: list[Tensor] = []
        self.registers: list[Tensor] = []
        self.drifts: list[Tensor] = []

    def add(self, recording: Recording, start: Recording, register: bool) -> None:
        """Take in a batch, and the same images as the reference shows them."""
        layout, tokens = recording.layout, _patches(recording)
        self.norms.append(recording.norms[-1][:, layout.patches][recording.valid])
        if register:
            self.registers.append(recording.norms[-1][:, layout.num_prefix_tokens - 1])
        before = _patches(start)
        self.drifts.append((tokens - before).norm(dim=-1) / before.norm(dim=-1))

    def repair(self, name: str, rule: Rule, normal: Tensor) -> Repair:
        """The numbers, the drift over the patches ``[T]`` bool that are no outliers of the model as it is."""
        norms = torch.cat(self.norms)
        median = _median(norms)
        return Repair(
            name=name,
            largest_ratio=(norms.max() / median).item(),
            outliers=(norms > rule.threshold(norms)).double().mean().item(),
            register_ratio=(torch.cat(self.registers).mean() / median).item() if self.registers else None,
            drift=_median(torch.cat(self.drifts)[normal]) if normal.any() else None,
        )


def _median(values: Tensor) -> float:
    """As of every other number of the page: of an even number of values the mean of the middle two, unlike torch's."""
    return float(np.median(values.double().numpy()))


def _recorded(
    model: nn.Module,
    batch: Batch,
    moved: Sequence[tuple[int, int]] | None,
    silent: Sequence[tuple[int, int]],
) -> Recording:
    """With a test-time register that takes over ``moved``, unless that is None, and ``silent`` set to 0."""
    (pixels, valid), last = with_valid(batch), [(-1, "tokens")]
    register: AbstractContextManager[TestTimeRegisters | None]
    register = nullcontext() if moved is None else TestTimeRegisters(model, moved)
    with register as within, zeroed(model, silent):
        return record(model, pixels, features=last, layout=within.layout if within else None, valid=valid)


def _patches(recording: Recording) -> Tensor:
    """``[T, C]``, the valid ones behind the last block."""
    return next(iter(recording.features.values()))[:, recording.layout.patches][recording.valid]


def _random_neurons(model: nn.Module, neurons: Sequence[tuple[int, int]], seed: int) -> list[tuple[int, int]]:
    """As many of each block, and none of those."""
    stream, generator = known_stream(model), torch.Generator().manual_seed(seed)
    found = []
    for layer in dict.fromkeys(layer for layer, _ in neurons):
        own = {index for of, index in neurons if of == layer}
        drawn = torch.randperm(neurons_of(stream, layer).in_features, generator=generator).tolist()
        found += [(layer, index) for index in drawn if index not in own][: len(own)]
    return found
