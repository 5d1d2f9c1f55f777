"""A whole run on a small model: what it writes, that it goes on where it was cut, and what it says of bad input."""

from __future__ import annotations

import dataclasses
import json
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vit_cases import lively
from vitreg_kernels import RegisterViT, TokenNormMonitor, ViTConfig
from vitreg_kernels.analysis import run as module
from vitreg_kernels.analysis.findings import from_json, to_json
from vitreg_kernels.analysis.images import ImageFolder
from vitreg_kernels.analysis.models import subject
from vitreg_kernels.analysis.options import Options
from vitreg_kernels.analysis.planted import planted
from vitreg_kernels.analysis.run import analyze
from vitreg_kernels.analysis.survey import Survey
from vitreg_kernels.cli import analyze as command
from vitreg_kernels.cli import main, parser
from vitreg_kernels.monitor import CsvWriter

PATCH, SIZE = 8, 32
WRITTEN = ("findings.json", "index.html", "norms.csv", "discovery.csv", "attention.csv")


def vit(seed: int = 0, **changes) -> RegisterViT:
    fields = {"image_size": SIZE, "patch_size": PATCH, "dim": 32, "depth": 3, "num_heads": 2, "num_registers": 2}
    return lively(RegisterViT(ViTConfig(**{**fields, **changes})).eval(), seed)


def with_artifacts(folder: Path) -> RegisterViT:
    """A register neuron planted in block 1, on where these images are flat."""
    (batch,) = ImageFolder(folder, size=SIZE, patch=PATCH).batches(99)
    return planted(vit(), batch.pixels, layer=1, neuron=5)


def saved(model: RegisterViT, path: Path) -> str:
    torch.save({"config": dataclasses.asdict(model.config), "model": model.state_dict()}, path)
    return str(path)


@pytest.fixture
def with_page() -> None:
    """For tests of what is on the page; the others write an empty one, whose figures take most of their time."""


@pytest.fixture(autouse=True)
def without_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "with_page" not in request.fixturenames:
        monkeypatch.setattr(module, "write_page", lambda report, pictures, path, **_: Path(path).write_text(""))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of several shapes, in folders of two classes, and one that is none."""
    root = tmp_path / "images"
    noise = np.random.default_rng(0)
    for i in range(7):
        of_class = root / ("ab"[i % 2])
        of_class.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 255, (40 + 8 * (i % 3), 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(of_class / f"{i}.png")
    (root / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return root


def options(tmp_path: Path, folder: Path, *models: str, **changes) -> Options:
    given = {"images": folder, "output": tmp_path / "report", "batch": 2, "shown": 2, "size": SIZE}
    return Options(models=models, **{**given, **changes})


def test_what_is_written(tmp_path, folder, with_page):
    path = saved(vit(), tmp_path / "small.pt")
    lines = []
    done = analyze(options(tmp_path, folder, path), say=lines.append)
    (found,) = done.report.findings
    assert lines == [f"small.pt: {found.verdict}"]
    assert found.images == 7
    assert found.prefix == ["cls", "register 0", "register 1"]
    assert found.grid == (4, 4)
    assert {row.layer for row in found.norms} == {0, 1, 2}
    assert {row.tokens for row in found.norms} == {"patches", *found.prefix}
    assert [image.path for image in found.shown] == [str(folder / "a" / "0.png"), str(folder / "a" / "2.png")]
    assert [row.method for row in found.discovery] == ["LOST official", "LOST centred", "TokenCut"]
    assert list(done.report.skipped) == [str(folder / "a" / "broken.png")]
    for name in WRITTEN:
        assert (tmp_path / "report" / name).stat().st_size > 0
    assert from_json((tmp_path / "report" / "findings.json").read_text()) == done.report


def test_norms_are_those_of_the_stream(tmp_path, folder):
    """Against one forward of each image alone."""
    model = vit()
    done = analyze(options(tmp_path, folder, saved(model, tmp_path / "small.pt"), skip=frozenset({"boxes", "pca"})))
    (found,) = done.report.findings
    images = ImageFolder(folder, size=SIZE, patch=PATCH)
    tokens = [model.intermediate_layers(batch.pixels, 3, norm=False) for batch in images.batches(1)]
    for layer in range(3):
        norms = torch.cat([each[layer].patches.norm(dim=-1).flatten() for each in tokens])
        (row,) = (row for row in found.norms if row.layer == layer and row.tokens == "patches")
        assert row.count == 7 * 16
        assert row.largest == pytest.approx(norms.max().item(), rel=1e-4)
        assert row.median == pytest.approx(norms.double().quantile(0.5).item(), rel=1e-4)


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_images_that_are_no_squares(tmp_path, folder, fit, with_page):
    done = analyze(options(tmp_path, folder, saved(vit(), tmp_path / "small.pt"), fit=fit, shown=7))
    (found,) = done.report.findings
    patches = next(row.count for row in found.norms if row.tokens == "patches")
    assert found.images == 7
    if fit == "resize":  # three shapes: 5, 4.67 and 4 patches high for 32 pixels of the shorter side
        assert patches > 7 * 16
        shapes = {
            image: np.load(done.page.parent / "data/small.pt/pictures.npz")[f"{image}/norms"].shape
            for image in range(7)
        }
        assert len({*shapes.values()}) > 1
    else:  # the whole image in part of the square
        assert patches < 7 * 16


def test_a_run_that_was_cut_goes_on_to_the_same_files(tmp_path, folder, monkeypatch, with_page):
    path = saved(vit(), tmp_path / "small.pt")
    whole = analyze(options(tmp_path, folder, path, output=tmp_path / "whole"))
    made, own = [], Survey._part

    def part(self, batch, first):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(first)
        return own(self, batch, first)

    monkeypatch.setattr(Survey, "_part", part)
    with pytest.raises(KeyboardInterrupt):
        analyze(options(tmp_path, folder, path))
    made.clear()
    monkeypatch.setattr(Survey, "_part", lambda self, batch, first: made.append(first) or own(self, batch, first))
    again = analyze(options(tmp_path, folder, path, resume=True))
    assert made == [4, 6]
    for name in WRITTEN:
        assert (again.page.parent / name).read_bytes() == (whole.page.parent / name).read_bytes(), name


def test_parts_of_images_that_changed_are_not_taken(tmp_path, folder):
    path = saved(vit(), tmp_path / "small.pt")
    before = analyze(options(tmp_path, folder, path))
    Image.fromarray(np.full((40, 56, 3), 200, np.uint8)).save(folder / "a" / "0.png")
    after = analyze(options(tmp_path, folder, path, resume=True))
    assert before.report.findings[0].norms != after.report.findings[0].norms


def test_parts_of_other_weights_or_options_are_not_taken(tmp_path, folder):
    path = tmp_path / "small.pt"
    analyze(options(tmp_path, folder, saved(vit(0), path)))
    other = analyze(options(tmp_path, folder, saved(vit(1), path), resume=True))
    fresh = analyze(options(tmp_path, folder, str(path), output=tmp_path / "fresh"))
    assert other.report.findings == fresh.report.findings
    larger = analyze(options(tmp_path, folder, str(path), resume=True, size=2 * SIZE))
    assert larger.report.findings[0].grid == (8, 8)


def test_a_part_that_a_cut_left_half_is_made_anew(tmp_path, folder):
    path = saved(vit(), tmp_path / "small.pt")
    whole = analyze(options(tmp_path, folder, path))
    part = tmp_path / "report/data/small.pt/parts/00000002.npz"
    part.write_bytes(part.read_bytes()[:200])
    assert analyze(options(tmp_path, folder, path, resume=True)).report == whole.report
    # Of a removal that was cut, the parts of other weights may be left without what tells so.
    saved(vit(1), tmp_path / "small.pt")
    (tmp_path / "report/data/small.pt/key").unlink()
    other = analyze(options(tmp_path, folder, path, resume=True))
    assert other.report.findings[0].norms != whole.report.findings[0].norms


def test_a_file_that_can_be_read_again_moves_no_image_to_the_findings_of_another(tmp_path, folder, monkeypatch):
    path = saved(vit(), tmp_path / "small.pt")
    own = ImageFolder._load

    def load(self, name, source):
        if name.endswith("a/2.png"):
            raise OSError("the network is away")
        return own(self, name, source)

    monkeypatch.setattr(ImageFolder, "_load", load)
    assert analyze(options(tmp_path, folder, path)).report.findings[0].images == 6
    monkeypatch.undo()
    again = analyze(options(tmp_path, folder, path, resume=True))
    assert again.report.findings == analyze(options(tmp_path, folder, path, output=tmp_path / "fresh")).report.findings


def test_the_same_weights_with_other_heads_or_pixels_are_another_model(tmp_path, folder, monkeypatch):
    model, path = vit(), tmp_path / "small.pt"
    before = analyze(options(tmp_path, folder, saved(model, path)))
    other = RegisterViT(dataclasses.replace(model.config, num_heads=4)).eval()
    other.load_state_dict(model.state_dict())
    after = analyze(options(tmp_path, folder, saved(other, path), resume=True))
    assert before.report.findings[0].norms != after.report.findings[0].norms
    monkeypatch.setattr(module, "subject", lambda spec: subject(spec)._replace(mean=(0.1, 0.2, 0.3)))
    darker = analyze(options(tmp_path, folder, str(path), resume=True))
    assert darker.report.findings[0].norms != after.report.findings[0].norms


def test_nothing_of_the_user_is_taken_away(tmp_path, folder):
    """Whose output folder has a folder of data of their own, even one of the model's name."""
    theirs = [tmp_path / "report/data" / name for name in ("labels.csv", "small.pt/a.json", "voc/parts/a.npz")]
    for file in theirs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    path = saved(vit(), tmp_path / "small.pt")
    analyze(options(tmp_path, folder, path))
    analyze(options(tmp_path, folder, path))
    assert [file.read_text() for file in theirs] == ["mine"] * 3


def test_tables_of_an_earlier_run_do_not_stay_beside_another_page(tmp_path, folder):
    path = saved(vit(), tmp_path / "small.pt")
    first = analyze(options(tmp_path, folder, path, labels="folders"))
    assert (first.page.parent / "probes.csv").exists()
    analyze(options(tmp_path, folder, path, skip=frozenset({"boxes"})))
    assert {file.name for file in first.page.parent.glob("*.csv")} == {"norms.csv", "attention.csv", "sinks.csv"}


def test_a_model_that_overflows_is_unclear_and_keeps_no_other_from_the_page(tmp_path, folder, with_page):
    broken = vit()
    with torch.no_grad():
        broken.blocks[1].mlp.fc2.weight[0, 0] = torch.nan
    paths = saved(vit(), tmp_path / "good.pt"), saved(broken, tmp_path / "broken.pt")
    done = analyze(options(tmp_path, folder, *paths, labels="folders"))
    good, unclear = done.report.findings
    assert (good.word, unclear.word, done.failed) == ("clean", "unclear", {})
    assert {row.layer for row in unclear.norms} == {0}
    assert [row.missing for row in unclear.discovery] == [7, 7, 7]
    assert any("broken.pt gives norms that are not finite for 7 of 7 images" in note for note in done.report.notes)


def test_what_a_model_cannot_take_leaves_the_others(tmp_path, folder, monkeypatch):
    paths = saved(vit(), tmp_path / "a.pt"), saved(vit(depth=5), tmp_path / "b.pt")
    done = analyze(options(tmp_path, folder, *paths, boxes=("layer=4",)))
    assert [found.name for found in done.report.findings] == ["b.pt"]
    assert done.failed == {paths[0]: "there is no layer 4: the model has 3 blocks"}
    own = Survey._part

    def part(self, batch, first):
        if self.model.config.depth == 5:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return own(self, batch, first)

    monkeypatch.setattr(Survey, "_part", part)
    done = analyze(options(tmp_path, folder, *paths))
    assert done.failed == {paths[1]: "out of memory, give a smaller batch or size: tried to allocate 1 TiB"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"annotations": "none.json"}, "none.json"),
        ({"annotations": "boxes.json"}, "none of 8 images is annotated"),
        ({"labels": "none.csv"}, "there is no file none.csv"),
    ],
)
def test_annotations_and_labels_are_read_before_any_model_runs(tmp_path, folder, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    Path("boxes.json").write_text('{"boxes": {"elsewhere": []}}')
    given = {name: Path(value) if name == "annotations" else value for name, value in given.items()}
    monkeypatch.setattr(module, "subject", lambda spec: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        analyze(options(tmp_path, folder, "small.pt", **given))


@pytest.fixture
def flat_in_places(tmp_path: Path) -> Path:
    """Twelve images of noise of which one patch each is grey, somewhere else in each."""
    root = tmp_path / "flat"
    root.mkdir()
    noise = np.random.default_rng(1)
    for i in range(12):
        pixels = noise.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        row, column = (PATCH * place for place in divmod(i, 4))
        pixels[row : row + PATCH, column : column + PATCH] = 128
        Image.fromarray(pixels).save(root / f"{i:02}.png")
    return root


def test_artifacts_and_a_test_time_register(tmp_path, flat_in_places, monkeypatch, with_page):
    path = saved(with_artifacts(flat_in_places), tmp_path / "small.pt")
    asked = options(tmp_path, flat_in_places, path, test_time_registers=True, batch=6)
    done = analyze(asked)
    plain, repaired = done.report.findings
    assert plain.word == "artifacts"
    assert plain.first_layer == 1
    assert plain.images_with_outliers >= 4  # a neuron that is on at 2% of the patches
    flat = [[float(4 * row + column < 12) for column in range(4)] for row in range(4)]
    assert all(
        found <= 1 / 12 + 1e-6 and found <= is_flat
        for row in zip(plain.frequency, flat, strict=True)
        for found, is_flat in zip(*row, strict=True)
    )
    assert (plain.neurons[0].layer, plain.neurons[0].index) == (1, 5)
    assert {row.name: row.outliers > 0 for row in plain.repairs} == {
        "as it is": True,
        "empty token": True,
        "test-time register": False,
        "random neurons moved": True,
        "neurons zeroed, empty token": False,
    }
    assert repaired.name == "small.pt + test-time register"
    assert repaired.word == "clean"
    assert repaired.prefix == [*plain.prefix, "register 2"]

    def again(*_, **__):
        pytest.fail("was looked for again")

    monkeypatch.setattr(module, "find_register_neurons", again)
    monkeypatch.setattr(module, "repairs", again)
    resumed = analyze(dataclasses.replace(asked, resume=True))
    assert to_json(resumed.report) == to_json(done.report)


def test_of_the_images_no_tokens_are_kept(tmp_path, flat_in_places, monkeypatch):
    """While numbers of register neurons are tried, embeddings of one batch alone are in memory."""
    held, own = [], module.record

    def recorded(*args, **options):
        assert sum(embeddings() is not None for embeddings in held) <= 1
        recording = own(*args, **options)
        held.append(weakref.ref(recording.embeddings))
        return recording

    monkeypatch.setattr(module, "record", recorded)
    path = saved(with_artifacts(flat_in_places), tmp_path / "small.pt")
    skip = frozenset({"boxes", "pca", "attention", "similarity", "probes"})
    asked = options(tmp_path, flat_in_places, path, test_time_registers=True, batch=4, skip=skip)
    plain, _ = analyze(asked).report.findings
    assert len(held) >= 3
    assert (plain.attention, plain.sinks, plain.similarity, plain.cls_similarity) == ([], [], None, None)


def test_a_model_of_which_no_register_neurons_are_known_is_shown_without(tmp_path, flat_in_places, monkeypatch):
    def unknown(*_, **__):
        raise ValueError("the neurons of blocks.0 are not known")

    monkeypatch.setattr(module, "find_register_neurons", unknown)
    path = saved(with_artifacts(flat_in_places), tmp_path / "small.pt")
    done = analyze(options(tmp_path, flat_in_places, path, test_time_registers=True, batch=6))
    assert [found.word for found in done.report.findings] == ["artifacts"]
    assert done.failed == {}
    assert "not shown with a test-time register: the neurons of blocks.0 are not known" in " ".join(done.report.notes)


def test_a_test_time_register_with_padding(tmp_path, flat_in_places):
    """The same images without their last row of patches, which is padding then."""
    wide = tmp_path / "wide"
    wide.mkdir()
    for file in flat_in_places.iterdir():
        with Image.open(file) as image:
            image.crop((0, 0, SIZE, SIZE - PATCH)).save(wide / file.name)
    path = saved(with_artifacts(flat_in_places), tmp_path / "small.pt")
    asked = options(tmp_path, wide, path, test_time_registers=True, batch=6, fit="pad")
    plain, repaired = analyze(asked).report.findings
    assert next(row.count for row in plain.norms if row.tokens == "patches") == 12 * 12
    assert (plain.word, repaired.word) == ("artifacts", "clean")
    assert (plain.neurons[0].layer, plain.neurons[0].index) == (1, 5)
    last = [row for row in plain.norms if row.tokens == "patches"][-1]
    assert plain.repairs[0].outliers == pytest.approx(last.outliers)
    assert plain.repairs[0].largest_ratio == pytest.approx(last.largest / last.median, rel=1e-5)


def test_drift_of_a_planted_model_is_from_the_one_without_its_neuron(tmp_path, flat_in_places, monkeypatch):
    path = saved(with_artifacts(flat_in_places), tmp_path / "small.pt")
    monkeypatch.setattr(module, "subject", lambda spec: subject(spec)._replace(planted=True))
    asked = options(tmp_path, flat_in_places, path, test_time_registers=True, batch=6)
    plain, _ = analyze(asked).report.findings
    assert plain.repairs[0].name == "as it is"
    assert plain.repairs[0].drift > 0  # of a model that was not planted it is None: there is no other to drift from
    without = next(row for row in plain.repairs if row.name.startswith("neurons zeroed"))
    assert without.drift > 0  # what an empty token costs


def test_several_models_and_one_that_cannot_be_read(tmp_path, folder):
    first, second = saved(vit(0), tmp_path / "a.pt"), saved(vit(1), tmp_path / "b.pt")
    done = analyze(options(tmp_path, folder, first, str(tmp_path / "none.pt"), second))
    assert [found.name for found in done.report.findings] == ["a.pt", "b.pt"]
    assert list(done.failed) == [str(tmp_path / "none.pt")]
    assert any("none.pt was left out: there is no model, file or folder" in note for note in done.report.notes)


def test_a_model_of_images_and_text_with_a_scale_that_is_one_number(tmp_path, folder):
    """CLIP's, on images larger than its own."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {**sizes, "image_size": SIZE, "patch_size": PATCH}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=sizes | {"vocab_size": 9}))
    assert model.logit_scale.dim() == 0
    model.save_pretrained(tmp_path / "clip")
    (found,) = analyze(options(tmp_path, folder, f"hf:{tmp_path / 'clip'}", size=48)).report.findings
    assert (found.grid, found.prefix, found.layers) == ((6, 6), ["cls"], 2)


def test_probes_of_labels(tmp_path, folder):
    done = analyze(options(tmp_path, folder, saved(vit(), tmp_path / "small.pt"), labels="folders"))
    probes = {probe.tokens: probe for probe in done.report.findings[0].probes}
    assert probes.keys() == {"cls", "register 0", "register 1", "normal", "outlier"}
    assert "too few images" in probes["outlier"].note


def test_the_history_of_a_run(tmp_path, folder):
    model = vit()
    history = CsvWriter(tmp_path / "norms.csv")
    with TokenNormMonitor(model) as monitor, torch.no_grad():
        for step in (1, 2):
            model(torch.randn(2, 3, SIZE, SIZE))
            history.write(step, monitor.compute())
            monitor.reset()
    done = analyze(options(tmp_path, folder, saved(model, tmp_path / "small.pt"), history=tmp_path / "norms.csv"))
    shown = done.report.findings[0].history
    assert shown.steps == [1, 2]
    assert list(shown.largest_ratio) == ["embedding", "blocks.0", "blocks.1", "blocks.2"]
    assert all(ratio >= 1.0 for ratios in shown.largest_ratio.values() for ratio in ratios)


def test_the_history_of_a_run_that_diverged(tmp_path):
    model = vit()
    with TokenNormMonitor(model) as monitor, torch.no_grad():
        model(torch.full((2, 3, SIZE, SIZE), torch.inf))
        CsvWriter(tmp_path / "norms.csv").write(1, monitor.compute())
    ratios = module._history(tmp_path / "norms.csv").largest_ratio
    assert ratios["blocks.2"] == [None]  # which JSON holds


def test_annotations(tmp_path, folder):
    """In pixels on disk, and drawn where the model sees them."""
    boxes = {"boxes": {"0": [{"box": [8, 0, 48, 40]}, {"box": [0, 0, 7, 40]}]}}  # the latter is cropped away
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    path = saved(vit(), tmp_path / "small.pt")
    done = analyze(options(tmp_path, folder, path, annotations=tmp_path / "boxes.json", boxes=("official",)))
    (found,) = done.report.findings
    assert found.discovery[0].whole_image_corloc == 1.0  # the box is what the model sees: the central square
    assert found.shown[0].truths == [(0, 0, SIZE, SIZE)]


def test_that_nobody_reads_on_is_no_fault_of_a_model(tmp_path, folder, monkeypatch, with_page):
    """As behind ``| head``; ``cli.main`` sees to it, of every command."""
    lines = []

    def unread(line="", *, file=None, **_):
        if file is None:
            lines.append(line)
            if len(lines) == 1:  # so that nothing after it raises the same
                raise BrokenPipeError

    path = saved(vit(), tmp_path / "small.pt")
    asked = ["analyze", "--model", path, "--images", str(folder), "-o", str(tmp_path / "out"), "--size", str(SIZE)]
    monkeypatch.setattr("builtins.print", unread)
    with pytest.raises(BrokenPipeError):
        command.run(parser().parse_args([*asked, "--skip", "boxes"]))
    assert len(lines) == 1


def test_the_command(tmp_path, folder, capsys, monkeypatch, with_page):
    path = saved(vit(), tmp_path / "small.pt")
    asked = ["analyze", "--model", path, "--images", str(folder), "-o", str(tmp_path / "out"), "--size", str(SIZE)]
    assert main([*asked, "--skip", "boxes", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith("small.pt: ")
    assert printed.out.splitlines()[-1] == f"the page: {tmp_path / 'out' / 'index.html'}"
    assert "broken.png: " in printed.err
    assert main([*asked, "--model", "none.pt", "--skip", "boxes"]) == 1
    with monkeypatch.context() as cut:
        cut.setattr(Survey, "_part", lambda *_: signal.raise_signal(signal.SIGINT))
        assert main(asked) == 130
    assert "with --resume goes on" in capsys.readouterr().err
    for wrong, words in (
        (["--outliers", "many"], "a rule for outliers is one of"),
        (["--skip", "norms"], "norms cannot be skipped: expected of similarity"),
        (["--boxes", "best"], "options of LOST must be"),
        (["--batch", "0"], "batch=0 must be at least 1"),
        (["--limit", "0"], "limit=0 must be at least 1"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--size", "33"], "size=33 must be a multiple of the patch size 8"),
        (["--device", "abacus"], "cannot analyze on device 'abacus'"),
        (["--history", "none.csv"], "none.csv"),
        (["--images", "nowhere"], "there is no file or folder nowhere"),
    ):
        capsys.readouterr()
        assert main([*asked, *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("vitreg analyze: ")
        assert words in line
