"""odc.assign: the cluster of new images, and the training images they resemble."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from odc import assign
from odc.data.augmentation import evaluation_transform, normalise
from odc.data.images import ImageSet, Names
from odc.data.datasets import open_dataset
from odc.errors import UserError
from odc.model import ODC
from odc.runtime import checkpoint, launch
from tests.processes import run_processes


def run_assign(state, data, output, *arguments):
    assign.main(["--checkpoint", str(state), "--data", str(data), "--output", str(output),
                 "--device", "cpu", "--workers", "0", *map(str, arguments)])
    with open(output, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def signals(monkeypatch):
    """Leave pytest's signal handlers in place."""
    monkeypatch.setattr(launch, "catch_signals", lambda: None)


def expected_features(state, dataset):
    """One image at a time, through the whole network."""
    network = ODC(state["arch"], state["small_stem"], dim=32, num_clusters=8)
    network.backbone.load_state_dict(state["backbone"])
    network.neck.load_state_dict(state["final_clusters"]["neck"])
    network.eval()
    transform = evaluation_transform(32)
    with torch.no_grad():
        rows = [network(normalise(transform(dataset.load(i))[None]))[0][0]
                for i in range(len(dataset))]
    return torch.nn.functional.normalize(torch.stack(rows))


def test_clusters_neighbours_and_features_of_images(finished, folder, tmp_path):
    rows = run_assign(finished / "checkpoint.pth", folder, tmp_path / "new.csv",
                      "--neighbours", 4, "--features", tmp_path / "new.npy")
    state, dataset = checkpoint.load(finished / "checkpoint.pth"), open_dataset(str(folder))
    features, centroids = expected_features(state, dataset), state["final_clusters"]["centroids"]
    written = np.load(tmp_path / "new.npy")
    assert written.dtype == np.float32 and written == pytest.approx(features.numpy(), abs=1e-5)
    bank = torch.from_numpy(np.load(finished / "features.npy"))
    names = [dataset.name_of(i) for i in range(150)]
    assert [row["path"] for row in rows] == names
    for i, row in enumerate(rows):
        distances = (centroids - features[i]).norm(dim=1)
        smallest = float(distances.min())
        assert float(distances[int(row["cluster"])]) == pytest.approx(smallest, abs=1e-5)
        cosine = torch.cosine_similarity(features[i], centroids[int(row["cluster"])], dim=0)
        assert float(row["similarity"]) == pytest.approx(float(cosine), abs=2e-4)
        nearest = (bank @ features[i]).sort(descending=True).values[:4]
        shown = [float(row[f"similarity_{n}"]) for n in range(1, 5)]
        assert shown == pytest.approx(nearest.tolist(), abs=2e-4)
        for n in range(1, 5):
            named = bank[names.index(row[f"neighbour_{n}"])]
            assert float(named @ features[i]) == pytest.approx(shown[n - 1], abs=2e-4)
    assert len({row["cluster"] for row in rows}) > 1


def test_without_neighbours_and_for_another_size_of_image(finished, tmp_path):
    Image.new("RGB", (90, 50), (200, 30, 20)).save(tmp_path / "one.png")
    Image.new("L", (10, 50), 40).save(tmp_path / "two.png")
    rows = run_assign(finished / "checkpoint.pth", tmp_path, tmp_path / "new.csv")
    assert [row["path"] for row in rows] == ["one.png", "two.png"]
    assert list(rows[0]) == ["path", "cluster", "similarity"]


def test_agreement_with_labels_is_said_where_there_are_some(
        finished, folder, tmp_path, capsys):
    rows = run_assign(finished / "checkpoint.pth", folder, tmp_path / "new.csv")
    clusters = [int(row["cluster"]) for row in rows]
    classes = [row["path"].split("/")[0] for row in rows]
    said = capsys.readouterr().out
    assert f"NMI {normalized_mutual_info_score(classes, clusters):.3f}, purity " in said
    assert f"ARI {adjusted_rand_score(classes, clusters):.3f}, Hungarian accuracy " in said
    run_assign(finished / "checkpoint.pth", folder / "class0", tmp_path / "new.csv")
    assert "NMI" not in capsys.readouterr().out


def test_the_built_in_set_and_its_val_split(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("odc.data.shapes.SPLITS", {"train": (12, 0), "val": (5, 1)})
    state = finished / "checkpoint.pth"
    assert len(run_assign(state, "shapes", tmp_path / "train.csv")) == 12
    rows = run_assign(state, "shapes", tmp_path / "val.csv", "--split", "val",
                      "--folders", tmp_path / "sorted")
    assert len(rows) == 5
    dataset = open_dataset("shapes", "val")
    for row in rows:  # images in memory become PNG files
        image = Image.open(tmp_path / "sorted" / row["cluster"] / f"{row['path']}.png")
        assert (np.asarray(image) == dataset.pixels[int(row["path"])]).all()


def test_the_number_of_processes_changes_nothing(finished, folder, tmp_path):
    state = finished / "checkpoint.pth"
    more = ["--neighbours", 2, "--folders"]
    alone = run_assign(state, folder, tmp_path / "1.csv", *more, tmp_path / "alone")
    both = run_processes(run_assign, 2, state, folder, tmp_path / "2.csv", *more, tmp_path / "both")
    assert both[0] == alone
    files = [sorted(path.relative_to(root) for path in root.rglob("*"))
             for root in (tmp_path / "alone", tmp_path / "both")]
    assert files[0] == files[1] and len(files[0]) > 150


def test_an_unreadable_image_has_no_cluster(finished, folder, tmp_path):
    for path in folder.glob("*/*"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).symlink_to(path)
    (tmp_path / "data" / "zzz.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="zzz.png"):
        rows = run_assign(finished / "checkpoint.pth", tmp_path / "data", tmp_path / "new.csv",
                          "--neighbours", 1, "--folders", tmp_path / "sorted")
    assert list(rows[-1].values()) == ["zzz.png", "", "", "", ""]
    assert all(row["cluster"] for row in rows[:-1])
    assert len(list((tmp_path / "sorted").glob("*/*"))) == 150
    assert not list((tmp_path / "sorted").glob("*/zzz.png"))


def test_a_training_image_that_cannot_be_read_is_nobodys_neighbour(finished, folder, tmp_path):
    """Its vector is that of the image that stood in for it."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pth"
    state = checkpoint.load(path)
    state["progress"]["failed"] = [7, 20]
    checkpoint.save(path, state)
    vectors = np.load(tmp_path / "run" / "features.npy")
    vectors[7] = vectors[3]
    np.save(tmp_path / "run" / "features.npy", vectors)
    rows = run_assign(path, folder, tmp_path / "new.csv", "--neighbours", 148)
    names = {rows[3][f"neighbour_{n}"] for n in range(1, 149)}
    images = open_dataset(str(folder))
    assert names == {images.name_of(i) for i in range(150) if i not in (7, 20)}
    with pytest.raises(UserError, match="only 148 images"):
        run_assign(path, folder, tmp_path / "new.csv", "--neighbours", 149)


def test_names_with_a_carriage_return(finished, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a\rb.png")
    rows = run_assign(finished / "checkpoint.pth", tmp_path, tmp_path / "new.csv")
    assert [row["path"] for row in rows] == ["a\rb.png"]


def test_transparent_images_are_laid_on_the_background_of_the_run(finished, tmp_path, capsys):
    state = checkpoint.load(finished / "checkpoint.pth")
    state["settings"]["background"] = "white"
    checkpoint.save(tmp_path / "checkpoint.pth", state)
    for colour in ("white", "black"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (40, 40), colour).save(tmp_path / colour / "one.png")
    (tmp_path / "clear").mkdir()
    Image.new("RGBA", (40, 40), (200, 30, 20, 0)).save(tmp_path / "clear" / "one.png")

    def vector(run, data, *arguments):
        run_assign(run, tmp_path / data, tmp_path / "new.csv", "--features", tmp_path / "new.npy",
                   *arguments)
        return np.load(tmp_path / "new.npy")

    for colour, arguments in (("white", []), ("black", ["--background", "black"])):
        laid = vector(tmp_path / "checkpoint.pth", "clear", *arguments)
        assert laid == pytest.approx(vector(tmp_path / "checkpoint.pth", colour))
    assert "transparency" not in capsys.readouterr().out
    assert vector(finished / "checkpoint.pth", "clear") != pytest.approx(laid, abs=1e-3)
    assert "transparency is dropped" in capsys.readouterr().out


# --- folders -------------------------------------------------------------------------------------


def images_with_equal_names(root):
    """Four images in four folders, of which three have a name that only differs in its case."""
    names = ["a/cat.png", "b/cat.png", "c/CAT.png", "d/cat-1.png", "d/dög's.png"]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(root / name)
    return ImageSet("folder", "train", str(root), names=Names(names))


@pytest.mark.parametrize("copy", [False, True])
def test_names_that_collide_are_kept_apart(tmp_path, copy, monkeypatch):
    images_with_equal_names(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    dataset = images_with_equal_names(tmp_path / "images")
    dataset.root = "images"  # links hold from everywhere
    labels = torch.tensor([7, 7, 7, 7, 0])
    assign.fill_folders(tmp_path / "sorted", dataset, labels, (), copy)
    files = sorted((tmp_path / "sorted").glob("*/*"))
    assert {str(path.relative_to(tmp_path / "sorted")) for path in files} == {
        "0/dög's.png", "7/cat.png", "7/cat-1.png", "7/CAT-2.png", "7/cat-1-3.png"}
    assert sorted(Image.open(path).getpixel((0, 0))[0] for path in files) == [0, 1, 2, 3, 4]
    assert all(path.is_symlink() != copy for path in files)
    for name in ("a/cat.png", "d/cat-1.png"):
        assert (tmp_path / "images" / name).exists()


def test_folders_of_a_run_hold_links_or_copies(finished, folder, tmp_path):
    state = finished / "checkpoint.pth"
    for name, more in (("links", []), ("copies", ["--copy"])):
        rows = run_assign(state, folder, tmp_path / "new.csv", "--folders", tmp_path / name, *more)
        for row in rows:
            path = tmp_path / name / row["cluster"] / row["path"].split("/")[1]
            assert path.read_bytes() == (folder / row["path"]).read_bytes()
            assert path.is_symlink() == (name == "links")
        assert len(list((tmp_path / name).glob("*/*"))) == 150


def test_a_full_disk_is_one_sentence(finished, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device", "somewhere")

    dataset = images_with_equal_names(tmp_path / "images")
    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(UserError, match="sorted: No space left on device .somewhere.; make room"):
        assign.fill_folders(tmp_path / "sorted", dataset, torch.zeros(5), (), True)


# --- mistakes ------------------------------------------------------------------------------------


def test_training_images_elsewhere(finished, folder, tmp_path):
    state = checkpoint.load(finished / "checkpoint.pth")
    state["settings"]["data"] = "a/path/that/is/gone"
    checkpoint.save(tmp_path / "checkpoint.pth", state)
    shutil.copy(finished / "features.npy", tmp_path)
    arguments = (tmp_path / "checkpoint.pth", folder, tmp_path / "new.csv", "--neighbours", 1)
    with pytest.raises(UserError, match="a/path/that/is/gone does not exist.*--train-data"):
        run_assign(*arguments)
    assert run_assign(*arguments, "--train-data", folder)[0]["neighbour_1"]
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    with pytest.raises(UserError, match="other images.*--train-data"):
        run_assign(*arguments, "--train-data", tmp_path)
    assert "neighbour_1" not in run_assign(*arguments[:3])[0]  # nobody needs their names then


def test_vectors_of_the_run_that_are_missing_damaged_or_of_other_images(
        finished, folder, tmp_path):
    shutil.copy(finished / "checkpoint.pth", tmp_path)
    arguments = (tmp_path / "checkpoint.pth", folder, tmp_path / "new.csv")
    vectors = tmp_path / "features.npy"
    for content, words in ((None, "missing or damaged"), (b"no array", "missing or damaged"),
                           (np.zeros((149, 32), np.float32), "149 vectors for 150 images")):
        if isinstance(content, bytes):
            vectors.write_bytes(content)
        elif content is not None:
            np.save(vectors, content)
        with pytest.raises(UserError, match=f"features.npy.*{words}.*--export-only"):
            run_assign(*arguments, "--neighbours", 1)
    assert len(run_assign(*arguments)) == 150  # nobody needs them then


@pytest.mark.parametrize("change, words", [
    (dict(state="nothing.pth"), "nothing.pth"),
    (dict(state="backbone.pth"), "backbone.pth"),
    (dict(data="nowhere"), "nowhere"),
    (dict(output="nowhere/new.csv"), "--output nowhere/new.csv"),
    (dict(neighbours=999), "--neighbours 999"),
    (dict(more=["--features", "nowhere/new.npy"]), "--features nowhere/new.npy"),
    (dict(more=["--folders", "nowhere/sorted"]), "--folders nowhere/sorted"),
    (dict(more=["--folders", "."]), "--folders ."),
    (dict(more=["--folders", "memory"]), "--folders memory: is there already"),
    (dict(output="."), "--output .: is no name of a file"),
    (dict(output=""), "is no name of a file"),
    (dict(output="memory"), "--output memory: is no name of a file"),
    (dict(output="a.csv", more=["--features", "./a.csv"]), "must differ: a.csv, ./a.csv"),
    (dict(more=["--copy"]), "--copy: there are no --folders"),
])
def test_mistakes_are_one_sentence(
        finished, folder, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(finished)
    with pytest.raises(UserError) as error:
        run_assign(change.get("state", "checkpoint.pth"), change.get("data", folder),
                   change.get("output", tmp_path / "new.csv"),
                   "--neighbours", change.get("neighbours", 1), *change.get("more", []))
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1
