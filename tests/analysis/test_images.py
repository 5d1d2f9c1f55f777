"""Images of any kind become what a model takes, what cannot be read is named, and boxes find their way back."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="images are read by Pillow: pip install 'vitreg_kernels[analysis]'")

from PIL import Image

from vitreg_kernels.analysis.images import IMAGENET_MEAN, IMAGENET_STD, ImageFolder, Placement

FITS = ("crop", "resize", "pad")
SIZES = ((61, 61), (97, 61), (61, 97), (331, 203), (20, 45))  # width, height
# What turns an upright image into the one stored, for viewers to turn back.
T = Image.Transpose
STORED = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
STORED |= {6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}


def save(image, path, *, orientation=1, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image.transpose(STORED[orientation]) if orientation in STORED else image
    image.save(path, exif=exif, **options)
    return path


def plain(width=30, height=20, colour=(200, 100, 50)):
    return Image.new("RGB", (width, height), colour)


def read(path, **options):
    (image,) = ImageFolder(path, **{"size": 56, "patch": 14, **options})
    return image


def drawn(width, height, box):
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    canvas[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(canvas)


def found(pixels):
    rows, columns = torch.where(pixels.mean(0) > 0.5)
    return columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1


class TestPlacement:
    @pytest.mark.parametrize("fit", FITS)
    @pytest.mark.parametrize(("size", "orientation"), [*((s, 1) for s in SIZES), *((SIZES[1], i) for i in range(2, 9))])
    def test_a_box_drawn_is_found_where_it_is(self, tmp_path, size, fit, orientation):
        """Enlarged, so that the pixels tell it exactly."""
        width, height = size
        middle = (width // 2, height // 2)
        box = (middle[0] - 7, middle[1] - 5, middle[0] + 3, middle[1] + 8)
        path = save(drawn(width, height, box), tmp_path / "box.png", orientation=orientation)
        image = read(path, size=14 * 48, fit=fit, mean=(0.0,) * 3)
        assert image.size == size
        assert image.placement.to_image(found(image.pixels)) == box
        assert image.pixels.min() >= 0  # cubics overshoot at edges
        assert image.pixels.max() <= 1
        for edge, seen in zip(image.placement.to_pixels(box), found(image.pixels), strict=True):
            assert abs(edge - seen) <= 1  # an edge within a pixel leaves it dark or bright

    @pytest.mark.parametrize("fit", FITS)
    @pytest.mark.parametrize("size", SIZES)
    def test_no_box_changes_on_the_way_there_and_back(self, size, fit):
        """By way of the larger grid of pixels."""
        for side in (28, 42, 14 * 50):
            place = Placement.of(*size, size=side, fit=fit, patch=14)
            left, top, right, bottom = place.window
            larger = place.width >= right - left and place.height >= bottom - top
            smaller = place.width <= right - left and place.height <= bottom - top
            assert larger or smaller
            there, back = (place.to_pixels, place.to_image) if larger else (place.to_image, place.to_pixels)
            x0, y0, x1, y1 = place.window if larger else (0, 0, place.width, place.height)
            for x in range(x0, x1):
                y = y0 + (x - x0) % (y1 - y0)
                assert back(there((x, y, x1, y1))) == (x, y, x1, y1)
                assert back(there((x0, y0, x + 1, y + 1))) == (x0, y0, x + 1, y + 1)

    def test_what_lies_outside_is_cut_off(self):
        crop = Placement.of(90, 30, size=60, fit="crop", patch=10)
        assert crop.window == (30, 0, 60, 30)
        assert crop.to_pixels((0, 10, 45, 30)) == (0, 20, 30, 60)
        left, _, right, _ = crop.to_pixels((0, 0, 30, 30))
        assert left == right
        pad = Placement.of(90, 30, size=60, fit="pad", patch=10)
        assert (pad.height, pad.width) == (20, 60)
        assert pad.to_image((30, 10, 60, 60)) == (45, 15, 90, 30)


class TestFits:
    def test_crop_takes_the_central_square(self):
        canvas = np.random.default_rng(0).integers(0, 256, (28, 43, 3), dtype=np.uint8)
        (image,) = ImageFolder([("noise", canvas)], size=28, patch=14)
        np.testing.assert_allclose(image.pixels.permute(1, 2, 0).numpy(), canvas[:, 7:35] / 255.0, atol=1e-6)

    @pytest.mark.parametrize("size", SIZES)
    def test_resize_keeps_the_aspect_up_to_half_a_patch(self, size):
        width, height = size
        place = Placement.of(width, height, size=56, fit="resize", patch=14)
        assert min(place.height, place.width) == 56
        assert place.height % 14 == place.width % 14 == 0
        assert place.window == (0, 0, width, height)
        scale = 56 / min(size)
        assert abs(place.width - width * scale) <= 7
        assert abs(place.height - height * scale) <= 7

    @pytest.mark.parametrize("size", SIZES)
    def test_padding_is_zero_and_marked(self, size):
        image = plain(*size)
        (batch,) = ImageFolder([("plain", np.asarray(image))], size=70, patch=14, fit="pad").batches(1)
        (loaded,) = batch.images
        assert batch.pixels.shape == (1, 3, 70, 70)
        shown = torch.zeros(70, 70)
        shown[: loaded.placement.height, : loaded.placement.width] = 1
        assert max(loaded.placement.height, loaded.placement.width) == 70
        assert (batch.pixels[0][:, shown == 0] == 0).all()
        assert (batch.pixels[0][:, shown == 1] != 0).all()
        patches = [
            shown[14 * i : 14 * i + 14, 14 * j : 14 * j + 14].mean().item() >= 0.5 for i in range(5) for j in range(5)
        ]
        assert batch.valid[0].tolist() == patches

    def test_resizing_does_not_alias(self):
        """Stripes of one pixel become grey; without a filter they would become stripes or a flat black."""
        stripes = np.zeros((240, 240, 3), dtype=np.uint8)
        stripes[:, ::2] = 255
        (image,) = ImageFolder([("stripes", stripes)], size=56, patch=14)
        inside = image.pixels[:, 3:-3, 3:-3]
        assert (inside - 0.5).abs().max() < 0.05

    def test_pixels_are_normalised(self):
        (batch,) = ImageFolder([("plain", np.asarray(plain()))], size=28, patch=14).batches(1)
        colour = torch.tensor([200, 100, 50]) / 255
        expected = (colour - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        torch.testing.assert_close(batch.pixels[0].mean((1, 2)), expected)


class TestKinds:
    """Every kind of pixel, as RGB in [0, 1]."""

    @pytest.mark.parametrize(
        ("kind", "name", "colour"),
        [
            ("RGB", "x.png", (200, 100, 50)),
            ("P", "x.png", (200, 100, 50)),
            ("P", "x.gif", (200, 100, 50)),
            ("CMYK", "x.jpg", (200, 100, 50)),
            ("RGB", "x.WEBP", (200, 100, 50)),
            ("RGB", "x.bmp", (200, 100, 50)),
            ("RGB", "x.tif", (200, 100, 50)),
            ("L", "x.png", (124, 124, 124)),
            ("1", "x.png", (255, 255, 255)),
        ],
    )
    def test_opaque(self, tmp_path, kind, name, colour):
        image = plain(colour=(255,) * 3) if kind == "1" else plain()
        image = image.quantize() if kind == "P" else image.convert(kind)
        image.save(tmp_path / name)
        (loaded,) = ImageFolder(tmp_path, size=28, patch=14)
        expected = torch.tensor(colour) / 255
        torch.testing.assert_close(loaded.pixels.mean((1, 2)), expected, atol=0.015, rtol=0)

    @pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
    def test_transparent_is_white_and_half_transparent_half_white(self, tmp_path, kind):
        image = plain(20, 20, (0, 0, 0)).convert("LA" if kind == "LA" else "RGBA")
        image.putalpha(Image.linear_gradient("L").resize((20, 20)).point(lambda x: 0 if x < 128 else 255))
        (image.quantize() if kind == "P" else image).save(tmp_path / "x.png")
        pixels = read(tmp_path / "x.png").pixels
        assert pixels[:, :20].min() > 0.99
        assert pixels[:, 36:].max() < 0.01
        image.putalpha(51)
        image.save(tmp_path / "x.png")
        assert read(tmp_path / "x.png").pixels.mean().item() == pytest.approx(0.8)

    @pytest.mark.parametrize("name", ["x.png", "x.tif"])
    def test_16_bits_are_not_cut_off_at_255(self, tmp_path, name):
        Image.fromarray(np.full((20, 20), 13107, dtype=np.uint16)).save(tmp_path / name)
        torch.testing.assert_close(read(tmp_path / name).pixels, torch.full((3, 56, 56), 0.2))

    def test_arrays_with_names(self):
        arrays = [("grey", np.full((20, 30), 51, dtype=np.uint8)), ("clear", np.zeros((20, 30, 4), dtype=np.uint8))]
        grey, clear = ImageFolder(arrays, size=28, patch=14)
        assert (grey.path, clear.path) == ("grey", "clear")
        assert grey.size == (30, 20)
        torch.testing.assert_close(grey.pixels, torch.full((3, 28, 28), 0.2))
        torch.testing.assert_close(clear.pixels, torch.ones(3, 28, 28))

    @pytest.mark.parametrize("array", [np.zeros((20, 30)), np.zeros((3, 20, 30), dtype=np.uint8)])
    def test_other_arrays_are_refused(self, array):
        with pytest.raises(ValueError, match=r"^the image x must be uint8 \[height, width\]"):
            ImageFolder([("x", array)], size=28, patch=14)


class TestFolders:
    def test_images_are_sorted_and_of_all_folders_within(self, tmp_path):
        (tmp_path / "b" / "deep").mkdir(parents=True)
        for name in ("c.png", "a.JPG", "b/2.jpeg", "b/10.jpg", "b/deep/x.webp"):
            plain().save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("no image")
        folder = ImageFolder(str(tmp_path), size=28, patch=14)
        expected = [str(tmp_path / x) for x in ("a.JPG", "b/10.jpg", "b/2.jpeg", "b/deep/x.webp", "c.png")]
        assert folder.paths == [image.path for image in folder] == expected
        assert len(folder) == 5
        assert not folder.skipped

    def test_batches_are_of_one_grid_and_in_order(self, tmp_path):
        shapes = [(30, 20)] * 3 + [(20, 30)] + [(30, 20)] * 2 + [(30, 30)]
        for i, shape in enumerate(shapes):
            plain(*shape).save(tmp_path / f"{i}.png")
        batches = list(ImageFolder(tmp_path, size=28, patch=14, fit="resize").batches(2))
        assert [len(batch.images) for batch in batches] == [2, 1, 1, 2, 1]
        assert [batch.grid for batch in batches] == [(2, 3), (2, 3), (3, 2), (2, 3), (2, 2)]
        for batch in batches:
            rows, columns = batch.grid
            assert batch.pixels.shape == (len(batch.images), 3, 14 * rows, 14 * columns)
            assert batch.valid.shape == (len(batch.images), rows * columns)
            assert batch.valid.all()
        assert [os.path.basename(i.path) for b in batches for i in b.images] == [f"{i}.png" for i in range(7)]
        (square,) = ImageFolder(tmp_path, size=28, patch=14).batches(8)
        assert square.pixels.shape == (7, 3, 28, 28)

    def test_the_limit_counts_what_can_be_read(self, tmp_path):
        (tmp_path / "0.png").write_bytes(b"")
        for i in range(1, 4):
            plain().save(tmp_path / f"{i}.png")
        folder = ImageFolder(tmp_path, size=28, patch=14, limit=2)
        assert len(folder) == 2
        assert [os.path.basename(image.path) for image in folder] == ["1.png", "2.png"]


class TestBroken:
    """What cannot be read is named, with the reason, and the others are read."""

    def broken(self, tmp_path, name, **options):
        plain().save(tmp_path / "a.png")
        plain().save(tmp_path / "z.png")
        folder = ImageFolder(tmp_path, **{"size": 56, "patch": 14, **options})
        assert [os.path.basename(image.path) for image in folder] == ["a.png", "z.png"]
        assert list(folder.skipped) == [str(tmp_path / name)]
        return folder.skipped[str(tmp_path / name)]

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
    def test_cut_off(self, tmp_path, suffix):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"b.{suffix}")
        content = (tmp_path / f"b.{suffix}").read_bytes()
        (tmp_path / f"b.{suffix}").write_bytes(content[: len(content) // 2])
        assert self.broken(tmp_path, f"b.{suffix}")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "it is empty"),
            (b"<html>not found</html>", "it is no image of a format known"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "it is no image of a format known"),
        ],
    )
    def test_no_image(self, tmp_path, content, reason):
        (tmp_path / "b.jpg").write_bytes(content)
        assert self.broken(tmp_path, "b.jpg").startswith(reason)

    @pytest.mark.parametrize("times", [1.5, 3])
    def test_a_decompression_bomb(self, tmp_path, monkeypatch, times):
        """Pillow warns beyond its limit, and raises beyond twice that."""
        plain(100, 100).save(tmp_path / "b.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / times))
        assert self.broken(tmp_path, "b.png") == "it has more pixels than Pillow holds for safe: make it smaller"

    def test_an_unreadable_file_and_folder(self, tmp_path, monkeypatch):
        plain().save(tmp_path / "a.png")
        plain().save(tmp_path / "b.png")
        (tmp_path / "closed").mkdir()
        opened, listed = Image.open, os.scandir

        def refuse(path, *arguments, **options):
            if os.path.basename(path) in ("b.png", "closed"):
                raise PermissionError(13, "Permission denied", str(path))
            return (listed if os.path.isdir(path) else opened)(path, *arguments, **options)

        monkeypatch.setattr(os, "scandir", refuse)
        monkeypatch.setattr(Image, "open", refuse)
        folder = ImageFolder(tmp_path, size=28, patch=14)
        assert [image.path for image in folder] == [str(tmp_path / "a.png")]
        assert folder.skipped[str(tmp_path / "closed")] == "the folder cannot be read: Permission denied"
        assert "Permission denied" in folder.skipped[str(tmp_path / "b.png")]

    def test_a_name_that_no_page_can_hold(self, tmp_path):
        plain().save(tmp_path / "a.png")
        os.rename(save(plain(), tmp_path / "b.png"), os.fsencode(tmp_path) + b"/caf\xe9.png")
        folder = ImageFolder(tmp_path, size=28, patch=14)
        assert folder.paths == [str(tmp_path / "a.png")]
        assert folder.skipped == {f"{tmp_path}/caf\\xe9.png": "its name is not UTF-8: rename it"}
        assert all(name.encode() for name in folder.skipped)
        with pytest.raises(ValueError, match="its name is not UTF-8: rename it"):
            ImageFolder(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"), size=28, patch=14)

    def test_values_without_a_white(self, tmp_path):
        Image.fromarray(np.ones((20, 20), dtype=np.float32)).save(tmp_path / "b.tif")
        assert self.broken(tmp_path, "b.tif").startswith("its values, float32, have no known white")

    @pytest.mark.parametrize(
        ("fit", "reason"),
        [
            ("resize", "it is 1700 x 10, more than 1 : 16: give fit='crop' or fit='pad'"),
            ("pad", "it is 1700 x 10, at 56 px less than half a patch high or wide"),
        ],
    )
    def test_too_narrow(self, tmp_path, fit, reason):
        plain(1700, 10).save(tmp_path / "b.png")
        assert self.broken(tmp_path, "b.png", fit=fit) == reason

    def test_an_array_without_pixels(self):
        arrays = [("none", np.zeros((0, 30, 3), dtype=np.uint8)), ("some", np.zeros((20, 30, 3), dtype=np.uint8))]
        folder = ImageFolder(arrays, size=28, patch=14)
        assert [image.path for image in folder] == ["some"]
        assert list(folder.skipped) == ["none"]

    def test_nothing_that_can_be_read(self, tmp_path):
        (tmp_path / "b.jpg").write_bytes(b"")
        folder = ImageFolder(tmp_path, size=28, patch=14)
        with pytest.raises(ValueError, match=r"^none of the 1 images can be read; .*b\.jpg: it is empty$"):
            list(folder.batches(1))


class TestRefusals:
    def test_a_folder_without_images(self, tmp_path):
        (tmp_path / "notes.txt").write_text("no image")
        with pytest.raises(ValueError, match=r"^there are no images in .*: their names would end in .*\.jpg, .*\.png"):
            ImageFolder(tmp_path, size=28, patch=14)
        with pytest.raises(ValueError, match=r"^no images were given$"):
            ImageFolder([], size=28, patch=14)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^there is no file or folder .*nowhere$"):
            ImageFolder(tmp_path / "nowhere", size=28, patch=14)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"size": 30}, "size=30 must be a multiple of the patch size 14, as 28 or 42"),
            ({"size": 7}, "size=7 must be a multiple of the patch size 14, as 14 or 28"),
            ({"fit": "stretch"}, "fit must be one of 'crop', 'resize', 'pad', not 'stretch'"),
            ({"limit": 0}, "limit=0 must be at least 1"),
        ],
    )
    def test_options(self, options, sentence):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            ImageFolder([("x", np.zeros((20, 30), dtype=np.uint8))], **{"size": 28, "patch": 14, **options})

    def test_a_batch_of_nothing(self):
        folder = ImageFolder([("x", np.zeros((20, 30), dtype=np.uint8))], size=28, patch=14)
        with pytest.raises(ValueError, match=r"^batch_size=0 must be at least 1$"):
            next(folder.batches(0))
