"""report.html: the curves of a run are where its log says."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odc.errors import UserError
from odc.outputs import report as curves


def svgs(page):
    """The charts of a page, by title."""
    charts = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return {chart.get("aria-label"): chart for chart in charts}


def polylines(chart):
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
            for line in chart.iter("polyline")]


def axis(chart):
    """{number on the vertical axis: its height}."""
    return {text.text: float(text.get("y")) - 4 for text in chart.iter("text") if text.get("text-anchor") == "end"}


RECORDS = [dict(epoch=1, step=s, loss=4 - s / 100, change_ratio=0.5, smallest=20, largest=1000, splits=s % 3)
           for s in (50, 100, 150, 200)]


def test_points_lie_where_the_axes_say():
    charts = svgs(curves.page(RECORDS, "a run"))
    assert list(charts) == ["Loss", "Labels that change in a step", "Cluster sizes",
                            "Small clusters refilled between two log lines"]
    heights = axis(charts["Loss"])
    [points] = polylines(charts["Loss"])
    for record, (x, y) in zip(RECORDS, points, strict=True):
        share = record["loss"] / 4
        assert y == pytest.approx(heights["0"] + share * (heights["4"] - heights["0"]), abs=0.2)
        width = curves.WIDTH - curves.LEFT - curves.RIGHT
        assert x == pytest.approx(curves.LEFT + width * record["step"] / 200, abs=0.1)
    heights = axis(charts["Cluster sizes"])  # logarithmic
    assert heights["10"] - heights["100"] == pytest.approx(heights["100"] - heights["1,000"], abs=0.2)
    largest, smallest = polylines(charts["Cluster sizes"])
    assert largest[0][1] == pytest.approx(heights["1,000"], abs=0.2)
    assert smallest[0][1] == pytest.approx(heights["10"] + 0.30103 * (heights["100"] - heights["10"]), abs=0.2)


def test_a_long_log_stays_small_and_keeps_its_level():
    records = [dict(epoch=1, step=s, loss=2.0 + s % 2) for s in range(1, 40001)]
    page = curves.page(records, "long")
    [points] = polylines(svgs(page)["Loss"])
    heights = axis(svgs(page)["Loss"])
    assert len(points) == curves.POINTS and len(page) < 30_000
    middle = heights["0"] + 2.5 / 3 * (heights["3"] - heights["0"])
    assert all(y == pytest.approx(middle, abs=0.2) for _, y in points[1:-1])


def test_the_page_stands_alone_and_is_safe():
    page = curves.page(RECORDS + [dict(epoch=1, step=200, nmi=0.25, purity=0.5)], "<script>alert(1)</script>")
    assert "<script" not in page and "http" not in page and "src=" not in page
    assert "NMI 0.25, purity 0.50" in page and "epoch 1, step 200" in page


def test_an_empty_log_and_a_single_record():
    assert "no step yet" in curves.page([], "empty")
    first = [dict(epoch=0, step=0, nmi=0.0, purity=0.1)]
    assert list(svgs(curves.page(first, "first"))) == ["Clusters against classes"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_enclose(low, span, count):
    ticks = curves.ticks(low, low + span, count)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step + 1e-9 * abs(low)
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack and 2 <= len(ticks) <= count + 2
    assert f"{step:.0e}"[0] in "125" and all(abs(b - a - step) <= slack for a, b in zip(ticks, ticks[1:]))


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, RECORDS)) + '\n{"epoch": 2, "st')
    assert curves.read_log(log) == RECORDS


@pytest.mark.parametrize("content", ["no json\n", '{"epoch": 1}\n{"epoch": 2}\n', "[1]\n[2]\n"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(UserError, match="line 1"):
        curves.main([str(tmp_path)])
    with pytest.raises(UserError, match="nowhere"):
        curves.main([str(tmp_path / "nowhere")])


def test_the_page_of_a_run_can_be_made_again(finished, tmp_path, capsys):  # noqa: F811
    page = (finished / "report.html").read_text()
    assert {"Loss", "Clusters against classes", "Cluster sizes"} <= svgs(page).keys()
    assert len(polylines(svgs(page)["Loss"])[0]) == 20
    curves.main([str(finished), "--output", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_text() == page
    assert str(tmp_path / "again.html") in capsys.readouterr().out
