"""The curves of a run: its log.jsonl as inline SVG charts."""

import contextlib
import json
import math
from pathlib import Path

# Title of a chart: what it shows, as {name in the log: name in the legend}.
CHARTS = {
    "Loss": {"loss": "loss"},
    "Labels that change in a step": {"change_ratio": "change ratio"},
    "Clusters against classes": {"nmi": "NMI", "purity": "purity", "ari": "ARI",
                                 "hungarian_accuracy": "Hungarian"},
    "Clusters against the previous ones": {"nmi_previous": "NMI"},
    "Silhouette of the clusters": {"silhouette": "silhouette"},
    "Nearest-neighbour accuracy, held-out images": {"knn_accuracy": "k-NN"},
    "Largest cluster": {"largest": "images"},
    "Smallest cluster": {"smallest": "images"},
    "Small clusters refilled between two log lines": {"splits": "splits"},
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 500, 270, 50, 14, 62, 26  # pixels: chart and margins
POINTS = 400  # of a longer curve, about so many are drawn


def read_log(path):
    """The records of a log.jsonl, a list of {name: number}.

    Values that are no numbers are left out, and so are lines that are no records: a log is a text
    file that anyone may have edited, and its last line may be half written.
    """
    records = []
    for line in Path(path).read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            record = {name: value for name, value in json.loads(line).items()
                      if type(value) in (int, float) and abs(value) < 1e15}  # nor a NaN
            if all(type(record.get(name)) is int for name in ("epoch", "step")):
                records.append(record)
    return records


def draw_charts(records):
    """An <svg> element for each of CHARTS that the records have values for, as one text."""
    drawn, until = [], max([1, *(record["step"] for record in records)])
    for heading, names in CHARTS.items():
        series = {legend: [(record["step"], record[name]) for record in records if name in record]
                  for name, legend in names.items()}
        series = {legend: [*points[: -1 : 1 + len(points) // POINTS], points[-1]]
                  for legend, points in series.items() if points}
        if series:
            drawn.append(draw_chart(heading, series, until))
    return "\n".join(drawn)


def draw_chart(heading, series, until):
    """One <svg> element. series: {legend: [(step, value), ...]}. until: last step on the axis."""
    values = [value for points in series.values() for _, value in points]
    marks = ticks(min(0, *values), max(0, *values), 4)

    def x(step):
        return LEFT + (WIDTH - LEFT - RIGHT) * step / until

    def y(value):
        share = (value - marks[0]) / (marks[-1] - marks[0])
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    legend = "".join(f'<tspan class="curve{n}">{name} {short(points[-1][1])}</tspan>  '
                     for n, (name, points) in enumerate(series.items()))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{heading}">',
             f'<text class="title" x="0" y="18">{heading}</text>',
             f'<text x="0" y="41" xml:space="preserve">{legend}</text>']
    for mark in marks:
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"'
                     f'/><text x="{LEFT - 8}" y="{y(mark) + 5:.1f}" text-anchor="end">{short(mark)}'
                     '</text>')
    parts += [f'<text x="{x(step):.1f}" y="{HEIGHT - 4}" text-anchor="middle">{short(step)}</text>'
              for step in ticks(0, until, 5) if step <= until]
    for n, points in enumerate(series.values()):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline class="curve{n}" points="{path}"/>')
        if len(points) <= 40:
            parts += [f'<circle class="curve{n}" r="2.4" cx="{x(step):.1f}" cy="{y(value):.1f}"/>'
                      for step, value in points]
    return "\n".join([*parts, "</svg>"])


def ticks(low, high, count):
    """About `count` round numbers, the first at or below low, the last at or above high."""
    span = high - low if high - low > 1e-12 else 1
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [k * step for k in range(first, last + 1)]


def short(number):
    """A number as an axis shows it: 0.25, 800, 20k, 1.1M."""
    size, letter = next(unit for unit in ((1e6, "M"), (1e3, "k"), (1, ""))
                        if number >= 0.9995 * unit[0] or unit[0] == 1)
    return f"{number / size:.3g}{letter}"
