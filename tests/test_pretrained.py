"""A folder of one's own: clusters of a pre-trained backbone, whole upright images, kept copies."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from odc import assign, settings
from odc.clusters import stabilities
from odc.data.augmentation import normalise, whole_image
from odc.data.datasets import open_dataset
from odc.data.images import ImageSet, UnreadableImage
from odc.errors import Interrupted
from odc.model import ResNet
from odc.runtime.log import print_end
from tests.runs import run_main, state_of


def test_a_pretrained_backbone_clusters_and_learns_on(folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = ResNet("resnet18").eval()
    torch.save(backbone.state_dict(), tmp_path / "r18.pth")
    output = tmp_path / "out"
    arguments = ["--data", folder, "--pretrained", tmp_path / "r18.pth", "--output", output,
                 "--image-size", "40", "--num-clusters", "6", "--workers", "0", "--device", "cpu"]
    assert run_main(*arguments, "--epochs", "0") == 0
    state, dataset = state_of(output), open_dataset(str(folder))
    assert (state["arch"], state["settings"]["initial"]) == ("resnet18", "backbone")
    images = torch.stack([whole_image(dataset.load(i), 40) for i in range(150)])
    with torch.no_grad():
        pooled = F.normalize(backbone(normalise(images))[-1].mean((2, 3)))
    expected = F.normalize(pooled - pooled.mean(0))
    assert np.load(output / "features.npy") == pytest.approx(expected.numpy(), abs=1e-4)
    monkeypatch.setattr(assign.launch, "catch_signals", lambda: None)
    assign.main(["--checkpoint", str(output / "checkpoint.pth"), "--data", str(folder),
                 "--output", str(tmp_path / "new.csv"), "--device", "cpu"])
    columns = [[line.split(",")[:2] for line in path.read_text().splitlines()]
               for path in (output / "clusters.csv", tmp_path / "new.csv")]
    assert columns[0] == columns[1]

    def stop(args, state, *rest):
        assert torch.equal(state.memory.labels, labels)
        raise Interrupted("seen.")
    labels = state["memory"]["labels"]
    monkeypatch.setattr(train, "train_epoch", stop)
    assert run_main(*arguments, "--epochs", "3") == 143


def test_a_folder_is_read_whole_and_upright_and_small_copies_are_kept(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels = Image.new("RGB", (600, 400), "red")
    pixels.save(tmp_path / "a.jpg", exif=turned)
    (tmp_path / "b.jpg").write_bytes(b"not an image")
    pixels.resize((30, 20)).save(tmp_path / "c.png")
    dataset = open_dataset(str(tmp_path))
    assert dataset.load(0).size == (400, 600)
    dataset.keep_small_copies(128)
    with pytest.raises(UnreadableImage):
        dataset.load(1)
    dataset.leave_out({"b.jpg": "broken"})
    (tmp_path / "a.jpg").unlink()
    assert [dataset.load(i).size for i in (0, 1)] == [(128, 192), (30, 20)]
    seen = whole_image(dataset.load(0), 60)  # 40 x 60 pixels on white
    assert (seen[:, :, :9] == 255).all() and (seen[1:, :, 11:49] < 10).all()


def test_time_is_said(capsys):
    print_end(200, 6600)
    assert "About 1 h 50 min for 200 epochs on this machine, until " in capsys.readouterr().out
    args = settings.parse(["--batch-size", "4", "--image-size", "32", "--arch", "narrow",
                           "--num-clusters", "5"])
    assert 0 < settings.images_per_second(args, torch.device("cpu"), True) < 1e6


def test_clear_clusters_are_stable(monkeypatch):
    """Three colours, not noise. The network sees one pixel, at either size, pixels are all seen."""
    network = SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]), out_channels=[3])
    network.eval = lambda: network
    monkeypatch.setattr("odc.clusters.average_maps", lambda _, images: images[..., 0, 0])
    noise = np.random.default_rng(0).integers(256, size=(120, 32, 32, 3), dtype=np.uint8)
    colours = 0 * noise + np.tile(255 * np.eye(3, dtype=np.uint8), (40, 1))[:, None, None]
    for seen, others in ((colours, noise), (noise, colours)):
        others = others.copy()
        others[:, 0, 0] = seen[:, 0, 0]
        images = ImageSet("folder", "train", "somewhere", pixels=others)
        assert [value > 0.9 for value in stabilities(network, images, [32, 64], 3)] == [
            seen is colours, seen is colours, seen is noise]
