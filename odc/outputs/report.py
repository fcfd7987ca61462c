"""report.html: the curves of a run, drawn from its log.jsonl as inline SVG; the file needs nothing beside itself.

    python -m odc.outputs.report out
"""

import html
import json
import math
from pathlib import Path

from odc.runtime import program
from odc.runtime.arguments import Parser
from odc.runtime.checkpoint import write_atomically
from odc.distributed import print_main
from odc.errors import UserError

# Title, what is drawn as {name in the log: name in the legend}, how numbers are written, logarithmic or not.
CHARTS = [
    ("Loss", {"loss": "loss"}, "{:.3g}", False),
    ("Labels that change in a step", {"change_ratio": "change ratio"}, "{:.0%}", False),
    ("Clusters against classes", {"nmi": "NMI", "purity": "purity"}, "{:.2f}", False),
    ("Clusters before and after k-means", {"nmi_previous": "NMI"}, "{:.2f}", False),
    ("Nearest-neighbour accuracy, held-out images", {"knn_accuracy": "k-NN"}, "{:.0%}", False),
    ("Cluster sizes", {"largest": "largest", "smallest": "smallest"}, "{:,.0f}", True),
    ("Small clusters refilled between two log lines", {"splits": "splits"}, "{:,.0f}", False),
]
COLOURS = ["#2463a6", "#c4581c"]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 500, 260, 58, 64, 40, 34  # pixels: a chart and the room around its axes
POINTS = 400  # a longer curve is drawn as the means of so many parts

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 2rem auto; max-width: 1060px; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #26262b; }}
h1 {{ font-size: 1.4rem; font-weight: 600; margin: 0; }}
p {{ color: #6b6b73; margin: .3rem 0 1.5rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1.5rem; }}
svg {{ width: 100%; height: auto; }}
svg text {{ font: 12px system-ui, sans-serif; fill: #6b6b73; }}
svg .title {{ font-size: 15px; font-weight: 600; fill: #26262b; }}
svg .grid {{ stroke: #e6e6ea; }}
svg .curve {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<main>
{charts}
</main>
</html>
"""


def read_log(path):
    """The records of a log.jsonl, a list of dicts; a last line that is still being written is left out.

    Raises UserError if there is no such file or it holds something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'is not text'}; give the folder that train.py "
                        "wrote, with its log.jsonl.") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            records[-1]["step"] + 0
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and number > 1:
                return records[: number - 1]
            raise UserError(f"{path}: line {number} is not a record of train.py; give the folder that it "
                            "wrote.") from None
    return records


def page(records, title):
    """The HTML page, as text."""
    charts, until = [], max([1, *(record["step"] for record in records)])
    for heading, names, form, logarithmic in CHARTS:
        series = {legend: [(r["step"], r[name]) for r in records if name in r] for name, legend in names.items()}
        series = {legend: points for legend, points in series.items() if points}
        if series:
            charts.append(chart(heading, series, form, logarithmic, until))
    return PAGE.format(title=html.escape(title), summary=html.escape(summary(records)), charts="\n".join(charts))


def summary(records):
    """One line: how far the run is, and the last value of each curve."""
    last = {}
    for record in records:
        last.update(record)
    if not last:
        return "no step yet"
    words = [f"epoch {last['epoch']}, step {last['step']:,}"]
    words += [f"{legend} {form.format(last[name])}" for _, names, form, _ in CHARTS for name, legend in names.items()
              if name in last]
    return ", ".join(words)


def chart(heading, series, form, logarithmic=False, until=1):
    """One chart as an <svg> element.

    series: {legend: [(step, value), ...]}. form: format of the values on the axis. until: the last step on the axis.
    """
    series = {legend: _thinned(points) for legend, points in series.items()}
    values = [y for points in series.values() for _, y in points]
    y_ticks = decades(min(values), max(values)) if logarithmic else ticks(min(0, *values), max(values), 4)
    scale = (lambda y: math.log10(max(y, y_ticks[0]))) if logarithmic else (lambda y: y)

    def place(x, y):
        low, high = scale(y_ticks[0]), scale(y_ticks[-1])
        return (LEFT + (WIDTH - LEFT - RIGHT) * x / until,
                HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(y) - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(heading)}">',
             f'<text class="title" x="{LEFT}" y="20">{html.escape(heading)}</text>']
    for value in y_ticks:
        y = place(0, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                     f'{_axis_number(form, value, y_ticks)}</text>')
    for step in ticks(0, until, 5):
        if step <= until:
            x = place(step, y_ticks[0])[0]
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(step)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{HEIGHT - BOTTOM + 18}">step</text>')

    ends = _apart([place(*points[-1])[1] for points in series.values()], 14)
    for (legend, points), colour, end in zip(series.items(), COLOURS, ends):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline class="curve" stroke="{colour}" points="{path}"/>')
        if len(points) <= 40:
            parts += [f'<circle fill="{colour}" r="2.4" cx="{x:.1f}" cy="{y:.1f}"/>'
                      for x, y in (place(*point) for point in points)]
        if len(series) > 1:
            x = place(points[-1][0], points[-1][1])[0]
            parts.append(f'<text x="{x + 7:.1f}" y="{end + 4:.1f}" style="fill:{colour}">{html.escape(legend)}</text>')
    return "\n".join([*parts, "</svg>"])


def ticks(low, high, count):
    """Round numbers, about `count` of them, the first at or below low and the last at or above high."""
    span = (high - low) or abs(high) or 1
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [k * step for k in range(first, last + 1)]


def decades(low, high):
    """Powers of ten around low..high, for a logarithmic axis; what is below 1 counts as 1."""
    first = math.floor(math.log10(max(low, 1)))
    last = max(first + 1, math.ceil(math.log10(max(high, 1)) - 1e-9))
    return [10**k for k in range(first, last + 1)]


def short(number):
    """A step count as an axis shows it: 800, 20k, 1.1M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _axis_number(form, value, all_values):
    """A tick's number; with more digits where the usual ones would make two ticks look the same."""
    texts = [form.format(v) for v in all_values]
    if len(set(texts)) == len(texts):
        return form.format(value)
    return f"{100 * value:.3g}%" if "%" in form else f"{value:.3g}"


def _thinned(points):
    """At most POINTS points: means over equal parts of a longer curve, its last point kept."""
    if len(points) <= POINTS:
        return points
    parts = [points[len(points) * i // POINTS : len(points) * (i + 1) // POINTS] for i in range(POINTS)]
    means = [tuple(sum(column) / len(part) for column in zip(*part)) for part in parts]
    return [points[0], *means[1:-1], points[-1]]


def _apart(heights, least):
    """Heights of labels, moved so that no two are closer than `least`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for above, below in zip(order, order[1:]):
        moved[below] = max(moved[below], moved[above] + least)
    return moved


def save(path, log, title):
    """Make the page of a log.jsonl, all of it or nothing; main process only. Raises UserError."""
    text = page(read_log(log), title)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main(arguments=None):
    parser = Parser("Draw the curves of a run: report.html from log.jsonl.")
    parser.add_argument("folder", metavar="DIR", help="what train.py wrote, its --output")
    parser.add_argument("--output", metavar="FILE", help="the page to write (default: report.html in the folder)")
    args = parser.parse_args(arguments)
    folder = Path(args.folder)
    output = Path(args.output or folder / "report.html")
    save(output, folder / "log.jsonl", folder.resolve().name)
    print_main(f"Done: {output}")


if __name__ == "__main__":
    program.run_program(main)
