"""A run that never was: clusters of made-up images, with file names that try to be markup."""

import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from odc.clusters import Clustering
from odc.data.images import ImageSet, Names
from odc.outputs import export, report

SIZES = [150, 70, 40, 30, 20, 12, 9, 5, 0, 1]  # of the clusters; one is empty
ODD_NAMES = ["</script><script>document.title = 'taken'</script>.png", "it's \"quoted\" & more.png",
             "<img src=x onerror=\"document.title='taken'\">.png", "日本 größe.png",
             "{{data}}.png", os.fsdecode(b"not \xff utf-8.png")]
CLASSES = ["cat & dog", "<i>fish</i>", "Vögel"]


def images():
    """An ImageSet without files, in which the first images of cluster 0 have odd names."""
    labels = torch.tensor(SIZES).repeat_interleave(torch.tensor(SIZES))
    N = int(labels.numel())
    names = ODD_NAMES + [f"a/{i:03d}.png" for i in range(len(ODD_NAMES), N)]
    classes = torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))
    return ImageSet("folder", "train", "nowhere", names=Names(names), labels=classes,
                    classes=CLASSES)


def clusters(noise=0.4):
    """Clusters whose centroids lie around a circle of the first two dimensions."""
    K, N = len(SIZES), sum(SIZES)
    labels = torch.arange(K).repeat_interleave(torch.tensor(SIZES))
    angle = torch.arange(K) * (2 * torch.pi / K)
    centroids = F.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, 6))
    scale = noise * torch.linspace(0.2, 1, K)[labels, None]
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(centroids[labels] + scale * torch.randn(N, 8, generator=generator))
    similarity = F.cosine_similarity(features, centroids[labels]).round(decimals=4)
    return Clustering(labels, similarity, centroids, features)


def write_images(root, dataset):
    """A file for each name of an ImageSet, and the set with this root."""
    for i in range(len(dataset)):
        path = root / dataset.name_of(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (i % 256, 90, 255 - i % 256)).save(path, "PNG")
    dataset.root = str(root)
    return dataset


def write_log(folder):
    folder.mkdir(parents=True, exist_ok=True)
    records = [dict(epoch=1 + step // 3, step=step, loss=4 - step / 9) for step in range(1, 9)]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_clusters(folder, dataset, made, unreadable=()):
    """The files of a run from which its page can be made again."""
    for name in ("labels", "centroids", "features"):
        export.save_array(folder / f"{name}.npy", getattr(made, name))
    export.save_table(folder / "clusters.csv", dataset, made.labels, made.similarity, unreadable)


def write_run(root, unreadable=()):
    """A run's folder with its page, (folder, ImageSet, Clusters)."""
    folder = root / "<b>run & co"
    dataset, made = write_images(root / "images", images()), clusters()
    write_log(folder)
    earlier = np.arange(len(made.labels)) % len(SIZES)
    np.save(folder / "labels_epoch_1.npy", earlier[::-1])
    np.save(folder / "labels_epoch_2.npy", earlier)
    np.save(folder / "labels_epoch_3.npy", made.labels.numpy())  # of the last epoch: no growth
    write_clusters(folder, dataset, made, unreadable)
    report.save(folder, dataset, made, unreadable)
    return folder, dataset, made
