"""The curves of a run are where its log says."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odc.errors import UserError
from odc.outputs import curves


def svgs(page):
    """The charts of a page, by title."""
    charts = map(ElementTree.fromstring, re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    return {chart.get("aria-label"): chart for chart in charts}


def polylines(chart):
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
            for line in chart.iter("polyline")]


def axis(chart):
    """{number on the vertical axis: its height}."""
    return {text.text: float(text.get("y")) - 5 for text in chart.iter("text")
            if text.get("text-anchor") == "end"}


def legend(chart):
    return [text.text for text in chart.iter("tspan")]


RECORDS = [dict(epoch=1, step=s, loss=4 - s / 100, change_ratio=0.5, smallest=20, largest=1000,
                splits=s % 3) for s in (50, 100, 150, 200)]


def test_points_lie_where_the_axes_say():
    charts = svgs(curves.charts(RECORDS))
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
    assert heights["10"] - heights["100"] == pytest.approx(heights["100"] - heights["1k"], abs=0.2)
    largest, smallest = polylines(charts["Cluster sizes"])
    assert largest[0][1] == pytest.approx(heights["1k"], abs=0.2)
    share = heights["100"] - heights["10"]
    assert smallest[0][1] == pytest.approx(heights["10"] + 0.30103 * share, abs=0.2)


def test_all_metrics_of_a_log_are_drawn_and_their_last_values_named():
    names = dict(nmi=0.25, purity=0.5, ari=0.125, hungarian_accuracy=0.375)
    records = RECORDS + [dict(epoch=1, step=200, nmi_previous=0.75, silhouette=-0.1,
                              knn_accuracy=0.9, **names)]
    charts = svgs(curves.charts(records))
    assert legend(charts["Clusters against classes"]) == [
        "NMI 0.25", "purity 0.5", "ARI 0.125", "Hungarian 0.375"]
    assert legend(charts["Clusters against the previous ones"]) == ["NMI 0.75"]
    assert legend(charts["Silhouette of the clusters"]) == ["silhouette -0.1"]
    assert legend(charts["Nearest-neighbour accuracy, held-out images"]) == ["k-NN 0.9"]
    assert legend(charts["Cluster sizes"]) == ["largest 1k", "smallest 20"]
    heights = axis(charts["Silhouette of the clusters"])  # a negative value
    [[(_, y)]] = polylines(charts["Silhouette of the clusters"])
    assert y == pytest.approx(heights["-0.1"], abs=0.2)


def test_a_long_log_stays_small_and_keeps_its_level():
    drawn = curves.charts([dict(epoch=1, step=s, loss=2.0 + s % 2) for s in range(1, 40001)])
    [points] = polylines(svgs(drawn)["Loss"])
    heights = axis(svgs(drawn)["Loss"])
    assert len(points) == curves.POINTS and len(drawn) < 30_000
    middle = heights["0"] + 2.5 / 3 * (heights["3"] - heights["0"])
    assert all(y == pytest.approx(middle, abs=0.2) for _, y in points[1:-1])


def test_an_empty_log_and_a_single_record():
    assert curves.charts([]) == ""
    first = [dict(epoch=0, step=0, nmi=0.0, purity=0.1)]
    assert list(svgs(curves.charts(first))) == ["Clusters against classes"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_enclose(low, span, count):
    ticks = curves.ticks(low, low + span, count)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step + 1e-9 * abs(low)
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= count + 2 and f"{step:.0e}"[0] in "125"
    assert all(abs(b - a - step) <= slack for a, b in zip(ticks, ticks[1:]))


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, RECORDS)) + '\n{"epoch": 2, "st')
    assert curves.read_log(log) == RECORDS


@pytest.mark.parametrize("content", [b"no json\n", b'{"epoch": 1}\n{"epoch": 2}\n', b"[1]\n[2]\n",
                                     b"\xff\xfe\x00"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="line 1"):
        curves.read_log(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match="nowhere"):
        curves.read_log(tmp_path / "nowhere" / "log.jsonl")


@pytest.mark.parametrize("number, text", [
    (0.25, "0.25"), (999, "999"), (999.6, "1k"), (20_000, "20k"), (999_999, "1M"), (-3, "-3")])
def test_numbers_on_an_axis(number, text):
    assert curves.short(number) == text
