"""Annotations of VOC, COCO and our own kind, what is broken in them, and which image each is of."""

from __future__ import annotations

import json

import pytest

from vitreg_kernels.analysis.annotations import PHOTOGRAPHS, match, read_annotations

BOMB = """<!DOCTYPE bomb [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><annotation>&b;</annotation>"""
OUTSIDE = """<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]><annotation>&e;</annotation>"""


def voc_object(*sides, inside=""):
    named = "".join(f"<{n}>{s}</{n}>" for n, s in zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=True))
    return f"<object><name>dog</name><difficult>1</difficult>{inside}<bndbox>{named}</bndbox></object>"


def voc(*objects):
    return f"<annotation><size><width>9</width></size>{''.join(objects)}</annotation>"


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_ending_of_an_image_is_left_off_a_name():
    boxes = {"a.jpg": [(0, 0, 1, 1)], "b": [(0, 0, 2, 2)], "c.v1": [(0, 0, 3, 3)]}
    assert match(boxes, ["x/a.jfif", "x/b.jp2", "x/c.v1.avif"]) == list(boxes.values())


def test_voc_counts_from_one_and_includes_the_last(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    content = voc(voc_object(1, 1, 500, 375), voc_object(48, 240.5, 195, 371, inside=part))
    written(tmp_path / "000001.xml", content)
    written(tmp_path / "deeper" / "img.v2.xml", voc())
    assert read_annotations(tmp_path) == {
        "000001": [(0, 0, 500, 375), (47, 239.5, 195, 371)],
        "deeper/img.v2": [],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation><object>", "000001.xml is no XML that is read here: "),
        ("", "is no XML that is read here: "),
        (b"<?xml version='1.0' encoding='klingon'?><annotation/>", "is no XML that is read here: "),
        ("<html></html>", "holds <html>, not <annotation>"),
        (voc("<object><name>dog</name></object>"), "needs a bndbox of xmin, ymin, xmax, ymax"),
        (voc(voc_object(1, 1, "wide", 5)), "needs a bndbox.*'wide'"),
        (voc(voc_object(1, 1, "nan", 5)), "four finite numbers"),
        (voc(voc_object(10, 1, 3, 5)), "ends before it begins"),
        (BOMB, "declares a document type"),
        (OUTSIDE, "declares a document type"),
        (('<?xml version="1.0" encoding="utf-16"?>' + BOMB).encode("utf-16"), "declares a document type"),
        ('<!DOCTYPE annotation SYSTEM "voc.dtd"><annotation/>', "declares a document type"),
    ],
)
def test_broken_voc_files_are_named(tmp_path, content, message):
    written(tmp_path / "000001.xml", content)
    with pytest.raises(ValueError, match=message) as raised:
        read_annotations(tmp_path)
    assert "000001.xml" in str(raised.value)


def coco(**changes):
    content = {
        "images": [{"id": 7, "file_name": "val/a.jpg"}, {"id": 9, "file_name": "val/b.jpg"}],
        "annotations": [
            {"image_id": 7, "bbox": [10, 20, 30.5, 40], "iscrowd": 0},
            {"image_id": 7, "bbox": [0, 0, 100, 100], "iscrowd": 1},
            {"image_id": 7, "bbox": [1, 2, 0, 4]},
        ],
    }
    return json.dumps(content | changes)


def test_coco_gives_corner_and_size_and_its_crowds_are_left_out(tmp_path):
    path = written(tmp_path / "instances.json", coco())
    assert read_annotations(path) == {"val/a.jpg": [(10, 20, 40.5, 60), (1, 2, 1, 6)], "val/b.jpg": []}


def test_our_own(tmp_path):
    boxes = {"a": [{"name": "dog", "box": [1, 2, 3, 4]}, {"box": [0, 0, 9, 9]}], "b.png": []}
    path = written(tmp_path / "mine.json", json.dumps({"about": "drawn by me", "boxes": boxes}))
    assert read_annotations(path) == {"a": [(1, 2, 3, 4), (0, 0, 9, 9)], "b.png": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "neither a folder of VOC's XML files nor JSON"),
        (b"\xff\xfe\xff", "neither a folder of VOC's XML files nor JSON"),
        ("[" * 200_000, "neither a folder of VOC's XML files nor JSON"),
        ("[]", 'neither "images" and "annotations", as COCO has, nor "boxes"'),
        ('{"boxes": []}', 'nor "boxes"'),
        ('{"boxes": {"a": [[1, 2, 3, 4]]}}', "image 'a': expected a list of objects"),
        ('{"boxes": {"a": [{"box": [1, 2, 3]}]}}', r"image 'a': a box must be four finite numbers, not \[1, 2, 3\]"),
        ('{"boxes": {"a": [{"box": [1, 2, NaN, 4]}]}}', "four finite numbers"),
        ('{"boxes": {"a": [{"box": [1, 2, "3", 4]}]}}', "four finite numbers"),
        ('{"boxes": {"a": [{"box": [100, 50, 30, 40]}]}}', "image 'a'.*ends before it begins"),
        (coco(images=[{"id": 7}]), "every image needs id and file_name.*KeyError: 'file_name'"),
        (coco(images=7), "every image needs id and file_name"),
        (coco(annotations=[{"image_id": 7}]), "KeyError: 'bbox'"),
        (coco(annotations=[{"image_id": [7], "bbox": [1, 2, 3, 4]}]), "TypeError"),
        (coco(annotations=[{"image_id": 8, "bbox": [1, 2, 3, 4]}]), "of image 8, which is not among its images"),
        (coco(annotations=[{"image_id": 7, "bbox": [1, 2, -3, 4]}]), "image 'val/a.jpg'.*ends before it begins"),
        (coco(annotations=[{"image_id": 7, "bbox": None}]), "image 'val/a.jpg': a box must be four"),
        (coco(images=[{"id": 7, "file_name": "a.jpg"}] * 2), "that of several images"),
        (coco(images=[{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "a.jpg"}]), "that of several images"),
    ],
)
def test_broken_json_files_are_named(tmp_path, content, message):
    path = written(tmp_path / "boxes.json", content)
    with pytest.raises(ValueError, match=message) as raised:
        read_annotations(path)
    assert "boxes.json" in str(raised.value)


def test_a_folder_without_annotations_and_a_path_without_anything(tmp_path):
    with pytest.raises(ValueError, match="has no XML file"):
        read_annotations(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_annotations(tmp_path / "nothing.json")


A, B = [(0, 0, 1, 1)], [(0, 0, 2, 2)]


@pytest.mark.parametrize(
    ("annotations", "paths", "expected"),
    [
        ({"000001": A, "000002": B}, ["JPEGImages/000002.jpg", "JPEGImages/000003.jpg"], [B, None]),
        ({"train2014/a.jpg": A}, ["/data/images/a.png"], [A]),
        ({"img.v2": A, "img": B}, ["img.v2.jpg", "img.JPG"], [A, B]),
        ({"a.jpg": A, "a.png": B}, ["x/a.png", "x/a.jpg"], [B, A]),
        ({"x/a.jpg": A, "y/a.jpg": B}, ["/data/y/a.jpg", "/data/x/a.jpg"], [B, A]),
        ({"q/x/a": A, "p/x/a": B}, ["/data/p/x/a.jpg"], [B]),
        ({"astronaut": A}, ["astronaut", "retina"], [A, None]),
        ({"a": A}, [], []),
    ],
    ids=["VOC", "other folder", "dots", "suffixes", "folders", "deep folders", "no files", "no images"],
)
def test_images_find_their_annotations(annotations, paths, expected):
    assert match(annotations, paths) == expected


@pytest.mark.parametrize(
    ("annotations", "paths", "message"),
    [
        ({"a": A}, ["x/a.jpg", "y/a.jpg"], "'a' could be that of 'x/a.jpg' and of 'y/a.jpg'"),
        ({"x/a.jpg": A}, ["x/a.jpg", "y/a.jpg"], "'x/a.jpg' could be that of"),
        ({"x/a.jpg": A, "y/a.jpg": B}, ["z/a.jpg"], "'z/a.jpg' could be annotated by 'y/a.jpg' and by 'x/a.jpg'"),
        ({"a": A}, ["b.jpg", "c.jpg"], "none of 2 images is annotated: the first is called 'b', .* 1 annotations 'a'"),
        ({}, ["b.jpg"], "none of 1 images is annotated"),
    ],
)
def test_annotations_are_never_guessed(annotations, paths, message):
    with pytest.raises(ValueError, match=message):
        match(annotations, paths)


def test_the_boxes_on_the_photographs_lie_on_them():
    pytest.importorskip("skimage", reason="the photographs come inside scikit-image")
    from vitreg_kernels.analysis import photographs

    drawn = read_annotations(PHOTOGRAPHS)
    for name, boxes in drawn.items():
        height, width = photographs._READERS[name]().shape[:2]
        assert boxes
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= width, name
            assert 0 <= top < bottom <= height, name
    assert set(photographs.NAMES) - set(drawn) == {"retina"}
