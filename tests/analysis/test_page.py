"""The page: what is on it and what is not, that it loads nothing, and that a browser shows it as it was meant."""

import base64
import hashlib
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from findings_cases import COLUMNS, HEADS, LAYERS, ROWS, findings, pictures, report
from matplotlib import colormaps

from vitreg_kernels.analysis.findings import Report
from vitreg_kernels.analysis.page import figures, maps, write_page
from vitreg_kernels.analysis.page.page import NONE, render

HOSTILE = "<script>alert(1)</script>.png"
VOID = {"meta", "img", "br", "input"}
# Every analysis, the section it fills, and how findings without it look.
SECTIONS = {
    "pictures": {"shown": []},
    "norms": {"norms": []},
    "histogram": {"histogram": None},
    "where": {"frequency": []},
    "similarity": {"similarity": None, "cls_similarity": None},
    "attention": {"attention": []},
    "sinks": {"sinks": []},
    "probes": {"probes": []},
    "boxes": {"discovery": []},
    "registers": {"neurons": [], "repairs": []},
    "training": {"history": None},
}


class Document(HTMLParser):
    """Elements with their attributes, in order; refuses what is not balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def given():
    return report()


@pytest.fixture(scope="module")
def drawn(given):
    return {found.name: pictures(found) for found in given.findings}


@pytest.fixture(scope="module")
def text(given, drawn):
    return render(given, drawn, files=["findings.json"])


@pytest.fixture(scope="module")
def page(text):
    return Document(text)


def without(sections, name="toy"):
    """Findings that lack what fills these sections."""
    found = findings(name)
    for section in sections:
        for field, nothing in SECTIONS[section].items():
            setattr(found, field, nothing)
    return found


def sections(document):
    return [attributes["id"] for attributes in document.all("section")]


def test_every_section_is_there_in_order(page):
    expected = [*list(SECTIONS)[:2], "models", *list(SECTIONS)[2:-1], "published", "training", "about"]
    assert sections(page) == expected
    assert [link["href"] for link in page.all("a")][: len(expected)] == [f"#{name}" for name in expected]


@pytest.mark.parametrize("missing", [list(SECTIONS)[::2], list(SECTIONS)[1::2], list(SECTIONS)])
def test_an_analysis_that_was_not_made_has_no_section(drawn, missing):
    document = Document(render(Report([without(missing)], {}, {}), drawn))
    assert sections(document) == [*(name for name in SECTIONS if name not in missing), "about"]


def test_nothing_is_loaded_and_only_its_own_script_runs(page, text):
    assert not page.all("link", "iframe", "object", "embed", "base")
    assert page.all("script") == [{}]
    loaded = [x.get(name) for tag, x in page.elements if tag in ("img", "image", "use") for name in ("src", "href")]
    assert all(address.startswith(("data:image/", "#")) for address in loaded if address)
    assert all(not address.startswith("#") or address[1:] in ids(page) for address in loaded if address)
    (policy,) = [x["content"] for x in page.all("meta") if x.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{own}'" in policy
    assert not any(
        "http" in str(value) or key.startswith("on")
        for _, x in page.elements
        for key, value in x.items()
        if key != "http-equiv"
    )


def ids(document):
    return [attributes["id"] for _, attributes in document.elements if "id" in attributes]


def test_no_id_is_given_twice(page):
    assert len(ids(page)) == len(set(ids(page)))


def test_names_of_files_and_models_are_text():
    found = findings("<u>$x_1$</u>", planted=True)
    document = Document(
        render(Report([found], {"<i>": "<u>"}, {}), {found.name: pictures(found)}, files=["java:x.json"])
    )
    assert not document.all("u")
    assert HOSTILE in document.text
    assert any(HOSTILE in x.get("alt", "") for x in document.all("img"))
    assert "<u>$x_1$</u> (planted)" in document.text, "in the title of a figure"
    assert "java%3Ax.json" in [link["href"] for link in document.all("a")]


def test_a_planted_model_says_so_wherever_it_is_named(given, page):
    # Of two models everything is shown twice, and half of it is of the planted one.
    text = "\n".join(page.text)
    assert text.count("mended (planted)") >= 5, "titles of figures and of the page"
    rows = re.findall(r"\bmended\n *\n?planted\n", re.sub(r"\n[ \n]*\n", "\n", text))
    names = [x for x in page.all("span") if x.get("class") == "name"]
    tags = [x for x in page.all("span") if x.get("class") == "tag"]
    assert len(rows) >= len(names) / 2
    assert len(tags) >= len(names) / 2 + 1, "one more where it is explained"
    assert all("mended (planted)" in x["alt"] for x in page.all("img") if "mended" in x["alt"])
    assert all("mended (planted)" in x["aria-label"] for x in page.all("svg") if "mended" in x.get("aria-label", ""))


def test_pictures_have_words_and_headings_are_in_order(page):
    assert all("alt" in image for image in page.all("img"))
    assert all(x.get("aria-label") or x.get("aria-hidden") for x in page.all("svg"))
    depth = 0
    for level in (int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)):
        assert level <= depth + 1
        depth = level


def test_strips_hold_a_tile_a_block_and_a_head(page):
    styles = [x["style"] for x in page.all("span") if x.get("class", "").startswith("strip layer")]
    assert styles.count(f"--tiles:{LAYERS};aspect-ratio:{COLUMNS}/{ROWS}") == 4
    styles = [x["style"] for x in page.all("span") if x.get("class", "").startswith("strip head")]
    assert styles.count(f"--tiles:{1 + HEADS};aspect-ratio:{COLUMNS}/{ROWS}") == 8
    (slider,) = page.all("input")
    assert (slider["min"], slider["max"]) == ("0", str(LAYERS - 1))


def test_a_photograph_that_two_models_saw_is_held_once(page):
    assert len(page.all("symbol")) == 2


def test_boxes_are_drawn_where_they_were_found(page):
    rects = [tuple(x[key] for key in ("x", "y", "width", "height")) for x in page.all("rect") if "stroke" in x]
    assert rects.count(("0", "0", "32", "16")) == 4, "a halo and a line, of two models"
    assert rects.count(("4", "4", "16", "8")) == 4
    assert "TokenCut: no box" in page.text


def test_numbers_are_shown_as_they_are(page):
    assert {"41.7%", " ± 1.0%", "too few outliers", "30.6", "50%", "55.4", "standard error 2.0%"} <= {
        x if x[0] == " " else x.strip() for x in page.text if x
    }


def test_published_numbers_are_said_to_be_no_measurements_and_where_those_stand(given, text):
    published = text.split('id="published"')[1].split("</section>")[0]
    assert "none of them was measured here" in published
    assert all(name in published for name in ("Model by model", "under Object discovery", "under Linear probes"))
    bare = render(Report([without(SECTIONS)], {}, {}, published=given.published), {})
    assert not any(name in bare.split('id="published"')[1] for name in ("Object discovery", "Linear probes"))


def test_sinks_are_shown_by_block_as_a_number_or_as_bounds(text):
    table = text.split('id="sinks"')[1].split("</section>")[0]
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in table.split("<tr>")[2:]]
    assert rows[0] == ["toy", "CLS", "2", "0", "0.5", f"0.5{NONE}1.2"]
    assert [row[0] for row in rows[:4]] == ["toy", "R1", "outliers", "other"]


def test_mean_cosines_stand_by_kind_and_none_where_there_are_none(text):
    table = text.split("Mean cosines</caption>")[1].split("</table>")[0]
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in table.split("<tr>")[2:]]
    assert rows[0] == ["toy", "0.5", "0.9", "0.125", NONE]


def test_a_block_without_finite_norms_takes_no_other_blocks_median():
    found = findings()
    found.norms = [row for row in found.norms if row.layer != 1]
    assert np.isnan(maps.medians(found)).tolist() == [False, True, False]
    drawn = pictures(found)
    drawn["0/norms"][1] = np.nan
    captions = maps.norm_strip(found, drawn, 0).captions
    assert captions[1].startswith("max nan")
    assert captions[2].startswith(f"max {maps.number(drawn['0/norms'][2].max())} ")


def test_the_same_findings_give_the_same_file(tmp_path, drawn, text):
    write_page(report(), drawn, tmp_path / "page.html", files=["findings.json"])
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text


def test_a_report_that_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="nothing to show: the report has no models"):
        render(Report([], {}, {}), {})
    with pytest.raises(ValueError, match="need different names, got toy, toy"):
        render(Report([findings(), findings()], {}, {}), {})


@pytest.mark.parametrize(
    ("draw", "missing"),
    [
        (figures.norms_by_layer, "norms"),
        (figures.histogram, "histogram"),
        (figures.neighbour_cosines, "similarity"),
        (figures.cls_cosines, "cls_similarity"),
        (figures.history, "history"),
    ],
)
def test_a_figure_without_its_numbers_is_refused_in_one_sentence(draw, missing):
    found = findings()
    assert draw(found).axes
    setattr(found, missing, None)
    with pytest.raises(ValueError, match=r"there (is|are) no .* of toy: "):
        draw(found)


def test_lines_of_norms_are_the_numbers():
    (axes,) = figures.norms_by_layer(findings()).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines["patches: largest"] == [0.1 + 0.2] * LAYERS
    assert lines["99th percentile"] == [30.0, 31.0, 32.0]
    assert lines["R1: median"] == [10.0] * LAYERS
    assert axes.get_title(loc="left") == "toy"


def test_norm_maps_ring_outliers_and_colour_the_rest_by_its_ratio():
    found = findings()
    maps = pictures(found)
    shown = [axes.images[0].get_array() for axes in figures.norm_maps(found, maps).axes if axes.images]
    assert len(shown) == 1 + LAYERS
    np.testing.assert_array_equal(shown[0], maps["0/photo"])
    cell = shown[1].shape[0] // ROWS
    ring = [tuple(tile[0, 0]) for tile in shown[1:]]
    assert ring[-1] == (20, 20, 26)
    assert ring[0] != ring[-1]
    assert tuple(shown[-1][cell // 2, cell // 2]) == (253, 231, 37), "ten medians and more: the end of viridis"
    # The median itself stands where log(2) / log(20) of viridis is.
    maps["0/norms"][0] = 10.0
    middle = figures.norm_maps(found, maps).axes[1].images[0].get_array()[0, 0]
    expected = 255 * np.array(colormaps["viridis"](math.log(2) / math.log(20))[:3])
    np.testing.assert_allclose(middle, expected, atol=2)  # a step of 255 along the map


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed")
def test_a_browser_shows_it_without_errors_and_narrow_without_scrolling_sideways(tmp_path, text):
    # A second script, which the page itself would not let run, turns the controls and writes down what it sees.
    probe = """<script>
    onerror = (message) => { document.title = "error " + message; };
    addEventListener("load", () => {
      document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
      const layer = getComputedStyle(document.getElementById("pictures")).getPropertyValue("--layer");
      const strip = document.querySelector(".strip.layer"), image = strip.firstChild;
      const moved = (strip.getBoundingClientRect().top - image.getBoundingClientRect().top) / strip.clientHeight;
      const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      document.title = ["layer", layer, "tile", moved.toFixed(2), "too wide", wide].join(" ");
    });
    </script></body>"""
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    (tmp_path / "page.html").write_text(free.replace("</body>", probe), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,900", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=60)
    assert f"<title>layer {LAYERS - 2} tile {LAYERS - 2:.2f} too wide 0</title>" in done.stdout, done.stdout[:2000]
