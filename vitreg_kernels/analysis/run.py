"""A whole run: models and images in, a folder with the page and its numbers out.

What is done is kept as it is done: a run that was cut goes on with ``resume``, and ends in the same files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._version import __version__
from ..integrations import residual_stream
from ..monitor.writers import read_csv
from . import models, photographs
from .annotations import PHOTOGRAPHS, match, read_annotations
from .findings import Findings, History, Neuron, Published, Report, tables, to_json
from .images import Box, ImageFolder
from .labels import read_labels
from .models import Subject, subject
from .options import Options
from .outliers import outliers
from .page import write_page
from .published import PUBLISHED
from .record import patches_of, record
from .registers import TestTimeRegisters, find_register_neurons
from .repair import repairs
from .study import Study, probed
from .survey import Part, Survey, placements_of

_PHOTOGRAPH_SIZE = 224
_NEURONS = (1, 2, 5, 10, 20, 50)  # register neurons tried, until no outlier is left (arXiv 2506.08010, A.4)

Say = Callable[[str], None]


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

    Args:
        options: what to do.
        say: called with a line for each step.
        progress: whether to show a bar on standard error.

    Raises:
        ValueError: if the images, labels, annotations or history cannot be used, or no model could be analysed.
        FileNotFoundError: if there is no such file or folder.
        ModuleNotFoundError: if a package is not installed that is needed for what was asked.
    """
    names = models.names(options.models)
    source = _source(options)
    history = None if options.history is None else _history(options.history)
    data = options.output / "data"
    if not options.resume:
        shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True, exist_ok=True)
    found: list[Findings] = []
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    notes: list[str] = []
    for name, spec in zip(names, options.models, strict=True):
        try:
            model = _Model(subject(spec)._replace(name=name), options, source, data, progress)
            for findings in model.all():
                found.append(findings)
                say(f"{findings.name}: {findings.verdict}")
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            failed[spec] = str(error)
            say(f"{name}: left out: {error}")
            continue
        skipped |= model.images.skipped
        notes += model.notes
    if not found:
        raise ValueError("no model could be analysed: " + "; ".join(f"{spec}: {why}" for spec, why in failed.items()))
    found[0].history = history
    notes += [f"{spec} was left out: {why}" for spec, why in failed.items()]
    report = Report(found, options.in_words(), _versions(), skipped, list(dict.fromkeys(notes)), _published(options))
    return Done(report, _written(report, options.output, data), failed)


class _Model:
    """One model on all images: as it is, and with a test-time register."""

    def __init__(self, one: Subject, options: Options, source: Any, data: Path, progress: bool) -> None:
        self.subject, self.options, self.data, self.progress = one, options, data, progress
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
            self._repair(own)
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
        if (folder / "key").exists() and (folder / "key").read_text() != key:
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        (folder / "key").write_text(key)
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
        parts = list(
            tqdm(
                survey.parts(self.images, options.batch),
                name,
                total=-(-len(self.images) // options.batch),
                unit="batch",
                disable=not self.progress,
            )
        )
        study = Study.of(parts, layout, options)
        paths = [path for part in parts for path in part.paths]
        truths, shown_truths = self._truths(parts)
        probes = []
        if options.asks_for("probes"):
            labels = None
            if options.labels is not None:
                root = options.images if options.images.is_dir() else options.images.parent
                labels = read_labels(options.labels, paths, root)
            probes = probed(self.model, self.images, study, labels, options)
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
        rule, pixels = self.options.rule, _Pixels(self.images, self.options.batch, self.options.device)
        ranked = find_register_neurons(self.model, pixels, rule=rule, top_k=_NEURONS[-1]).neurons
        left: dict[int, float] = {}
        for count in _NEURONS:
            left[count] = self._outliers_left(pixels, ranked[:count])
            if not left[count]:
                break
        own.neurons = ranked[: min(left, key=left.get)]
        neurons = [(neuron.layer, neuron.index) for neuron in own.neurons]
        reference = _without(self.model, neurons) if self.subject.planted else None
        own.repairs = repairs(self.model, pixels, neurons, rule=rule, reference=reference, seed=self.options.seed)

    def _outliers_left(self, pixels: _Pixels, neurons: Sequence[Neuron]) -> float:
        """The share of outliers behind the last block with a test-time register for these neurons."""
        with TestTimeRegisters(self.model, [(neuron.layer, neuron.index) for neuron in neurons]) as register:
            recordings = [record(self.model, batch, layout=register.layout) for batch in pixels]
        return float(outliers(patches_of(recordings), self.options.rule)[-1].double().mean())

    def _truths(self, parts: Sequence[Part]) -> tuple[list[list[Box] | None] | None, list[list[Box]] | None]:
        """Annotated boxes in pixels on disk, and in those that the model sees."""
        file = self.options.annotations or (PHOTOGRAPHS if self.options.images is None else None)
        if file is None or not self.options.methods:
            return None, None
        truths = match(read_annotations(file), [path for part in parts for path in part.paths])
        placements = [placement for part in parts for placement in placements_of(part)]
        seen = [[p.to_pixels(box) for box in boxes or ()] for p, boxes in zip(placements, truths, strict=True)]
        return truths, [[box for box in boxes if box[0] < box[2] and box[1] < box[3]] for boxes in seen]

    def _key(self, name: str) -> str:
        """What a part depends on: it is of no use to another model, images or options."""
        digest = hashlib.sha256()
        for key, tensor in self.model.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        described = {"name": name, "version": __version__, "weights": digest.hexdigest(), **self.options.in_words()}
        described["paths"] = [(path, *_stamp(path)) for path in self.images.paths]
        return json.dumps(described, indent=1)


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of a file, which tell a changed one; of a bundled photograph nothing does but the version."""
    if not os.path.exists(path):
        return (0, 0)
    stat = os.stat(path)
    return (stat.st_size, stat.st_mtime_ns)


class _Pixels:
    """The batches of images, as often as one goes through them."""

    def __init__(self, images: ImageFolder, batch: int, device: str) -> None:
        self._images, self._batch, self._device = images, batch, device

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.pixels.to(self._device) for batch in self._images.batches(self._batch))


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
            ratios[layer].append(row.max / row.median if known else None)
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
    pictures = {found.name: np.load(data / _file_name(found.name) / "pictures.npz") for found in report.findings}
    page = output / "index.html"
    write_page(report, pictures, page.with_suffix(".new"), files=list(files))
    os.replace(page.with_suffix(".new"), page)
    return page


def _replaced(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _file_name(name: str) -> str:
    """A folder's name that every file system takes, and no two models share."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".") or "model"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
