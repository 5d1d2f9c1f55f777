"""What was found, as JSON and as tables: given back exactly, or refused."""

import csv
import io
import json
import math
from dataclasses import fields

import numpy as np
import pytest
from findings_cases import report

from vitreg_kernels.analysis.findings import TABLES, Norms, Report, from_json, tables, to_json


def test_json_gives_a_report_back_exactly():
    given = report()
    assert from_json(to_json(given)) == given
    assert to_json(from_json(to_json(given))) == to_json(given)


def test_a_report_of_nothing_comes_back_too():
    assert from_json(to_json(Report([], {}, {}))) == Report([], {}, {})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_its_place(number):
    given = report()
    given.findings[1].norms[2].largest = number
    with pytest.raises(
        ValueError, match=r"report\.findings\[1\]\.norms\[2\]\.largest is -?(nan|inf): expected a finite"
    ):
        to_json(given)


def test_a_number_of_another_library_is_refused():
    given = report()
    given.findings[0].norms[0].median = np.float32(1.0)
    with pytest.raises(TypeError, match=r"norms\[0\]\.median is a float32: expected a bool"):
        to_json(given)
    given = report()
    given.findings[0].histogram.counts = {3: [1, 2]}
    with pytest.raises(TypeError, match=r"histogram\.counts has the key 3: expected a str"):
        to_json(given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document.update(format=0), "expected a report of format 1, got format 0"),
        (lambda document: document.pop("findings"), "report is .* expected Report"),
        (lambda document: document["findings"][0].update(extra=1), r"findings\[0\] is .* expected Findings"),
        (lambda document: document["findings"][0].update(grid=[1, 2, 3]), r"grid is \[1, 2, 3\]: expected tuple"),
        (lambda document: document["findings"][0].update(layers=2.5), "layers is 2.5: expected int"),
        (lambda document: document["findings"][0].update(frequency=3), "frequency is 3: expected list"),
        (lambda document: document["findings"][0]["norms"][0].update(median="1"), "median is '1': expected float"),
    ],
)
def test_another_document_is_refused_in_one_sentence(change, said):
    document = json.loads(to_json(report()))
    change(document)
    with pytest.raises(ValueError, match=said):
        from_json(json.dumps(document))


def test_text_that_is_no_report_is_refused():
    with pytest.raises(ValueError, match="expected a report of format 1, got format None"):
        from_json("[]")


def test_tables_hold_every_row_of_every_model():
    given = report()
    found = tables(given)
    assert tuple(found) == TABLES
    rows = list(csv.DictReader(io.StringIO(found["norms"])))
    assert list(rows[0]) == ["model", *(column.name for column in fields(Norms))]
    expected = [(findings.name, entry) for findings in given.findings for entry in findings.norms]
    assert len(rows) == len(expected)
    for row, (name, entry) in zip(rows, expected, strict=True):
        assert (row["model"], row["tokens"], float(row["largest"])) == (name, entry.tokens, entry.largest)
        assert row["outliers"] == ("" if entry.outliers is None else repr(entry.outliers))
    (probe,) = (row for row in csv.DictReader(io.StringIO(found["probes"])) if row["note"] and row["model"] == "toy")
    assert (probe["score"], probe["note"]) == ("", "too few outliers")


def test_tables_without_rows_are_absent():
    given = report()
    for findings in given.findings:
        findings.probes = []
    assert "probes" not in tables(given)
