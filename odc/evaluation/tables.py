"""Published benchmark tables, and ours beside them where the two may be compared."""

import json
from dataclasses import dataclass

from odc.distributed import is_main, print_main, raise_everywhere
from odc.runtime.checkpoint import write_atomically

RESULT_START = b'{\n  "script": "eval_'  # how every file of `write_json` begins
FIVE_MAPS = ("Feature1", "Feature2", "Feature3", "Feature4", "Feature5")


@dataclass(frozen=True)
class Table:
    """A published table: ResNet-50 at 224 pixels, percent."""

    dataset: str  # the ImageSet's name
    num_train: int
    num_val: int
    num_classes: int
    columns: tuple
    rows: dict  # {method: values in the order of columns}
    tolerance: float = 0.001  # the share by which numbers of images may differ: copies lack some

    def if_comparable(self, network):
        """This table if a FrozenBackbone is a ResNet-50 on the whole data set, or None."""
        train, val, backbone = network.train, network.val, network.backbone
        if (train.name == val.name == self.dataset
                and len(train.classes) == self.num_classes
                and abs(len(train) - self.num_train) <= self.num_train * self.tolerance
                and abs(len(val) - self.num_val) <= self.num_val * self.tolerance
                and (backbone.arch, backbone.small_stem) == ("resnet50", False)
                and network.image_size == 224):
            return self


# OpenSelfSup (2020) published the rows, but for those named otherwise: top-1, or mAP on VOC07.
VOC07_SVM = Table("voc07", 5011, 4952, 20, (
    "Best Layer", "SVM", "k=1", "k=2", "k=4", "k=8", "k=16", "k=32", "k=64", "k=96"), {
        "ODC": ("feature5", 78.42, 32.42, 40.27, 49.95, 59.96, 65.71, 69.99, 73.64, 75.13),
        "supervised": ("feature5", 87.17, 52.99, 63.55, 73.7, 78.79, 81.76, 83.75, 85.18, 85.97),
        "random": ("feature2", 30.54, 9.15, 9.39, 11.09, 12.3, 14.3, 17.41, 21.32, 23.77),
    })
IMAGENET_LINEAR = Table("imagenet", 1281167, 50000, 1000, (*FIVE_MAPS, "AvgPool"), {
    "ODC": (14.76, 31.82, 42.44, 55.76, 57.70, 53.42),
    "supervised": (15.18, 33.96, 47.86, 67.56, 76.17, 74.12),
    "random": (11.37, 16.21, 13.47, 9.07, 6.54, 4.35),
})
# Each row is the best of nine runs. The lists of images were made by rounding in each class.
IMAGENET_1PERCENT = Table("imagenet", 12812, 50000, 1000, ("Fine-tuned",), {
    "ODC, top-1": (32.39,), "ODC, top-5": (61.02,),
    "random, top-1": (1.56,), "random, top-5": (4.99,),
}, tolerance=0.02)
IMAGENET_10PERCENT = Table("imagenet", 128117, 50000, 1000, ("Fine-tuned",), {
    "ODC, top-1": (58.15,), "ODC, top-5": (82.55,),
    "random, top-1": (21.78,), "random, top-5": (44.24,),
}, tolerance=0.02)
PLACES205_LINEAR = Table("places205", 2448873, 20500, 205, FIVE_MAPS, {
    "ODC (MMSelfSup, 2022)": (19.28, 34.09, 40.90, 47.04, 48.35),
    "ODC (OpenSelfSup, 2020)": (20.94, 34.78, 41.19, 47.45, 49.18),
    "supervised": (21.27, 36.10, 43.03, 51.38, 53.05),
    "random": (17.19, 21.70, 19.23, 14.59, 11.73),
})
# The protocol is published, ODC's numbers are not.
INATURALIST2018_LINEAR = Table("inaturalist2018", 437513, 24426, 8142, FIVE_MAPS, {})
IMAGENET_KNN = Table("imagenet", 1281167, 50000, 1000, ("k=10", "k=20", "k=100", "k=200"), {
    "ODC (MMSelfSup, 2022)": (38.5, 39.1, 37.8, 36.9)})


def show(title, columns, ours, published=None):
    """Print a Markdown table: published rows, then ours, {row name: {column: number or text}}."""
    rows = {f"{method}, published": dict(zip(published.columns, values))
            for method, values in (published.rows if published else {}).items()} | ours
    cells = [["method", *columns]]
    for name, values in rows.items():
        row = [values.get(column, "-") for column in columns]
        cells.append([name, *(v if isinstance(v, str) else f"{v:.2f}" for v in row)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print_main("\n".join(["", title, "", *lines, ""]))


def write_json(path, content):
    """Write a result file from process 0, if there is a path. Raises UserError. A collective."""
    with raise_everywhere():
        if path and is_main():
            text = json.dumps(content, indent=2) + "\n"
            write_atomically(path, lambda file: file.write(text.encode()))
