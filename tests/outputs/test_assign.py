"""odc.assign: the cluster of new images, and the training images they resemble; and its table."""

import csv
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from odc import assign
from odc.data.augmentation import normalise, whole_image
from odc.data.datasets import open_dataset
from odc.data.images import ImageSet, file_names
from odc.errors import UserError
from odc.evaluation import metrics
from odc.model import ODC
from odc.outputs import results
from odc.runtime import checkpoint, launch
from tests.processes import run_processes
from tests.runs import SMALL, run_main


def read_table(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def run_assign(state, data, output, *arguments):
    assign.main(["--checkpoint", str(state), "--data", str(data), "--output", str(output),
                 "--device", "cpu", *map(str, arguments)])
    return read_table(output)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Leave pytest's signal handlers in place, and read images without loader workers."""
    monkeypatch.setattr(launch, "catch_signals", lambda: None)
    monkeypatch.setattr(assign, "default_workers", lambda in_memory: 0)


def copy_run(finished, root, change=lambda state: None):
    """A run's checkpoint and vectors in another folder, with a change: the checkpoint's path."""
    root.mkdir(exist_ok=True)
    state = checkpoint.read_dict(finished / "checkpoint.pth")
    change(state)
    checkpoint.write_dict(root / "checkpoint.pth", state)
    shutil.copy(finished / "features.npy", root)
    return root / "checkpoint.pth"


@torch.no_grad()
def expected_features(state, dataset):
    """Through the network as train.py has it."""
    network = ODC(state["arch"], state["small_stem"], num_clusters=8).eval()
    network.backbone.load_state_dict(state["backbone"])
    network.neck.load_state_dict(state["final_clusters"]["neck"])
    images = torch.stack([whole_image(dataset.load(i), 32) for i in range(len(dataset))])
    return torch.nn.functional.normalize(network(normalise(images))[0])


@pytest.mark.parametrize("stability, look", [((2, 1), (32, True)), ((1, 2), (64, False))])
def test_images_are_seen_where_clusters_were_more_stable(
        folder, tmp_path, monkeypatch, stability, look):
    """With parts, or enlarged twice. --neighbours checks the run's vectors."""
    monkeypatch.setattr("train.stabilities", lambda *_: [*stability, 0])
    assert run_main("--data", folder, "--output", tmp_path, *SMALL, "--preset", "small",
                    "--epochs", "1") == 0
    rows = run_assign(tmp_path / "checkpoint.pth", folder, tmp_path / "new.csv", "--neighbours", 1)
    assert [int(row["cluster"]) for row in rows] == np.load(tmp_path / "labels.npy").tolist()
    state, network, _ = assign.load_run(tmp_path / "checkpoint.pth", torch.device("cpu"))
    assert (state["final_clusters"]["image_size"], state["final_clusters"]["parts"]) == look
    image = normalise(whole_image(open_dataset(str(folder)).load(7), look[0])[None])
    assert network(image)[0].tolist() == pytest.approx(
        np.load(tmp_path / "features.npy")[7].tolist(), abs=1e-5)


def test_clusters_neighbours_and_features_of_images(finished, folder, tmp_path, capsys):
    rows = run_assign(finished / "checkpoint.pth", folder, tmp_path / "new.csv",
                      "--neighbours", 4, "--features", tmp_path / "new.npy")
    state, dataset = checkpoint.read_dict(finished / "checkpoint.pth"), open_dataset(str(folder))
    features, centroids = expected_features(state, dataset), state["final_clusters"]["centroids"]
    written = np.load(tmp_path / "new.npy")
    assert written.dtype == np.float32 and written == pytest.approx(features.numpy(), abs=1e-5)
    bank = torch.from_numpy(np.load(finished / "features.npy"))
    names = [dataset.name_of(i) for i in range(150)]
    assert [row["path"] for row in rows] == names
    for feature, row in zip(features, rows):
        distances, own = (centroids - feature).norm(dim=1), int(row["cluster"])
        assert float(distances[own]) == pytest.approx(float(distances.min()), abs=1e-5)
        cosine = torch.cosine_similarity(feature, centroids[own], dim=0)
        assert float(row["similarity"]) == pytest.approx(float(cosine), abs=2e-4)
        shown = [float(row[f"similarity_{n}"]) for n in range(1, 5)]
        named = bank[[names.index(row[f"neighbour_{n}"]) for n in range(1, 5)]]
        assert shown == pytest.approx((bank @ feature).topk(4).values.tolist(), abs=2e-4)
        assert shown == pytest.approx((named @ feature).tolist(), abs=2e-4)
    clusters = torch.tensor([int(row["cluster"]) for row in rows])
    _, line = metrics.agreement(clusters, dataset.labels)
    assert len(clusters.unique()) > 1 and line in capsys.readouterr().out


def test_the_number_of_processes_changes_nothing(finished, folder, tmp_path):
    state = finished / "checkpoint.pth"
    more = ["--neighbours", 2, "--folders"]
    alone = run_assign(state, folder, tmp_path / "1.csv", *more, tmp_path / "alone")
    both = run_processes(run_assign, 2, state, folder, tmp_path / "2.csv", *more, tmp_path / "both")
    assert both[0] == alone
    for root in ("alone", "both"):
        assert len(list((tmp_path / root).glob("*/*"))) == 150
        for i, row in enumerate(alone):
            path = tmp_path / root / row["cluster"] / f"{i}-{row['path'].split('/')[1]}"
            assert path.is_symlink() and path.samefile(folder / row["path"])


def test_images_in_memory_become_files(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("odc.data.shapes.SPLITS", {"train": (5, 0)})
    rows = run_assign(finished / "checkpoint.pth", "shapes", tmp_path / "new.csv",
                      "--folders", tmp_path / "sorted")
    for row, pixels in zip(rows, open_dataset("shapes").pixels, strict=True):
        image = Image.open(tmp_path / "sorted" / row["cluster"] / f"{row['path']}.png")
        assert (np.asarray(image) == pixels).all()


@pytest.mark.filterwarnings("ignore:the image")
def test_broken_files_have_no_cluster_and_stop_nothing(finished, tmp_path):
    for i in range(8):
        Image.new("RGB", (90, 20 + i), (30 * i, 30, 20)).save(tmp_path / f"{i}.png")
    for i in (0, 5):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    rows = run_assign(finished / "checkpoint.pth", tmp_path, tmp_path / "new.csv", "--neighbours",
                      1, "--features", tmp_path / "new.npy")
    assert [row["path"] for row in rows] == [f"{i}.png" for i in range(8)]
    for i, row in enumerate(rows):
        assert all(value == "" for value in list(row.values())[1:-1]) == (i in (0, 5))
    assert len(np.load(tmp_path / "new.npy")) == 6


@given(st.lists(st.text('a,"\r\n \';é\udcff', min_size=1), min_size=1, unique=True), st.data())
def test_any_name_survives_the_table(tmp_path_factory, names, data):
    broken = set(data.draw(st.lists(st.sampled_from(names))))
    dataset = ImageSet("folder", "train", "", names=file_names(n for n in names if n not in broken))
    dataset.left_out = sorted(broken)
    path = tmp_path_factory.mktemp("table") / "new.csv"
    N = len(dataset)
    results.write_table(path, dataset, torch.arange(N), torch.arange(N) / 7, listed=names)
    rows = read_table(path)
    assert [row["path"] for row in rows] == names
    assert {row["path"] for row in rows if row["cluster"] == ""} == broken
    assert [row["cluster"] for row in rows if row["cluster"]] == [str(i) for i in range(N)]


def test_training_images_elsewhere(finished, folder, tmp_path):
    path = copy_run(finished, tmp_path / "run",
                    lambda state: state["settings"].update(data=str(folder / "class1")))
    arguments = (path, folder / "class0", tmp_path / "new.csv", "--neighbours", 1)
    with pytest.raises(UserError, match="class1 holds other images.*--train-data"):
        run_assign(*arguments)
    assert run_assign(*arguments, "--train-data", folder)[0]["neighbour_1"]
    assert "neighbour_1" not in run_assign(*arguments[:3])[0]  # nobody needs their names then


@pytest.mark.parametrize("change, words", [
    (lambda vectors: vectors[:0], "out of bounds"), (lambda vectors: vectors[:, 1:], "size"),
    (lambda vectors: np.concatenate([vectors[:76], vectors[74:]]), "gives others"),
    (lambda vectors: vectors[::-1], "gives others"), (lambda vectors: vectors * np.nan, "others")])
def test_vectors_that_do_not_belong_to_the_checkpoint(finished, folder, tmp_path, change, words):
    path = copy_run(finished, tmp_path)
    np.save(tmp_path / "features.npy", change(np.load(finished / "features.npy")))
    with pytest.raises(UserError, match=f"features.npy: .*{words}.*--epochs 0"):
        run_assign(path, folder, tmp_path / "new.csv", "--neighbours", 1)


@pytest.mark.parametrize("change, words", [
    (lambda state: state.update(final_clusters=None), "come to its end.*--epochs 0"),
    (lambda state: state.update(program="odc train 1"), "this version")])
def test_checkpoints_that_are_not_of_a_finished_run(finished, folder, tmp_path, change, words):
    path = copy_run(finished, tmp_path, change)
    with pytest.raises(UserError, match=f"checkpoint.pth:? .*{words}"):
        run_assign(path, folder, tmp_path / "new.csv")


@pytest.mark.parametrize("change, words", [
    (dict(checkpoint="nothing.pth"), "nothing.pth"), (dict(checkpoint="."), "it is a directory"),
    (dict(checkpoint="backbone.pth"), "backbone.pth"), (dict(data="nowhere"), "nowhere"),
    (dict(output="backbone.pth"), "--output .*/backbone.pth: .* not a result of this program"),
    *[({option: name}, f"--{option} .*/{name}: it is read, or written") for option, name in (
        ("output", "linked.csv"), ("output", "clusters.csv"), ("features", "new"),
        ("features", "labels.npy"), ("features", "features.npy"))],
    (dict(features="a.npy"), "--features .*/a.npy: this file is not a result of this program"),
    (dict(folders="no/sorted"), "--folders .*/no/sorted: its folder is missing"),
    (dict(folders="memory"), "--folders .*/memory: choose a new folder"),
    (dict(data="here", folders="sorted"), "--folders .*/sorted: choose a new folder, outside --d")])
def test_mistakes_are_one_sentence(finished, folder, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "run"))
    os.symlink("checkpoint.pth", "linked.csv")
    os.symlink(".", "here")
    os.link("labels.npy", "a.npy")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    given = dict(checkpoint="checkpoint.pth", data=str(folder), output="new") | change
    with pytest.raises(UserError, match=words) as error:
        assign.main([word for name, value in given.items() for word in (f"--{name}", value)])
    assert len(str(error.value).splitlines()) == 1
    assert before == {path: path.read_bytes() for path in before}
