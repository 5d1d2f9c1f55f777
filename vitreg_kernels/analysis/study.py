"""All that is found of one model: from the parts of a survey to ``Findings`` and pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from .annotations import AnnotatedBox
from .attention import prefix_names, shares
from .corloc import corloc, whole_image_share
from .draws import Drawn, PatchTokens, draw_patches, draw_tokens
from .findings import Attention, Boxes, Findings, FoundBox, Histogram, Image, Norms, Probe, Similarity, Sinks
from .images import Box, ImageFolder
from .lost import LostOptions
from .options import Options
from .outliers import Verdict, frequency, outliers, thresholds, verdict
from .pca import joint_pca
from .probes import classify, pixels, position
from .record import Patches, patches_of, record
from .similarity import by_kind
from .survey import Part, placements_of, recording_of

_BINS = 60
_MOST_PATCHES = 20_000  # that position and pixels are told of: enough for a linear map of a few hundred channels
_FEWEST_IMAGES = 50  # below which a linear map of a position or of pixels tells more of these images than of the model


class Study(NamedTuple):
    """What the parts of a survey say together.

    Attributes:
        parts: of all images, in order.
        layout: of the tokens.
        patches: the valid ones of all images.
        mask: ``[L, T]`` bool, which are outliers.
        verdict: whether the model has artifacts.
        layer: the block whose outliers all but the norms is about: the last, unless it has none and others do.
    """

    parts: list[Part]
    layout: TokenLayout
    patches: Patches
    mask: Tensor
    verdict: Verdict
    layer: int

    @classmethod
    def of(cls, parts: Sequence[Part], layout: TokenLayout, options: Options) -> Study:
        """Judge the norms."""
        patches = patches_of([recording_of(part, layout) for part in parts])
        mask, judged = outliers(patches, options.rule), verdict(patches, options.rule)
        last = len(mask) - 1
        elsewhere = judged.first_layer is not None and not mask[-1].any()
        layer = int(np.argmax(judged.share)) if elsewhere else last
        return cls(list(parts), layout, patches, mask, judged, layer)

    def norms(self, limits: Sequence[float]) -> list[Norms]:
        """Of each block and kind of token."""
        names, found = prefix_names(self.layout), []
        prefix = torch.cat([torch.from_numpy(part.norms[:, :, : len(names)]) for part in self.parts], dim=1)
        for layer, patches in enumerate(self.patches.norms):
            found.append(
                _norms(
                    layer, "patches", patches, finite_or_none(limits[layer]), float(self.mask[layer].double().mean())
                )
            )
            found += [_norms(layer, name, prefix[layer, :, i]) for i, name in enumerate(names)]
        return [each for each in found if each is not None]

    def histogram(self, limit: float) -> Histogram | None:
        """Norms behind ``layer``, over bins of equal ratios; None if there are none to show."""
        names = prefix_names(self.layout)
        kinds = {"patches": self.patches.norms[self.layer]}
        for i, name in enumerate(names):
            kinds[name] = torch.cat([torch.from_numpy(part.norms[self.layer, :, i]) for part in self.parts])
        kinds = {name: each[each.isfinite() & (each > 0)].double().numpy() for name, each in kinds.items()}
        some = [each for each in kinds.values() if each.size]
        if not some or not math.isfinite(limit):
            return None
        low, high = min(each.min() for each in some), max(each.max() for each in some)
        edges = np.geomspace(low, high * (1 + 1e-9) if high > low else 2 * low, _BINS + 1)
        edges[0] = low
        counts = {name: np.histogram(each, edges)[0].tolist() for name, each in kinds.items() if each.size}
        return Histogram(edges.tolist(), counts, limit)

    def similarity(self, of: Literal["cosine", "cls_cosine"] = "cosine") -> Similarity | None:
        """Of outliers behind ``layer`` and of the others; None if it was not asked for, or there is no CLS token."""
        each = [getattr(part, of) for part in self.parts]
        if not all(cosines.size for cosines in each):
            return None
        valid = [torch.from_numpy(cosines[part.valid]) for cosines, part in zip(each, self.parts, strict=True)]
        cosine = torch.cat(valid)
        known = cosine.isfinite()
        return by_kind(cosine[known], self.mask[self.layer][known]) if known.any() else None

    def attention(self) -> list[Attention]:
        """At the last block, where the prefix tokens look; by groups of images of one grid, and then averaged.

        Of images whose norms are finite.
        """
        total: list[Attention] = []
        images = outlying = patches = 0.0
        sums: dict[str, list[float]] = {}
        for part, outlier in zip(self.parts, self.outlier_maps(), strict=True):
            if not part.attention.size:
                return []
            count = int(part.finite.sum())
            if not count:
                continue
            outlier = outlier[torch.from_numpy(part.finite)]
            rows = torch.from_numpy(part.attention[part.finite]).unsqueeze(1)
            total = shares(rows, self.layout, outlier, layer=len(self.mask) - 1)
            for each in total:
                on_prefix, on_outliers = sums.setdefault(each.tokens, [0.0, 0.0])
                sums[each.tokens] = [
                    on_prefix + count * each.on_prefix,
                    on_outliers + count * (each.on_outliers or 0.0),
                ]
            images, outlying = images + count, outlying + float(outlier.sum())
            patches += float(part.valid[part.finite].sum())
        some = outlying > 0
        return [
            Attention(
                each.layer,
                each.tokens,
                sums[each.tokens][0] / images,
                sums[each.tokens][1] / images if some else None,
                outlying / patches if some else None,
            )
            for each in total
        ]

    def sinks(self) -> list[Sinks]:
        """Of each block and kind of token, outliers behind ``layer`` apart from other patches.

        Of images whose norms are finite. Two tokens of a kind may both be possible sinks of a head, but one of them at
        most is one, so that a bound ends at the number of heads.
        """
        names, kinds = prefix_names(self.layout), ["outlier", "normal"] if self.mask[self.layer].any() else ["normal"]
        heads = self.parts[0].heads
        images = sum(int(part.finite.sum()) for part in self.parts)
        if not heads.size or not images:
            return []
        total = np.zeros((2, len(heads), len(names) + len(kinds)))
        for part, outlier in zip(self.parts, self.outlier_maps(), strict=True):
            counts = part.sinks[:, :, part.finite].astype(np.float64)  # [2, L, B, N]
            patches, outlying = counts[..., len(names) :], outlier.numpy()[part.finite]
            of_kinds = [(patches * (outlying == (kind == "outlier"))).sum(3) for kind in kinds]
            of_prefix = [counts[..., i] for i in range(len(names))]
            each = np.stack([*of_prefix, *of_kinds], axis=-1)  # [2, L, B, kinds]
            total += np.minimum(each, heads[:, None, None]).sum(2)
        return [
            Sinks(layer, name, int(heads[layer]), *(total[:, layer, i] / images).tolist())
            for layer in range(len(heads))
            for i, name in enumerate([*names, *kinds])
        ]

    def outlier_maps(self, layer: int | None = None) -> Iterator[Tensor]:
        """``[B, M]`` bool of each part, the outliers behind ``layer`` or another block."""
        mask, start = self.mask[self.layer if layer is None else layer], 0
        for part in self.parts:
            valid = torch.from_numpy(part.valid)
            found = torch.zeros_like(valid)
            found[valid] = mask[start : start + int(valid.sum())]
            start += int(valid.sum())
            yield found

    def discovery(
        self, methods: Sequence[LostOptions | None], truths: Sequence[list[AnnotatedBox] | None] | None
    ) -> list[Boxes]:
        """How each way of object discovery did."""
        frames = [placement.window for part in self.parts for placement in placements_of(part)]
        found = []
        for i, method in enumerate(methods):
            boxes = [_box(box) for part in self.parts for box in part.boxes[i].tolist()]
            positive = np.concatenate([part.positive_share[i] for part in self.parts])
            whole = whole_image_share(boxes, frames)
            warning = "most boxes are the whole image: they say nothing of what is on it" if whole > 0.5 else ""
            if not any(boxes):
                warning = "no box on any image: all patches are alike to it, so that nothing stands out"
            row = Boxes(
                method=method_name(method),
                options="tau=0.2, eps=1e-5, features=key, layer=-1" if method is None else str(method),
                images=len(boxes),
                whole_image_share=whole,
                positive_share=None if np.isnan(positive).all() else float(np.nanmean(positive)),
                missing=boxes.count(None),
                warning=warning,
            )
            if truths is not None and any(truths):
                judged = corloc(boxes, truths, frames)
                row.corloc, row.standard_error = judged.value, judged.standard_error
                row.whole_image_corloc = judged.whole_image
            found.append(row)
        return found

    def shown(
        self, methods: Sequence[LostOptions | None], truths: Sequence[list[tuple[int, int, int, int]]] | None
    ) -> list[Image]:
        """The images of which there are pictures, with what was found on them."""
        found, first = [], 0
        for part in self.parts:
            for j, path in enumerate(part.paths):
                if f"{first + j}/photo" not in part.pictures:
                    continue
                boxes, seen = (
                    [FoundBox(method_name(method), _box(of[i, j].tolist())) for i, method in enumerate(methods)]
                    for of in (part.boxes, part.shown_boxes)
                )
                found.append(Image(path, boxes, seen, list(truths[first + j]) if truths else []))
            first += len(part.paths)
        return found

    def pictures(self, *, pca: bool) -> dict[str, np.ndarray]:
        """The maps of all images shown; see ``findings.Image``."""
        found = {name: each for part in self.parts for name, each in part.pictures.items()}
        tokens = {name.partition("/")[0]: torch.from_numpy(found.pop(name)) for name in list(found) if "tokens" in name}
        finite = {index: each for index, each in tokens.items() if each.isfinite().all()}
        if finite and pca:
            colours = joint_pca(list(finite.values())).colours
            found |= {f"{index}/pca": each.numpy() for index, each in zip(finite, colours, strict=True)}
        for layer in range(len(self.mask)):
            first = 0
            for part, maps in zip(self.parts, self.outlier_maps(layer), strict=True):
                for j in range(len(part.paths)):
                    if str(first + j) in tokens:
                        shape = (len(self.mask), *part.grid.tolist())
                        of_image = found.setdefault(f"{first + j}/outliers", np.zeros(shape, bool))
                        of_image[layer] = maps[j].unflatten(0, shape[1:]).numpy()
                first += len(part.paths)
        return found

    def findings(self, options: Options, **known: object) -> Findings:
        """All but what needs the model again; ``known`` are the other fields."""
        limits = thresholds(self.patches, options.rule).tolist()
        grids = Counter(self.patches.grids).most_common(1)
        judged = self.verdict
        return Findings(
            word=judged.word,
            verdict=judged.sentence,
            rule=str(options.rule),
            first_layer=judged.first_layer,
            images_with_outliers=judged.images_with_outliers,
            images=judged.images,
            grid=grids[0][0],
            layer=self.layer,
            prefix=prefix_names(self.layout),
            layers=len(self.mask),
            norms=self.norms(limits),
            histogram=self.histogram(limits[self.layer]),
            frequency=frequency(self.mask[self.layer], self.patches).tolist(),
            similarity=self.similarity(),
            cls_similarity=self.similarity("cls_cosine"),
            attention=self.attention(),
            sinks=self.sinks(),
            **known,
        )


def probed(
    model: nn.Module,
    images: ImageFolder,
    study: Study,
    labels: Sequence[str | None] | None,
    options: Options,
) -> list[Probe]:
    """Linear maps of tokens behind ``study.layer``; another pass, of which only the tokens drawn are kept."""
    count = len(study.patches.grids)
    enough = count >= _FEWEST_IMAGES
    if labels is None and not enough:
        return []
    kinds = [*prefix_names(study.layout), "normal", "outlier"]
    drawn: dict[str, list[Drawn]] = {kind: [] for kind in kinds}
    # One for each kind, so that what is drawn of it does not depend on the size of batches.
    draw = {kind: torch.Generator().manual_seed(options.seed) for kind in [*kinds, "any"]}
    patches: list[PatchTokens] = []
    device = next(model.parameters()).device
    for batch, outlier in zip(images.batches(options.batch), study.outlier_maps(), strict=True):
        recording = record(
            model,
            batch.pixels.to(device),
            features=[(study.layer, "tokens")],
            layout=study.layout,
            valid=batch.valid,
        )
        tokens = recording.features[study.layer, "tokens"]
        if labels is not None:
            for kind in kinds:
                drawn[kind].append(
                    draw_tokens(tokens, kind, outlier, study.layout, generator=draw[kind], valid=batch.valid)
                )
        if enough:
            most = max(1, _MOST_PATCHES // count)
            patches.append(
                draw_patches(
                    tokens,
                    batch.pixels,
                    outlier,
                    study.layout,
                    batch.grid,
                    generator=draw["any"],
                    per_image=most,
                    valid=batch.valid,
                )
            )
    found = [] if labels is None else classify([Drawn.join(drawn[kind]) for kind in kinds], labels, seed=options.seed)
    if enough:
        together = PatchTokens.join(patches)
        found += position(together, seed=options.seed) + pixels(together, seed=options.seed)
    return found


def method_name(method: LostOptions | None) -> str:
    """What a way of object discovery is called in few words."""
    if method is None:
        return "TokenCut"
    presets = {LostOptions.OFFICIAL: "LOST official", LostOptions.CENTRED: "LOST centred"}
    return presets.get(method, f"LOST {method}")


def finite_or_none(x: float) -> float | None:
    """JSON has no infinity, which is the threshold where nothing can be an outlier."""
    return x if math.isfinite(x) else None


def _norms(
    layer: int, tokens: str, norms: Tensor, threshold: float | None = None, share: float | None = None
) -> Norms | None:
    """Of one kind of token; None if none of its norms is finite."""
    finite = norms[norms.isfinite()].double().numpy()
    if not finite.size:
        return None
    median, p99 = np.percentile(finite, (50, 99))
    return Norms(layer, tokens, norms.numel(), float(median), float(p99), float(finite.max()), threshold, share)


def _box(corners: Sequence[int]) -> Box | None:
    return None if corners[0] < 0 else tuple(corners)
