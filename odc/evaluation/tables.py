"""The benchmark tables: published rows, ours under them where they may be compared, as Markdown and as JSON."""

import json
from dataclasses import dataclass, field, replace

from odc.runtime.checkpoint import write_atomically
from odc.distributed import is_main, print_main, together

MAP_COLUMNS = ("Feature1", "Feature2", "Feature3", "Feature4", "Feature5")
SVM_COLUMNS = ("Best Layer", "SVM", "k=1", "k=2", "k=4", "k=8", "k=16", "k=32", "k=64", "k=96")


@dataclass(frozen=True)
class Table:
    """A published table: ResNet-50 at 224 pixels, percent.

    dataset, num_train, num_val, num_classes: what `odc.data.layouts` calls the set, and how large the real one is.
    rows: method -> values in the order of `columns`. The rows beside ODC come from the same benchmark code.
    """

    title: str
    dataset: str
    num_train: int
    num_val: int
    num_classes: int
    columns: tuple
    rows: dict = field(default_factory=dict)

    def is_comparable(self, train, val, backbone, image_size):
        """True for the same data set, whole (within 0.1%, as copies lose a file), ResNet-50 and 224 pixels."""
        return (
            train.name == val.name == self.dataset
            and len(train.classes) == self.num_classes
            and abs(len(train) - self.num_train) <= self.num_train / 1000
            and abs(len(val) - self.num_val) <= self.num_val / 1000
            and (backbone.arch, backbone.small_stem, image_size) == ("resnet50", False, 224)
        )

    def only(self, columns):
        """The same table, of some of its columns."""
        at = [i for i, column in enumerate(self.columns) if column in columns]
        rows = {method: tuple(values[i] for i in at) for method, values in self.rows.items()}
        return replace(self, columns=tuple(self.columns[i] for i in at), rows=rows)


VOC07_SVM = Table("VOC07 SVM and low-shot SVM (mAP)", "voc07", 5011, 4952, 20, SVM_COLUMNS, {
    "ODC": ("feature5", 78.42, 32.42, 40.27, 49.95, 59.96, 65.71, 69.99, 73.64, 75.13),
    "DeepCluster": ("feature5", 74.26, 29.73, 37.66, 45.85, 55.57, 62.48, 66.15, 70.0, 71.37),
    "supervised": ("feature5", 87.17, 52.99, 63.55, 73.7, 78.79, 81.76, 83.75, 85.18, 85.97),
    "random (Kaiming)": ("feature2", 30.54, 9.15, 9.39, 11.09, 12.3, 14.3, 17.41, 21.32, 23.77),
})
IMAGENET_LINEAR = Table(
    "ImageNet linear (top-1)", "imagenet", 1281167, 50000, 1000, (*MAP_COLUMNS, "AvgPool"), {
        "ODC": (14.76, 31.82, 42.44, 55.76, 57.70, 53.42),
        "DeepCluster": (12.78, 30.81, 43.88, 57.71, 51.68, 46.92),
        "supervised": (15.18, 33.96, 47.86, 67.56, 76.17, 74.12),
        "random (Kaiming)": (11.37, 16.21, 13.47, 9.07, 6.54, 4.35),
    })
PLACES205_LINEAR = Table("Places205 linear (top-1)", "places205", 2448873, 20500, 205, MAP_COLUMNS, {
    "ODC": (19.28, 34.09, 40.90, 47.04, 48.35),
    "DeepCluster": (18.80, 33.93, 41.44, 47.22, 42.61),
    "supervised": (21.27, 36.10, 43.03, 51.38, 53.05),
    "random (Kaiming)": (17.19, 21.70, 19.23, 14.59, 11.73),
})
INATURALIST2018_LINEAR = Table(  # the protocol is published, ODC's numbers are not
    "iNaturalist2018 linear (top-1)", "inaturalist2018", 437513, 24426, 8142, MAP_COLUMNS
)
IMAGENET_KNN = Table("ImageNet nearest neighbour (top-1)", "imagenet", 1281167, 50000, 1000,
                     ("k=10", "k=20", "k=100", "k=200"), {"ODC": (38.5, 39.1, 37.8, 36.9)})


def markdown(title, columns, ours, published=None):
    """A Markdown table with the published rows first, then ours.

    columns: names. ours: {row name: {column: number, text or None}}. published: a Table, of which the columns that
    `columns` names are printed; None prints our rows alone.
    """
    rows = []
    if published is not None:
        for method, values in published.rows.items():
            rows.append((f"{method}, published", dict(zip(published.columns, values))))
    rows += list(ours.items())
    cells = [["method", *columns]]
    cells += [[name, *(_cell(values.get(column)) for column in columns)] for name, values in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([title, "", *lines])


def _cell(value):
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.2f}"


def published_rows(table):
    """A Table's rows for the JSON file: {method: {column: value}}; None without a table."""
    return table and {method: dict(zip(table.columns, values)) for method, values in table.rows.items()}


def show(title, columns, ours, published=None):
    """Print `markdown`, on the main process."""
    print_main("\n" + markdown(title, columns, ours, published) + "\n")


def write_json(path, content):
    """Write a result file, all of it or nothing, from the main process; nothing without a path. Raises UserError."""
    with together():
        if path and is_main():
            text = json.dumps(content, indent=2) + "\n"
            write_atomically(path, lambda temporary: temporary.write_text(text))
