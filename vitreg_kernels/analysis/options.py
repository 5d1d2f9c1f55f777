"""What is to be analysed, and how: all that a run is told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from .images import Fit
from .lost import LostOptions
from .outliers import DEFAULT_RULE, Rule

ANALYSES = ("similarity", "attention", "pca", "boxes", "probes")
TOKENCUT = "tokencut"


@dataclass(frozen=True)
class Options:
    """What a run is told.

    Attributes:
        models: as ``models.subject`` takes them, in the order of the page.
        images: a folder or a file; ``None`` for the bundled photographs.
        output: the folder of the report.
        size: of the images in pixels, see ``ImageFolder``; ``None`` for what each model was made for, of the bundled
            photographs 224.
        fit: how they become that, see ``ImageFolder``.
        batch: images at a time.
        device: as torch takes it.
        rule: which patches are outliers.
        boxes: ways of object discovery: options of LOST as ``LostOptions.parse`` takes them, or ``"tokencut"``.
        labels: as ``labels.read_labels`` takes them; ``None`` for none.
        annotations: as ``annotations.read_annotations`` takes them; ``None`` for those of the bundled photographs.
        history: a file of ``monitor.CsvWriter``, shown with the first model; ``None`` for none.
        test_time_registers: whether models with artifacts are shown with a test-time register, too.
        skip: which of ``ANALYSES`` are left out.
        limit: how many images at most; ``None`` for all.
        shown: how many images are shown.
        seed: of what is drawn at random.
        resume: whether a run that was cut goes on; otherwise all is done anew.

    Raises:
        ValueError: if an option is not of its kind.
    """

    models: tuple[str, ...]
    images: Path | None = None
    output: Path = Path("report")
    size: int | None = None
    fit: Fit = "crop"
    batch: int = 8
    device: str = "cpu"
    rule: Rule = DEFAULT_RULE
    boxes: tuple[str, ...] = ("official", "centred", TOKENCUT)
    labels: str | None = None
    annotations: Path | None = None
    history: Path | None = None
    test_time_registers: bool = False
    skip: frozenset[str] = frozenset()
    limit: int | None = None
    shown: int = 8
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("there is no model to analyse")
        if unknown := sorted(self.skip - set(ANALYSES)):
            raise ValueError(f"{', '.join(unknown)} cannot be skipped: expected of {', '.join(ANALYSES)}")
        for name, least in (("batch", 1), ("limit", 1), ("size", 1), ("shown", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.labels is not None and self.images is None:
            raise ValueError("labels are of images of your own: give images, too")
        _ = self.methods  # which refuses what is no way of discovery

    @property
    def methods(self) -> tuple[LostOptions | None, ...]:
        """Options of LOST, and ``None`` for TokenCut."""
        if "boxes" in self.skip:
            return ()
        return tuple(None if text == TOKENCUT else LostOptions.parse(text) for text in self.boxes)

    def asks_for(self, analysis: str) -> bool:
        """Whether one of ``ANALYSES`` is to be made."""
        return analysis not in self.skip

    def in_words(self) -> dict[str, str]:
        """Those that change what is found, for the page and to tell one run from another."""
        left_out = ("output", "resume", "models")
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        return {name: _words(value) for name, value in found.items()}


def _words(value: object) -> str:
    if isinstance(value, frozenset):
        value = tuple(sorted(value))
    if isinstance(value, tuple):
        return ", ".join(value) or "nothing"
    if value is None:
        return "not given"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
