"""LOST, which finds one object from the Gram matrix of an image's patches (Siméoni et al., arXiv 2109.14279).

The steps are those of the code that its authors released, from which the paper's equations differ. "Vision
Transformers Need Registers" (arXiv 2309.16588, section 3.3) adds a bias to the Gram matrix and does not say which: its
numbers cannot be reproduced, only compared under options that are named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .found import Found, box_around, checked
from .record import FEATURES

# Entries of Gram matrices that are held at once: 64 MiB of fp32, half of the matrix of 5476 patches.
_BLOCK = 2**24


@dataclass(frozen=True)
class LostOptions:
    """How LOST compares patches. What is not said is as its authors' code has it.

    Attributes:
        features: what is compared: ``"key"``, ``"query"`` or ``"value"`` of the attention with all heads side by side,
            or ``"tokens"``, the stream behind the block.
        layer: of the block, from 0; negative ones count from the last.
        normalize: whether features are brought to length 1, after centring.
        center: whether the mean over the image's patches is taken from the features.
        bias: added to the Gram matrix. It is compared with products of features, so without ``normalize`` the same
            number means something else for every model.
        potentials: how many patches of the lowest degrees may help the seed to find the others; more than there are
            patches means all of them.

    Raises:
        ValueError: if an option is not of its kind.
    """

    features: str = "key"
    layer: int = -1
    normalize: bool = False
    center: bool = False
    bias: float = 0.0
    potentials: int = 100

    OFFICIAL: ClassVar[LostOptions]
    CENTRED: ClassVar[LostOptions]

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise ValueError(f"features of LOST must be one of {', '.join(FEATURES)}, not {self.features!r}")
        if self.potentials < 1:
            raise ValueError(f"potentials of LOST must be at least 1, the seed itself, not {self.potentials}")
        if not math.isfinite(self.bias):
            raise ValueError(f"bias of LOST must be finite, not {self.bias}")

    @classmethod
    def parse(cls, text: str) -> LostOptions:
        """From ``"official"``, ``"centred"``, or options as ``"features=value,bias=0.1"``, the others as official.

        Raises:
            ValueError: if it is none of these.
        """
        if text in _PRESETS:
            return _PRESETS[text]
        readers = {field.name: _READERS[str(field.type)] for field in fields(cls)}
        given: dict[str, str | int | float | bool] = {}
        for option in text.split(","):
            name, equals, value = (part.strip() for part in option.partition("="))
            if not equals or name not in readers or name in given:
                raise ValueError(
                    f"options of LOST must be {' or '.join(map(repr, _PRESETS))}, or some of {', '.join(readers)}, "
                    f"each once, as 'features=value,bias=0.1'; {option.strip()!r} in {text!r} is none of these"
                )
            try:
                given[name] = readers[name](value)
            except (ValueError, KeyError):
                (kind,) = (str(field.type) for field in fields(cls) if field.name == name)
                expected = "true or false" if kind == "bool" else f"of type {kind}"
                raise ValueError(f"option {name} of LOST must be {expected}, not {value!r}") from None
        return cls(**given)

    def __str__(self) -> str:
        """All options, as ``parse`` reads them."""
        return ",".join(f"{field.name}={str(getattr(self, field.name)).lower()}" for field in fields(self))


_READERS = {"str": str, "int": int, "float": float, "bool": {"true": True, "false": False}.__getitem__}

# The authors' code; and the one reproduction that made boxes local where those are the whole image (TMLR,
# https://openreview.net/forum?id=5JflRlCt3Q).
LostOptions.OFFICIAL = LostOptions()
LostOptions.CENTRED = LostOptions(normalize=True, center=True, bias=0.05)
_PRESETS = {"official": LostOptions.OFFICIAL, "centred": LostOptions.CENTRED}


def lost(
    features: Tensor, grid: tuple[int, int], options: LostOptions = LostOptions.OFFICIAL, *, valid: Tensor | None = None
) -> list[Found]:
    """The object of each image: the patches that resemble the one that resembles the fewest others.

    With the Gram matrix A of an image's features: the degree of a patch is how many others it has a positive entry
    with. The seed is the patch of the lowest degree, the first of several. Those of the ``potentials`` lowest degrees
    that have a positive entry with it are its similars. Foreground is where the sum of A over the similars is positive.
    The box is around the part of it that is connected with the seed by edges; there is none if the seed itself is
    not foreground. If all entries are positive, that is the whole image; see ``Found.positive_share``.

    A is taken in blocks of rows and never held whole beyond them.

    Args:
        features: ``[B, M, C]`` of the patches, which ``options.features`` and ``options.layer`` name.
        grid: rows and columns of patches.
        options: of them, all but the two named above are used here.
        valid: ``[B, M]`` bool, the patches that show the image; the others are as if they were not there.

    Raises:
        ValueError: if the shapes do not fit each other, an image has no valid patch, or a feature is not finite.
    """
    features, valid = checked(features, grid, valid, at_least=1)
    if options.center:
        features = features - features.sum(1, keepdim=True) / valid.sum(1)[:, None, None]
    if options.normalize:
        features = F.normalize(features, dim=2)

    positive, itself = _positive_entries(features, valid, options.bias)
    degree = positive - itself.long()
    num_patches = features.shape[1]
    lowest = torch.argsort(degree.masked_fill(~valid, num_patches), dim=1, stable=True)[:, : options.potentials]
    seed = lowest[:, :1]

    def of(index: Tensor) -> Tensor:  # [B, K] -> [B, K, C]
        return features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))

    with_seed = (of(lowest) @ of(seed).mT).squeeze(2) + options.bias
    similar = (with_seed > 0) & valid.gather(1, lowest)
    # The sum of the similars' rows of A, which is linear in the features.
    total = (of(lowest) * similar[..., None]).sum(1, keepdim=True)
    foreground = (features @ total.mT).squeeze(2) + options.bias * similar.sum(1, keepdim=True) > 0
    foreground &= valid

    shares = positive.sum(1).double() / valid.sum(1).double() ** 2
    return [
        Found(box_around(int(seed[i]), foreground[i], grid), int(seed[i]), foreground[i], float(shares[i]))
        for i in range(len(features))
    ]


def _positive_entries(features: Tensor, valid: Tensor, bias: float) -> tuple[Tensor, Tensor]:
    """``[B, M]`` each: positive entries in each row of A, of valid patches alone; and whether A is, with itself."""
    batch, num_patches, _ = features.shape
    positive = torch.zeros(batch, num_patches, dtype=torch.long, device=features.device)
    itself = torch.zeros_like(valid)
    rows = max(1, _BLOCK // max(1, batch * num_patches))
    for start in range(0, num_patches, rows):
        block = slice(start, start + rows)
        entries = (features[:, block] @ features.mT).add_(bias) > 0
        entries &= valid[:, None, :] & valid[:, block, None]
        positive[:, block] = entries.sum(2)
        itself[:, block] = entries.diagonal(start, 1, 2)
    return positive, itself
