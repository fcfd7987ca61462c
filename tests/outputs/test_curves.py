"""The curves of a run are where its log says."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


RECORDS = [dict(epoch=1, step=s, loss=4 - s / 100, change_ratio=0.5, smallest=20, largest=1000,
                splits=s % 3) for s in (50, 100, 150, 200)]


def test_points_lie_where_the_axes_say():
    charts = svgs(curves.draw_charts(RECORDS))
    assert list(charts) == ["Loss", "Labels that change in a step", "Largest cluster",
                            "Smallest cluster", "Small clusters refilled between two log lines"]
    heights = axis(charts["Loss"])
    [points] = polylines(charts["Loss"])
    for record, (x, y) in zip(RECORDS, points, strict=True):
        share = record["loss"] / 4
        assert y == pytest.approx(heights["0"] + share * (heights["4"] - heights["0"]), abs=0.2)
        width = curves.WIDTH - curves.LEFT - curves.RIGHT
        assert x == pytest.approx(curves.LEFT + width * record["step"] / 200, abs=0.1)


def test_all_metrics_of_a_log_are_drawn_and_their_last_values_named():
    names = dict(nmi=0.25, purity=0.5, ari=0.125, hungarian_accuracy=0.375)
    records = RECORDS + [dict(epoch=1, step=200, nmi_previous=0.75, silhouette=-0.1,
                              knn_accuracy=0.9, **names)]
    charts = svgs(curves.draw_charts(records))
    assert [[text.text for text in chart.iter("tspan")] for chart in charts.values()] == [
        ["loss 2"], ["change ratio 0.5"], ["NMI 0.25", "purity 0.5", "ARI 0.125",
        "Hungarian 0.375"], ["NMI 0.75"], ["silhouette -0.1"], ["k-NN 0.9"],
        ["images 1k"], ["images 20"], ["splits 2"]]
    heights = axis(charts["Silhouette of the clusters"])  # a negative value
    [[(_, y)]] = polylines(charts["Silhouette of the clusters"])
    assert y == pytest.approx(heights["-0.1"], abs=0.2)


def test_a_long_log_stays_small_and_keeps_its_ends():
    drawn = curves.draw_charts([dict(epoch=1, step=s, loss=s / 1e4) for s in range(1, 40001)])
    [points] = polylines(svgs(drawn)["Loss"])
    heights = axis(svgs(drawn)["Loss"])
    assert abs(len(points) - curves.POINTS) < 5 and len(drawn) < 30_000
    assert points[-1] == (curves.WIDTH - curves.RIGHT, heights["4"])


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_enclose(low, span, count):
    ticks = curves.ticks(low, low + span, count)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step + 1e-9 * abs(low)
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= count + 2 and f"{step:.0e}"[0] in "125"
    assert all(abs(b - a - step) <= slack for a, b in zip(ticks, ticks[1:]))


@pytest.mark.parametrize("line", [
    '{"epoch": 2, "st', "no json", "[1]", "3", '{"epoch": 2}', '{"epoch": 1, "step": null}',
    '{"epoch": "<b>", "step": 9, "loss": 1}', '{"epoch": 1, "step": 1e999}', "[" * 9999,
    '{"epoch": true, "step": 9}', '{"epoch": 1, "step": ' + "9" * 5000 + "}", "\0\x85"])
def test_lines_that_are_no_records_are_passed_over(tmp_path, line):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join([line, *map(json.dumps, RECORDS), line]))
    assert curves.read_log(log) == RECORDS


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"epoch": 1, "step": 2, "loss": NaN, "nmi": "<b>", "purity": [1], "ari": 0.5,'
                   f' "largest": {"9" * 400}, "splits": -Infinity, "silhouette": 1e-320}}')
    assert curves.read_log(log) == [dict(epoch=1, step=2, ari=0.5, silhouette=1e-320)]
    assert len(svgs(curves.draw_charts(curves.read_log(log)))) == 2


@pytest.mark.parametrize("number, text", [
    (0.25, "0.25"), (999, "999"), (999.6, "1k"), (20_000, "20k"), (999_999, "1M"), (-3, "-3")])
def test_numbers_on_an_axis(number, text):
    assert curves.short(number) == text
