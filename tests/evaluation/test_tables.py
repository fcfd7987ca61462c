"""Tables: published rows stand beside ours only where the two may be compared."""

import json
from types import SimpleNamespace

import pytest

from odc.errors import UserError
from odc.evaluation import tables
from odc.evaluation.linear import PROTOCOLS, TABLES


def test_markdown(capsys):
    ours = {"ours": {"k=10": 40.123, "k=5": 7}}
    tables.show("A title", ["k=10", "k=5"], ours, tables.IMAGENET_KNN)
    assert capsys.readouterr().out.splitlines() == [
        "", "A title", "",
        "| method                           | k=10  | k=5  |",
        "|----------------------------------|-------|------|",
        "| ODC (MMSelfSup, 2022), published | 38.50 | -    |",
        "| ours                             | 40.12 | 7.00 |", "",
    ]
    tables.show("A title", ["k=10"], {"ours": {"k=10": 1.0}})
    assert "published" not in capsys.readouterr().out


class Images(SimpleNamespace):
    def __len__(self):
        return self.count


@pytest.mark.parametrize("protocol, changed, odc", [
    ("imagenet-multihead", {}, 57.70), ("imagenet-avgpool", {}, 53.42),
    ("imagenet-multihead", dict(train=1281160), 57.70), ("imagenet-1percent", {}, None),
    ("imagenet-1percent", dict(train=12811), 32.39),
    ("imagenet-10percent", dict(train=128116), 58.15), ("places205", {}, None), ("short", {}, None),
    *(("imagenet-multihead", changed, None) for changed in (
        dict(size=160), dict(name="folder"), dict(train=128116),
        dict(val=5000), dict(classes=100), dict(arch="resnet18"), dict(small_stem=True)))])
def test_published_rows_stand_beside_their_own_protocol_alone(protocol, changed, odc):
    run = SimpleNamespace(**dict(name="imagenet", train=1281167, val=50000, classes=1000, size=224,
                                 arch="resnet50", small_stem=False) | changed)
    sets = {split: Images(name=run.name, classes=range(run.classes), count=getattr(run, split))
            for split in ("train", "val")}
    network = SimpleNamespace(**sets, backbone=run, image_size=run.size)
    table = TABLES[protocol].if_comparable(network) if protocol in TABLES else None
    assert (table is None) == (odc is None)
    if table:
        row = next(row for method, row in table.rows.items() if method.startswith("ODC"))
        assert dict(zip(table.columns, row))[PROTOCOLS[protocol].columns[-1]] == odc


def test_json(tmp_path):
    tables.write_json(None, {})
    tables.write_json(tmp_path / "a.json", {"results": {"k=1": 1.5}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"results": {"k=1": 1.5}}
    with pytest.raises(UserError, match="missing"):
        tables.write_json(tmp_path / "missing" / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
