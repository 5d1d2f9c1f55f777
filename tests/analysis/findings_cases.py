"""Findings made up for tests: small, but with every analysis, and pictures that fit them."""

from __future__ import annotations

import numpy as np

from vitreg_kernels.analysis.findings import (
    Attention,
    Boxes,
    Findings,
    FoundBox,
    Histogram,
    History,
    Image,
    Neuron,
    Norms,
    Probe,
    Published,
    Repair,
    Report,
    Similarity,
    Sinks,
)

LAYERS, ROWS, COLUMNS, HEADS, PATCH = 3, 2, 4, 2, 8


def findings(name: str = "toy", *, planted: bool = False, prefix: tuple[str, ...] = ("cls", "register 1")) -> Findings:
    """Of a model with three blocks and a grid of 2 x 4, every analysis filled in."""
    tokens = ("patches", *prefix)
    return Findings(
        name=name,
        title=f"planted {name}" if planted else name,
        planted=planted,
        facts={"class": "RegisterViT", "blocks": str(LAYERS)},
        word="artifacts" if planted else "clean",
        verdict=f"{name}: the largest patch norm is 7.5 x the median (rule 3xmedian)",
        rule="3xmedian",
        first_layer=1 if planted else None,
        images_with_outliers=2 if planted else 0,
        images=2,
        grid=(ROWS, COLUMNS),
        layer=LAYERS - 1,
        prefix=list(prefix),
        layers=LAYERS,
        norms=[
            Norms(layer, kind, 16, 10.0, 30.0 + layer, 0.1 + 0.2, *((30.0, 0.0625) if kind == "patches" else ()))
            for layer in range(LAYERS)
            for kind in tokens
        ],
        histogram=Histogram([1.0, 10.0, 100.0], {kind: [3, 5] for kind in tokens}, 30.0),
        frequency=[[0.0, 0.5, 0.0, 1 / 3] for _ in range(ROWS)],
        similarity=Similarity(
            [0.0, 0.5, 1.0],
            {"normal": [0.1, 1.0, 0.1], "outlier": [0.0, 0.2, 2.0]},
            {"normal": 0.5, "outlier": 0.9},
            {"normal": 15, "outlier": 1},
        ),
        cls_similarity=Similarity([-1.0, 0.0, 1.0], {"normal": [0.1, 0.5, 0.1]}, {"normal": 0.125}, {"normal": 16}),
        sinks=[
            Sinks(layer, kind, HEADS, 0.5 if layer else 0.0, 1.25 if layer == 2 else 0.5 * bool(layer))
            for layer in range(LAYERS)
            for kind in (*prefix, "outlier", "normal")
        ],
        attention=[Attention(LAYERS - 1, kind, 0.25, 0.5, 0.0625) for kind in prefix],
        probes=[
            Probe("position", "normal", "top-1", 0.417, 0.01, 0.125, 100, standard_error=0.02),
            Probe("position", "outlier", "top-1", None, None, 0.125, 0, "too few outliers"),
        ],
        discovery=[
            Boxes("LOST", "features=key, bias=0.0", 2, 1.0, 1.0, 0, 0.5, 0.35, 0.5, "the boxes are the whole image"),
            Boxes("TokenCut", "tau=0.2", 2, 0.0, None, 1),
        ],
        neurons=[Neuron(1, 700, 3.06, 3.25, 1, 3)],
        repairs=[Repair("as it is", 30.55, 0.0146), Repair("test-time register", 1.35, 0.0, 11.1, 0.034)],
        shown=[
            Image(
                "<script>alert(1)</script>.png",
                [FoundBox("LOST", (0, 0, 64, 32)), FoundBox("TokenCut", None)],
                [FoundBox("LOST", (0, 0, 32, 16)), FoundBox("TokenCut", None)],
                [(4, 4, 20, 12)],
            ),
            Image("boat.jpg"),
        ],
        history=History([0, 100, 200], {"blocks.0": [1.5, None, 2.0], "blocks.2": [1.5, 4.0, 9.0]}),
    )


def pictures(found: Findings) -> dict[str, np.ndarray]:
    """Every map of every image shown."""
    draw = np.random.default_rng(0)
    count, grid = len(found.prefix), (ROWS, COLUMNS)
    drawn = {}
    for i in range(len(found.shown)):
        norms = draw.uniform(8, 14, (found.layers, *grid)).astype(np.float32)
        norms[-1, 0, 0] *= 10
        drawn |= {
            f"{i}/photo": draw.integers(0, 256, (ROWS * PATCH, COLUMNS * PATCH, 3), dtype=np.uint8),
            f"{i}/norms": norms,
            f"{i}/prefix_norms": draw.uniform(8, 90, (found.layers, count)).astype(np.float32),
            f"{i}/outliers": norms > 30,
            f"{i}/attention": draw.random((count, *grid), dtype=np.float32),
            f"{i}/heads": draw.random((count, HEADS, *grid), dtype=np.float32),
            f"{i}/pca": draw.random((*grid, 3), dtype=np.float32),
        }
    return drawn


def report() -> Report:
    """A clean model and a planted one."""
    return Report(
        findings=[findings(), findings("mended", planted=True)],
        options={"--images": "photos & <more>"},
        versions={"torch": "2.13.0"},
        skipped={"notes.txt": "is no image"},
        notes=["classification was left out: there are no labels"],
        published=[
            Published(
                "DINOv2-L",
                "LOST CorLoc on VOC07, %",
                {"without registers": "35.3", "with registers": "55.4"},
                "arXiv 2309.16588, table 3",
                "A bias was added.",
            ),
        ],
    )
