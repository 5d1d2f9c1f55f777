"""Labels of images: by folder, and by tables that are written in many ways, or wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitreg_kernels.analysis.labels import read_labels

ROOT = Path("photos")
PATHS = [ROOT / "cats" / "1.jpg", ROOT / "cats" / "old" / "2.jpg", ROOT / "dogs" / "1.jpg", ROOT / "top.jpg"]


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_folders_are_those_directly_below_the_root():
    assert read_labels("folders", PATHS, ROOT) == ["cats", "cats", "dogs", None]


@pytest.mark.parametrize(
    "text",
    [
        "cats/1.jpg,cat\n2,cat\ndogs/1.jpg,dog\n",
        "path,label\ncats/1.jpg,cat\ncats/old/2.jpg,cat\ndogs/1.jpg,dog\n",
        "\ufeffLabel;ID;FileName\r\ncat;7;./cats/1.jpg\r\ncat;8;2.jpg\r\ndog;9;dogs/1.jpg\r\n\r\n",
        "image\tclass\ncats\\1.jpg\tcat\n2.jpg\tcat\ndogs\\1.jpg\tdog\nelsewhere.jpg\tbird",
        'identifier,species\n"cats/1.jpg", cat \n2.jpg,cat\ndogs/1.jpg,dog\n2.jpg,cat\n',
    ],
)
def test_tables_with_and_without_header_by_path_name_and_stem(tmp_path, text):
    assert read_labels(table(tmp_path, text), PATHS, ROOT) == ["cat", "cat", "dog", None]


def test_absolute_paths_and_labels_with_separators_and_accents(tmp_path):
    images = [tmp_path / "a.b.png", tmp_path / "c.png"]
    source = table(tmp_path, f'{images[0]},"Chat, \u00e9gyptien"\nc,x')
    assert read_labels(str(source), images, tmp_path) == ["Chat, \u00e9gyptien", "x"]


def test_a_path_goes_before_a_name(tmp_path):
    paths = [ROOT / "1.jpg", ROOT / "more" / "1.jpg"]
    assert read_labels(table(tmp_path, "1.jpg,a\nmore/1.jpg,b\n"), paths, ROOT) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.jpg,cat\n", r"line 1: '1.jpg' means 2 images \(cats/1.jpg, dogs/1.jpg\); give their paths below photos"),
        ("2.jpg,cat\ncats/old/2.jpg,dog\n", "line 2: 'cats/old/2.jpg' is 'dog', but an earlier row says 'cat'"),
        ("2.jpg,cat\ntop.jpg,\n", "line 2: needs a path and a label"),
        ("path,label\n2.jpg\n", "line 2: needs a path and a label"),
        ("2.jpg,cat,7\n", "has 3 columns; name them in a first row"),
        ("2.jpg\n", "has 1 columns; name them in a first row"),
        ("path,label\n9.jpg,cat\n", "none of 4 images in photos has a label, such as cats/1.jpg; needs rows of"),
        ("", "none of 4 images in photos has a label"),
    ],
)
def test_tables_that_say_nothing_clear_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_labels(table(tmp_path, text), PATHS, ROOT)


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*; labels are 'folders' or the path of a CSV file"):
        read_labels(tmp_path / "missing.csv", PATHS, ROOT)
    with pytest.raises(ValueError, match=r"is not a CSV file in UTF-8: .* at byte 6"):
        read_labels(table(tmp_path, "2.jpg,\u00e9t\u00e9\n", "latin-1"), PATHS, ROOT)


def test_images_without_folders_or_elsewhere_are_refused():
    with pytest.raises(ValueError, match=r"none of 1 images in photos has a label, such as top.jpg; needs folders"):
        read_labels("folders", PATHS[3:], ROOT)
    with pytest.raises(ValueError, match=r"other/1.jpg is not below photos"):
        read_labels("folders", [Path("other/1.jpg")], ROOT)
