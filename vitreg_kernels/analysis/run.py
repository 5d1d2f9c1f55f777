"""A whole run: models and images in, a folder with the page and its numbers out.

What is done is kept as it is done: a run that was cut goes on with ``resume``, and ends in the same files. Kept are the
passes over the images batch by batch, and what of the probes, the register neurons and the repairs is whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .._version import __version__
from ..integrations import residual_stream
from ..monitor.writers import read_csv
from . import models, photographs
from .annotations import PHOTOGRAPHS, AnnotatedBox, match, read_annotations
from .findings import TABLES, Findings, History, Neuron, Probe, Published, Repair, Report, tables, to_json
from .images import Box, ImageFolder
from .labels import read_labels
from .models import Subject, subject
from .options import Options
from .page import write_page
from .published import PUBLISHED
from .record import record
from .registers import Batch, TestTimeRegisters, find_register_neurons
from .repair import repairs
from .study import Study, finite_or_none, probed
from .survey import Part, Survey, placements_of

_PHOTOGRAPH_SIZE = 224
_NEURONS = (1, 2, 5, 10, 20, 50)  # register neurons tried, until no outlier is left (arXiv 2506.08010, A.4)

# What a model, and images that it cannot take, are known to raise; and running out of memory.
_OF_A_MODEL = (ValueError, TypeError, OSError, ModuleNotFoundError, IndexError, RuntimeError, AssertionError)

Say = Callable[[str], None]
T = TypeVar("T")


class Done(NamedTuple):
    """What a run gives.

    Attributes:
        report: everything found.
        page: the file to open.
        failed: why a model could not be analysed, by what it was asked for as.
    """

    report: Report
    page: Path
    failed: dict[str, str]


def analyze(options: Options, *, say: Say = lambda line: None, progress: bool = False) -> Done:
    """Analyse every model on every image and write ``index.html``, ``findings.json`` and tables as CSV.

    Of every image some numbers stay in memory, in all about 13 bytes a block and token: 0.4 MB of 518 pixels in
    a ViT-L/14.

    Args:
        options: what to do.
        say: called with a line for each step.
        progress: whether to show a bar on standard error.

    Raises:
        ValueError: if the images, labels, annotations or history cannot be used, or no model could be analysed. All of
            them are read before any model is.
        FileNotFoundError: if there is no such file or folder.
        ModuleNotFoundError: if a package is not installed that is needed for what was asked.
    """
    names = models.names(options.models)
    source = _source(options)
    history = None if options.history is None else _history(options.history)
    told = _told(options, ImageFolder(source, size=1, patch=1).paths)
    data = options.output / "data"
    data.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        for key in data.glob("*/key"):
            _emptied(key.parent)
    found: list[Findings] = []
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    notes: list[str] = []
    for name, spec in zip(names, options.models, strict=True):
        model = None  # the one before need not stay in memory beside the next
        try:
            model = _Model(subject(spec)._replace(name=name), options, source, told, data, progress)
            for findings in model.all():
                found.append(findings)
                say(f"{findings.name}: {findings.verdict}")
        except BrokenPipeError:  # of who reads what is said, and not of the model
            raise
        except _OF_A_MODEL as error:
            failed[spec] = _in_words(error)
            say(f"{name}: left out: {failed[spec]}")
        if model is not None:
            skipped |= model.images.skipped
            notes += model.notes
    if not found:
        raise ValueError("no model could be analysed: " + "; ".join(f"{spec}: {why}" for spec, why in failed.items()))
    found[0].history = history
    notes += [f"{spec} was left out: {why}" for spec, why in failed.items()]
    report = Report(found, options.in_words(), _versions(), skipped, list(dict.fromkeys(notes)), _published(options))
    return Done(report, _written(report, options.output, data), failed)


class _Told(NamedTuple):
    """What the user says of the images, by path.

    Attributes:
        boxes: annotated ones, in pixels on disk; None if there are none at all.
        labels: the class; None if there are none at all.
    """

    boxes: dict[str, list[AnnotatedBox] | None] | None
    labels: dict[str, str | None] | None


class _Model:
    """One model on all images: as it is, and with a test-time register."""

    def __init__(self, one: Subject, options: Options, source: Any, told: _Told, data: Path, progress: bool) -> None:
        self.subject, self.options, self.told, self.data, self.progress = one, options, told, data, progress
        size = options.size or (_PHOTOGRAPH_SIZE if options.images is None else one.size)
        self.images = ImageFolder(
            source,
            size=size // one.patch * one.patch if options.size is None else size,
            patch=one.patch,
            fit=options.fit,
            mean=one.mean,
            std=one.std,
            limit=options.limit,
        )
        self.model = one.model.to(options.device)
        self.notes: list[str] = []

    def all(self) -> Iterator[Findings]:
        """Findings of the model, and of it with a test-time register if that was asked for and it has artifacts."""
        layout = residual_stream(self.model).layout
        own, study = self._findings(self.subject.name, self.subject.title, layout)
        if self.options.test_time_registers and own.word == "artifacts" and study.mask[-1].any():
            try:
                self._repair(own)
            except ValueError as error:  # such as of an MLP whose neurons are not known
                self.notes.append(f"{own.name} is not shown with a test-time register: {_in_words(error)}")
                yield own
                return
            yield own
            neurons = [(neuron.layer, neuron.index) for neuron in own.neurons]
            with TestTimeRegisters(self.model, neurons) as register:
                name = f"{self.subject.name} + test-time register"
                yield self._findings(name, f"{self.subject.title}, with a test-time register", register.layout)[0]
            return
        if self.options.test_time_registers:
            self.notes.append(
                f"{own.name} has no outliers behind its last block, so there is nothing for a test-time register to do"
            )
        yield own

    def _findings(self, name: str, title: str, layout: Any) -> tuple[Findings, Study]:
        options, folder = self.options, self.data / _file_name(name)
        key = self._key(name)
        folder.mkdir(exist_ok=True)
        if not _holds(folder / "key", key):
            _emptied(folder)
            _replaced(folder / "key", key)
        survey = Survey(
            self.model,
            layout,
            self.subject.patch,
            options.asks_for("similarity"),
            options.asks_for("attention"),
            options.methods,
            options.shown,
            folder / "parts",
        )
        parts = []
        # A batch may hold fewer images than asked for, so that images are what can be counted.
        with tqdm(desc=name, total=len(self.images), unit="image", disable=not self.progress) as bar:
            for part in survey.parts(self.images, options.batch):
                parts.append(part)
                bar.update(len(part.paths))
        study = Study.of(parts, layout, options)
        paths = [path for part in parts for path in part.paths]
        truths, shown_truths = self._truths(parts)
        infinite = sum(int((~part.finite).sum()) for part in parts)
        if infinite:
            self.notes.append(
                f"{name} gives norms that are not finite for {infinite} of {len(paths)} images: of these nothing but "
                "the norms is shown, and no linear probe is fitted"
            )
        probes = []
        if options.asks_for("probes") and not infinite:
            labels = None if self.told.labels is None else [self.told.labels[path] for path in paths]
            file = folder / f"probes-{hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:8]}.json"
            probes = _kept(file, Probe, lambda: probed(self.model, self.images, study, labels, options))
            if not probes:
                self.notes.append(
                    "linear probes need labels for the class of an image, and 50 images for position and pixels"
                )
        findings = study.findings(
            options,
            name=name,
            title=title,
            planted=self.subject.planted,
            facts=self.subject.facts,
            discovery=study.discovery(options.methods, truths) if options.methods else [],
            probes=probes,
            shown=study.shown(options.methods, shown_truths),
        )
        np.savez_compressed(folder / "pictures.npz", **study.pictures(pca=options.asks_for("pca")))
        return findings, study

    def _repair(self, own: Findings) -> None:
        """Find the register neurons, and what a test-time register and the controls do.

        As many neurons as it takes until no patch leaves the last block as an outlier (arXiv 2506.08010, A.4), or of
        those tried the number that leaves the fewest.
        """
        rule, folder = self.options.rule, self.data / _file_name(own.name)
        batches = _Batches(self.images, self.options, f"{own.name}: register neurons", self.progress)

        def chosen() -> list[Neuron]:
            ranked = find_register_neurons(self.model, batches, rule=rule, top_k=_NEURONS[-1]).neurons
            left: dict[int, float] = {}
            for count in _NEURONS:
                left[count] = self._outliers_left(batches, ranked[:count])
                if not left[count]:
                    break
            return ranked[: min(left, key=left.get)]

        def repaired() -> list[Repair]:
            neurons = [(neuron.layer, neuron.index) for neuron in own.neurons]
            reference = _without(self.model, neurons) if self.subject.planted else None
            return repairs(self.model, batches, neurons, rule=rule, reference=reference, seed=self.options.seed)

        own.neurons = _kept(folder / "neurons.json", Neuron, chosen)
        own.repairs = _kept(folder / "repairs.json", Repair, repaired)

    def _outliers_left(self, batches: _Batches, neurons: Sequence[Neuron]) -> float:
        """The share of outliers behind the last block with a test-time register for these neurons."""
        norms = []  # of valid patches there, all that is kept of the images
        with TestTimeRegisters(self.model, [(neuron.layer, neuron.index) for neuron in neurons]) as register:
            for pixels, valid in batches:
                recording = record(self.model, pixels, layout=register.layout, valid=valid)
                norms.append(recording.norms[-1][:, recording.layout.patches][recording.valid])
        last = torch.cat(norms)
        return float((last > self.options.rule.threshold(last)).double().mean())

    def _truths(self, parts: Sequence[Part]) -> tuple[list[list[AnnotatedBox] | None] | None, list[list[Box]] | None]:
        """Annotated boxes in pixels on disk, and in those that the model sees."""
        if self.told.boxes is None:
            return None, None
        truths = [self.told.boxes[path] for part in parts for path in part.paths]
        placements = [placement for part in parts for placement in placements_of(part)]
        seen = [[p.to_pixels(box) for box in boxes or ()] for p, boxes in zip(placements, truths, strict=True)]
        return truths, [[box for box in boxes if box[0] < box[2] and box[1] < box[3]] for boxes in seen]

    def _key(self, name: str) -> str:
        """What a part depends on: it is of no use to another model, images or options."""
        digest = hashlib.sha256()
        for key, tensor in self.model.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        described: dict[str, Any] = {"name": name, "version": __version__, "weights": digest.hexdigest()}
        # The same weights are another model with other heads or another normalisation.
        described |= {"facts": self.subject.facts, "mean": self.subject.mean, "std": self.subject.std}
        described |= {"model": repr(self.model), "config": repr(getattr(self.model, "config", None))}
        described |= self.options.in_words()
        described["paths"] = [(path, *_stamp(path)) for path in self.images.paths]
        return json.dumps(described, indent=1)


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of a file, which tell a changed one; of a bundled photograph nothing does but the version."""
    if not os.path.exists(path):
        return (0, 0)
    stat = os.stat(path)
    return (stat.st_size, stat.st_mtime_ns)


class _Batches:
    """The batches of images, as often as one goes through them, each time with a bar."""

    def __init__(self, images: ImageFolder, options: Options, name: str, progress: bool) -> None:
        self._images, self._options, self._name, self._progress = images, options, name, progress

    def __iter__(self) -> Iterator[Batch]:
        total = len(self._images)
        with tqdm(desc=self._name, total=total, unit="image", leave=False, disable=not self._progress) as bar:
            for batch in self._images.batches(self._options.batch):
                yield batch.pixels.to(self._options.device), batch.valid
                bar.update(len(batch.images))


@torch.no_grad()
def _without(model: nn.Module, neurons: Sequence[tuple[int, int]]) -> nn.Module:
    """A copy in which neurons write nothing: of a planted model the one that it was planted in."""
    copied = copy.deepcopy(model)
    stream = residual_stream(copied)
    for layer, index in neurons:
        stream.neurons[layer].weight[:, index] = 0.0
    return copied


def _source(options: Options) -> Path | list[tuple[str, np.ndarray]]:
    """The images: a path, or the bundled photographs."""
    if options.images is None:
        return photographs.read()
    if not options.images.exists():
        raise FileNotFoundError(f"there is no file or folder {options.images}")
    return options.images


def _told(options: Options, paths: Sequence[str]) -> _Told:
    """What there is to be read of annotations and labels, before any model runs."""
    boxes = labels = None
    file = options.annotations or (PHOTOGRAPHS if options.images is None else None)
    if file is not None and options.methods:
        boxes = dict(zip(paths, match(read_annotations(file), paths), strict=True))
    if options.labels is not None and options.asks_for("probes"):
        root = options.images if options.images.is_dir() else options.images.parent
        labels = dict(zip(paths, read_labels(options.labels, paths, root), strict=True))
    return _Told(boxes, labels)


def _history(path: Path) -> History:
    """The largest patch norm of each layer over the median, by step, of a run's log."""
    rows = [(step, row) for step, row in read_csv(path) if row.group == "patches"]
    if not rows:
        raise ValueError(f"{path} has no norms of patches: give what monitor.CsvWriter wrote")
    steps = sorted({step for step, _ in rows})
    layers = list(dict.fromkeys(row.layer for _, row in rows))
    by_place = {(step, row.layer): row for step, row in rows}
    ratios: dict[str, list[float | None]] = {layer: [] for layer in layers}
    for layer in layers:
        for step in steps:
            row = by_place.get((step, layer))
            known = row is not None and row.max is not None and row.median
            ratio = row.max / row.median if known else math.nan
            ratios[layer].append(finite_or_none(ratio))  # of a run that diverged not every ratio is a number
    return History(steps, ratios)


def _published(options: Options) -> list[Published]:
    """The papers' numbers of what was analysed; none of it was measured here."""
    topics = {"outliers": True, "register norms": True, "discovery": bool(options.methods)}
    topics |= dict.fromkeys(("local information", "classification"), options.asks_for("probes"))
    return [
        Published(row.model, row.quantity, dict(row.values), f"{row.source}, {row.place}", row.note)
        for row in PUBLISHED
        if topics.get(row.topic)
    ]


def _versions() -> dict[str, str]:
    import scipy
    import sklearn

    return {
        "vitreg_kernels": __version__,
        "torch": str(torch.__version__),
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
        "Python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


def _written(report: Report, output: Path, data: Path) -> Path:
    """The page and what lies beside it; each file is there as a whole or as it was before."""
    files = {"findings.json": to_json(report), **{f"{name}.csv": text for name, text in tables(report).items()}}
    for name, text in files.items():
        _replaced(output / name, text)
    for name in TABLES:  # one of an earlier run does not belong to this page
        if f"{name}.csv" not in files:
            (output / f"{name}.csv").unlink(missing_ok=True)
    pictures = {found.name: np.load(data / _file_name(found.name) / "pictures.npz") for found in report.findings}
    page = output / "index.html"
    write_page(report, pictures, page.with_suffix(".new"), files=list(files))
    os.replace(page.with_suffix(".new"), page)
    return page


def _replaced(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _kept(path: Path, kind: type[T], make: Callable[[], list[T]]) -> list[T]:
    """What an earlier run kept there, or what is made now, of some class of ``findings``."""
    if not path.exists():
        _replaced(path, json.dumps([asdict(each) for each in make()]))
    return [kind(**each) for each in json.loads(path.read_text(encoding="utf-8"))]


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def _emptied(folder: Path) -> None:
    """Take away what runs keep of a model, by name: the output may be a folder in which users have data of theirs."""
    kept = ("parts/????????.npz", "pictures.npz", "probes-*.json", "neurons.json", "repairs.json", "key")
    for file in (file for pattern in kept for file in folder.glob(pattern)):
        file.unlink()


def _in_words(error: Exception) -> str:
    """What an error says, in one line; of those that do not say what they are, that too."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory, give a smaller batch or size: {text}"
    plain = isinstance(error, (ValueError, TypeError, OSError, ModuleNotFoundError, IndexError)) and text
    return text if plain else f"{type(error).__name__}{': ' if text else ''}{text}"


def _file_name(name: str) -> str:
    """A folder's name that every file system takes, and no two models share."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".") or "model"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
