"""odc.assign: the cluster of new images, and the training images they resemble."""

import csv

import pytest
import torch
from PIL import Image

from odc.runtime import program
from odc.errors import UserError
from odc import assign, distributed
from odc.runtime import checkpoint
from odc.data.augmentation import evaluation_transform, normalise
from odc.data.layouts import open_dataset
from odc.model import ODC
from tests.processes import run_processes
from tests.runs import SMALL, run_main


def run_assign(state, data, output, *arguments):
    assign.main(["--checkpoint", str(state), "--data", str(data), "--output", str(output), "--device", "cpu",
                 "--workers", "0", *map(str, arguments)])
    with open(output, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def signals(monkeypatch):
    """Leave pytest's signal handlers in place."""
    monkeypatch.setattr(program, "catch_signals", lambda: None)


def expected_features(state, dataset):
    """One image at a time, through the whole network."""
    network = ODC(state["arch"], state["small_stem"], dim=32, num_clusters=8)
    for part in ("backbone", "neck", "head"):
        getattr(network, part).load_state_dict(state[part])
    network.eval()
    transform = evaluation_transform(32)
    with torch.no_grad():
        rows = [network(normalise(transform(dataset.load(i))[None]))[0][0] for i in range(len(dataset))]
    return torch.nn.functional.normalize(torch.stack(rows))


def test_clusters_and_neighbours_of_images(finished, folder, tmp_path):  # noqa: F811
    rows = run_assign(finished / "checkpoint.pth", folder, tmp_path / "new.csv", "--neighbours", 4)
    state, dataset = checkpoint.load(finished / "checkpoint.pth"), open_dataset(str(folder))
    features, centroids = expected_features(state, dataset), state["memory"]["centroids"]
    bank = state["memory"]["features"]
    assert [row["path"] for row in rows] == [dataset.name_of(i) for i in range(150)]
    for i, row in enumerate(rows):
        scores = centroids @ features[i]
        assert float(scores[int(row["cluster"])]) == pytest.approx(float(scores.max()), abs=1e-5)
        cosine = torch.cosine_similarity(features[i], centroids[int(row["cluster"])], dim=0)
        assert float(row["similarity"]) == pytest.approx(float(cosine), abs=2e-4)
        nearest = (bank @ features[i]).sort(descending=True).values[:4]
        assert [float(row[f"similarity_{n}"]) for n in range(1, 5)] == pytest.approx(nearest.tolist(), abs=2e-4)
        for n in range(1, 5):
            named = bank[[dataset.name_of(j) for j in range(150)].index(row[f"neighbour_{n}"])]
            assert float(named @ features[i]) == pytest.approx(float(row[f"similarity_{n}"]), abs=2e-4)
    assert len({row["cluster"] for row in rows}) > 1


def test_without_neighbours_and_for_another_size_of_image(finished, tmp_path):  # noqa: F811
    Image.new("RGB", (90, 50), (200, 30, 20)).save(tmp_path / "one.png")
    Image.new("L", (10, 50), 40).save(tmp_path / "two.png")
    rows = run_assign(finished / "checkpoint.pth", tmp_path, tmp_path / "new.csv")
    assert [row["path"] for row in rows] == ["one.png", "two.png"]
    assert list(rows[0]) == ["path", "cluster", "similarity"]


def test_the_built_in_set_and_its_val_split(finished, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("odc.data.shapes.SPLITS", {"train": (12, 0), "val": (5, 1)})
    assert len(run_assign(finished / "checkpoint.pth", "shapes", tmp_path / "train.csv")) == 12
    assert len(run_assign(finished / "checkpoint.pth", "shapes", tmp_path / "val.csv", "--split", "val")) == 5


def test_the_number_of_processes_changes_nothing(finished, folder, tmp_path):  # noqa: F811
    alone = run_assign(finished / "checkpoint.pth", folder, tmp_path / "1.csv", "--neighbours", 2)
    both = run_processes(run_assign, 2, finished / "checkpoint.pth", folder, tmp_path / "2.csv", "--neighbours", 2)
    assert both[0] == alone


def test_an_unreadable_image_has_no_cluster(finished, folder, tmp_path):  # noqa: F811
    for path in folder.glob("*/*"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).symlink_to(path)
    (tmp_path / "data" / "zzz.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="zzz.png"):
        rows = run_assign(finished / "checkpoint.pth", tmp_path / "data", tmp_path / "new.csv", "--neighbours", 1)
    assert list(rows[-1].values()) == ["zzz.png", "", "", "", ""] and all(row["cluster"] for row in rows[:-1])


def test_training_images_elsewhere(finished, folder, tmp_path):  # noqa: F811
    state = checkpoint.load(finished / "checkpoint.pth")
    state["settings"]["data"] = "a/path/that/is/gone"
    checkpoint.save(tmp_path / "checkpoint.pth", state)
    arguments = (tmp_path / "checkpoint.pth", folder, tmp_path / "new.csv", "--neighbours", 1)
    with pytest.raises(UserError, match="a/path/that/is/gone does not exist.*--train-data"):
        run_assign(*arguments)
    assert run_assign(*arguments, "--train-data", folder)[0]["neighbour_1"]
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    with pytest.raises(UserError, match="other images.*--train-data"):
        run_assign(*arguments, "--train-data", tmp_path)
    assert "neighbour_1" not in run_assign(*arguments[:3])[0]  # nobody needs their names then


@pytest.mark.parametrize("change, words", [
    (dict(state="nothing.pth"), "nothing.pth"),
    (dict(state="backbone.pth"), "backbone.pth"),
    (dict(data="nowhere"), "nowhere"),
    (dict(output="nowhere/new.csv"), "--output nowhere/new.csv"),
    (dict(neighbours=999), "--neighbours 999"),
])
def test_mistakes_are_one_sentence(finished, folder, tmp_path, monkeypatch, change, words):  # noqa: F811
    monkeypatch.chdir(finished)
    with pytest.raises(UserError) as error:
        run_assign(change.get("state", "checkpoint.pth"), change.get("data", folder),
                   change.get("output", tmp_path / "new.csv"), "--neighbours", change.get("neighbours", 1))
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1
