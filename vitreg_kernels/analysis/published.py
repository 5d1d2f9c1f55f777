"""What the papers report, each number with its source: to be printed beside what was measured, never in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

REGISTERS = "arXiv 2309.16588"  # Darcet et al., Vision Transformers Need Registers
TEST_TIME = "arXiv 2506.08010"  # Jiang et al., Vision Transformers Don't Need Trained Registers
LOST = "https://github.com/valeoai/LOST"  # the code of Simeoni et al., arXiv 2109.14279
TOKENCUT = "https://github.com/YangtaoWANG95/TokenCut"  # the code of Wang et al., arXiv 2202.11539
MASSIVE = "https://github.com/locuslab/massive-activations"  # the code of Sun et al., arXiv 2402.17762
XRAY = "https://github.com/MikeDegany/vit-xray"

Topic = Literal["outliers", "register norms", "local information", "classification", "downstream", "discovery"]


@dataclass(frozen=True)
class Reported:
    """One row of a table: one quantity of one model, under one condition or several that are compared.

    Attributes:
        topic: which analysis it belongs to.
        model: what it was measured on.
        quantity: what was measured, with its unit or metric.
        values: the condition, such as ``"4 registers"``, and the number as it was printed there.
        source: arXiv number or address.
        place: the table or figure, or the section.
        note: what a reader must know before comparing.
    """

    topic: Topic
    model: str
    quantity: str
    values: tuple[tuple[str, str], ...]
    source: str
    place: str
    note: str = ""


def of_topic(topic: Topic) -> list[Reported]:
    """The rows of one analysis, in order."""
    return [row for row in PUBLISHED if row.topic == topic]


def _values(conditions: str, numbers: str) -> tuple[tuple[str, str], ...]:
    return tuple(zip(conditions.split(" / "), numbers.split(" / "), strict=True))


_WITHOUT_WITH = "without registers / with registers"
_KINDS = "normal patch / outlier patch / CLS"
_NONE_TRAINED_TEST = "no registers / 4 trained registers / test-time register"

_OUTLIERS = (
    Reported(
        "outliers",
        "DINOv2 ViT-g/14",
        "share of patches above a norm of 150, %",
        (("without registers", "2.37"),),
        REGISTERS,
        "section 2.1, fig. 3",
        "The cutoff was chosen by eye for this model; norms before the final norm.",
    ),
    Reported(
        "outliers",
        "DINOv2 ViT-g/14",
        "first block with outliers, of 40",
        (("without registers", "about 15"),),
        REGISTERS,
        "fig. 4a",
    ),
    Reported(
        "outliers",
        "DINOv2 ViT-g/14",
        "share of the training after which outliers appear",
        (("without registers", "about 1/3"),),
        REGISTERS,
        "fig. 4b",
    ),
    Reported(
        "outliers",
        "DINOv2 trained at six sizes, Ti to g",
        "sizes with outliers",
        (("without registers", "L, H, g"),),
        REGISTERS,
        "fig. 4c",
        "The published S, B and L are distilled from g, which is another training.",
    ),
    Reported(
        "outliers",
        "DINO, MAE",
        "outliers",
        (("without registers", "none"),),
        REGISTERS,
        "section 2, figs. 2 and 3",
    ),
    *(
        Reported("outliers", model, "share of patches, %", (("a mixture of two Gaussians", share),), XRAY, "README")
        for model, share in (
            ("DINOv2-g", "1.6 to 1.9"),
            ("CLIP ViT-B, LAION-2B", "3.1 to 4.6"),
            ("SigLIP-B", "1.0 to 1.5"),
            ("DeiT-III-B", "0 to 5.1"),
            ("DINO, MAE, DINOv2-g with registers", "0"),
        )
    ),
    Reported(
        "outliers",
        "InternViT-6B",
        "largest norm",
        _values("no registers / test-time register", "7000 / 608"),
        TEST_TIME,
        "InternViT",
    ),
)

_REGISTER_NORMS = tuple(
    Reported(
        "register norms",
        f"DINOv2 {model} with 4 registers",
        "norm of the mean register over 10 000 images",
        _values("register 0 / register 1 / register 2 / register 3", norms),
        MASSIVE,
        "assets/reg_feat_mean",
        "The norm of the mean, which is at most the mean of the norms.",
    )
    for model, norms in (
        ("ViT-S/14", "14.1 / 118.4 / 17.6 / 15.4"),
        ("ViT-B/14", "60 / 270 / 74 / 340"),
        ("ViT-L/14", "955 / 39 / 146 / 205"),
        ("ViT-g/14", "327 / 161 / 1362 / 98"),
    )
)

_LOCAL_INFORMATION = tuple(
    Reported(
        "local information",
        "DINOv2 ViT-g/14",
        quantity,
        _values("normal patch / outlier patch", numbers),
        REGISTERS,
        "fig. 5b",
    )
    for quantity, numbers in (
        ("position, top-1 accuracy, %", "41.7 / 22.8"),
        ("position, mean distance, patches", "0.79 / 5.09"),
        ("pixels, L2 error", "18.38 / 25.23"),
    )
)

_CLASSIFICATION = (
    *(
        Reported(
            "classification", "DINOv2 ViT-g/14", f"{data}, accuracy, %", _values(_KINDS, numbers), REGISTERS, "table 1"
        )
        for data, numbers in (
            ("ImageNet-1k", "65.8 / 69.0 / 86.0"),
            ("Places205", "53.1 / 55.1 / 66.4"),
            ("Aircraft", "17.1 / 79.1 / 87.3"),
            ("CIFAR-10", "97.1 / 99.3 / 99.4"),
            ("CIFAR-100", "81.3 / 93.7 / 94.5"),
            ("CUB", "18.6 / 84.9 / 91.3"),
            ("Caltech-101", "73.2 / 97.6 / 96.9"),
            ("Cars", "10.8 / 85.2 / 91.5"),
            ("DTD", "63.1 / 84.9 / 85.2"),
            ("Flowers", "59.5 / 99.6 / 99.7"),
            ("Food", "74.2 / 93.5 / 94.7"),
            ("Pets", "47.8 / 94.1 / 96.9"),
            ("SUN", "37.7 / 78.5 / 78.6"),
            ("VOC", "70.8 / 89.7 / 89.1"),
        )
    ),
    *(
        Reported(
            "classification",
            "DINOv2 ViT-L/14",
            f"{data}, accuracy of one token, %",
            _values("CLS / central patch / outlier patch / trained register / test-time register", numbers),
            TEST_TIME,
            "classification by one token",
        )
        for data, numbers in (
            ("ImageNet-1k", "85.6 / 73.3 / 84.5 / 83.1 / 84.5"),
            ("CIFAR-10", "99.4 / 98.0 / 99.2 / 99.2 / 99.1"),
            ("CIFAR-100", "93.4 / 88.1 / 92.8 / 93.0 / 93.0"),
        )
    ),
)

_TASKS = ("ImageNet-1k, accuracy, %", "ADE20k, mIoU, %", "NYUd, RMSE")
_DOWNSTREAM = (
    *(
        Reported("downstream", model, task, _values(_WITHOUT_WITH, numbers), REGISTERS, "table 2")
        for model, by_task in (
            ("DeiT-III-B", ("84.7 / 84.7", "38.9 / 39.1", "0.511 / 0.512")),
            ("OpenCLIP ViT-B", ("78.2 / 78.1", "26.6 / 26.7", "0.702 / 0.661")),
            ("DINOv2 ViT-L/14", ("84.3 / 84.8", "46.6 / 47.9", "0.378 / 0.366")),
        )
        for task, numbers in zip(_TASKS, by_task, strict=True)
    ),
    *(
        Reported(
            "downstream", "DINOv2 ViT-L/14", task, _values(_NONE_TRAINED_TEST, numbers), TEST_TIME, "linear probes"
        )
        for task, numbers in zip(
            _TASKS, ("86.4 / 86.7 / 86.4", "48.3 / 49.1 / 49.1", "0.388 / 0.382 / 0.378"), strict=True
        )
    ),
)

_DATA = ("VOC07", "VOC12", "COCO20k")
_BIASED = "A bias was added to the Gram matrix, which is not published."
_SWEPT = "Features, layer and bias were chosen for each model."
_WHOLE = "The same figures are reported for unrelated models: probably the score of the box that is the whole image."


def _discovery(
    model: str, method: str, conditions: str, numbers: tuple[str, str, str], source: str, place: str, note: str = ""
) -> list[Reported]:
    return [
        Reported(
            "discovery", model, f"{method}, CorLoc on {data}, %", _values(conditions, of_data), source, place, note
        )
        for data, of_data in zip(_DATA, numbers, strict=True)
    ]


_DISCOVERY = (
    *_discovery(
        "DINOv2 ViT-L/14", "LOST", _WITHOUT_WITH, ("35.3 / 55.4", "40.2 / 60.0", "26.9 / 42.0"), REGISTERS, "table 3",
        f"Keys. {_BIASED}",
    ),
    *_discovery(
        "DeiT-III-B", "LOST", _WITHOUT_WITH, ("11.7 / 27.1", "13.1 / 32.7", "10.7 / 25.1"), REGISTERS, "table 3",
        f"Values. {_BIASED}",
    ),
    *_discovery(
        "OpenCLIP ViT-B", "LOST", _WITHOUT_WITH, ("38.8 / 37.1", "44.3 / 42.0", "31.0 / 27.9"), REGISTERS, "table 3",
        f"Values. {_BIASED}",
    ),
    *_discovery(
        "DINOv2 ViT-L/14", "LOST", _NONE_TRAINED_TEST,
        ("32.2 / 56.2 / 53.8", "36.8 / 60.2 / 57.9", "25.4 / 42.3 / 41.9"), TEST_TIME, "object discovery", _SWEPT,
    ),
    *_discovery(
        "OpenCLIP ViT-B/16", "LOST", "no registers / test-time register",
        ("30.8 / 30.9", "35.9 / 35.9", "23.4 / 23.6"), TEST_TIME, "table 5", f"{_SWEPT} {_WHOLE}",
    ),
    *_discovery(
        "InternViT-6B", "LOST", "no registers / test-time register",
        ("30.3 / 41.6", "35.4 / 48.7", "22.4 / 32.7"), TEST_TIME, "object discovery", _SWEPT,
    ),
    *_discovery("DINO ViT-S/16", "LOST", "without registers", ("61.9", "64.0", "50.7"), LOST, "README"),
    *_discovery("DINO ViT-S/8", "LOST", "without registers", ("55.5", "57.0", "49.5"), LOST, "README"),
    *_discovery("DINO ViT-B/16", "LOST", "without registers", ("60.1", "63.3", "50.0"), LOST, "README"),
    *_discovery("DINO ViT-S/16", "TokenCut", "without registers", ("68.8", "72.1", "58.8"), TOKENCUT, "README"),
)  # fmt: skip

PUBLISHED: tuple[Reported, ...] = (
    *_OUTLIERS,
    *_REGISTER_NORMS,
    *_LOCAL_INFORMATION,
    *_CLASSIFICATION,
    *_DOWNSTREAM,
    *_DISCOVERY,
)
