"""A run that never was: clusters of made-up images, with file names that try to be markup."""

import json
import os
import re

import torch
import torch.nn.functional as F
from PIL import Image

from odc.clusters import Clustering
from odc.data.images import ImageSet, file_names
from odc.outputs import page

SIZES = [150, 70, 40, 30, 20, 12, 9, 5, 0, 1]  # of the clusters; one is empty
ODD_NAMES = ["</script><script>document.title = 'taken'</script>.png", "it's \"quoted\" & more.png",
             "<img src=x onerror=\"document.title='taken'\">.png", "日本 größe.png",
             "{{data}}.png", os.fsdecode(b"not \xff utf-8.png")]
CLASSES = ["cat & dog", "<i>fish</i>", "Vögel"]


def images():
    """An ImageSet without files, in which the first images of cluster 0 have odd names."""
    N = sum(SIZES)
    names = ODD_NAMES + [f"a/{i:03d}.png" for i in range(len(ODD_NAMES), N)]
    classes = torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))
    return ImageSet("folder", "train", "nowhere", names=file_names(names), labels=classes,
                    classes=CLASSES)


def clusters():
    """Clusters whose centroids lie around a circle of the first two dimensions."""
    K, N = len(SIZES), sum(SIZES)
    labels = torch.arange(K).repeat_interleave(torch.tensor(SIZES))
    angle = torch.arange(K) * (2 * torch.pi / K)
    centroids = F.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, 6))
    noise = torch.randn(N, 8, generator=torch.Generator().manual_seed(1))
    noise *= torch.linspace(0.08, 0.4, K)[labels, None]
    features = F.normalize(centroids[labels] + noise)
    similarity = F.cosine_similarity(features, centroids[labels]).round(decimals=4)
    copies = [[(20 * n, 12, 12, 99, 1.0, ""), (20 * n + 7, 12, 9, 50, 0.995, "hash"),
               (20 * n + 9, 9, 9, 1, 0.91, "features")] for n in range(14)]
    return Clustering(labels, similarity, centroids, features, duplicates=(copies, 0.9))


def write_log(folder, *more):
    """log.jsonl with a few records, and more lines after them."""
    lines = [json.dumps(dict(epoch=1 + s // 3, step=s, loss=4 - s / 9)) for s in range(1, 9)]
    (folder / "log.jsonl").write_text("\n".join([*lines, *more]) + "\n")


def write_run(root):
    """A folder with a page, and what it shows: images of one colour each, and their clusters."""
    folder, dataset, made = root / "<b>run & co", images(), clusters()
    for i in range(len(dataset)):
        path = root / "images" / dataset.name_of(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (i % 256, 90, 255 - i % 256)).save(path, "PNG")
    dataset.root = str(root / "images")
    folder.mkdir()
    write_log(folder)
    page.write_page(folder, dataset, made)
    return folder, dataset, made


def data_of(folder):
    """The data in a page."""
    text = (folder / "report.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def shown_name(dataset, i):
    """The name of an image as a page has it."""
    return dataset.name_of(i).encode("utf-8", "replace").decode()
