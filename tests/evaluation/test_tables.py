"""Tables: published rows stand beside ours only where the two may be compared."""

import json
from types import SimpleNamespace

import pytest

from odc.evaluation import tables as report
from odc.errors import UserError


def test_markdown():
    text = report.markdown("A title", ["k=10", "k=5"], {"ours": {"k=10": 40.123, "k=5": 7}}, report.IMAGENET_KNN)
    assert text.splitlines() == [
        "A title", "",
        "| method         | k=10  | k=5  |",
        "|----------------|-------|------|",
        "| ODC, published | 38.50 | -    |",
        "| ours           | 40.12 | 7.00 |",
    ]
    assert "published" not in report.markdown("A title", ["k=10"], {"ours": {"k=10": 1.0}})


@pytest.mark.parametrize("table, row", [
    (report.VOC07_SVM, "feature5 78.42 32.42 40.27 49.95 59.96 65.71 69.99 73.64 75.13"),
    (report.IMAGENET_LINEAR, "14.76 31.82 42.44 55.76 57.7 53.42"),
    (report.PLACES205_LINEAR, "19.28 34.09 40.9 47.04 48.35"),
    (report.IMAGENET_KNN, "38.5 39.1 37.8 36.9"),
])
def test_published_rows_of_odc(table, row):
    assert " ".join(map(str, table.rows["ODC"])) == row
    assert all(len(values) == len(table.columns) for values in table.rows.values())
    assert report.published_rows(table)["ODC"][table.columns[0]] == table.rows["ODC"][0]
    assert report.published_rows(None) is None


class Images(SimpleNamespace):
    def __len__(self):
        return self.count


def comparable(name="imagenet", train=1281167, val=50000, classes=1000, arch="resnet50", small_stem=False, size=224):
    sets = [Images(name=name, classes=range(classes), count=count) for count in (train, val)]
    return report.IMAGENET_KNN.is_comparable(*sets, SimpleNamespace(arch=arch, small_stem=small_stem), size)


def test_what_is_comparable():
    assert comparable() and comparable(train=1281160)
    for other in (dict(name="folder"), dict(train=128116), dict(val=5000), dict(classes=100), dict(arch="resnet18"),
                  dict(small_stem=True), dict(size=160)):
        assert not comparable(**other)


def test_json(tmp_path):
    report.write_json(None, {})
    report.write_json(tmp_path / "a.json", {"results": {"k=1": 1.5}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"results": {"k=1": 1.5}}
    with pytest.raises(UserError, match="missing"):
        report.write_json(tmp_path / "missing" / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
