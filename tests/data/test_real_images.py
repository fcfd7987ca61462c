"""Real images end to end: Fashion-MNIST from Debian's package, and photographs as JPEG files."""

from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from tests.processes import run_script
from tests.test_train import log_of

FASHION = Path("/usr/share/datasets/fashion-mnist")  # apt-get install dataset-fashion-mnist


@pytest.fixture
def fashion(tmp_path):
    """The 10,000 test images as a training set."""
    if not FASHION.exists():
        pytest.skip("apt-get install dataset-fashion-mnist")
    for kind in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
        (tmp_path / f"train-{kind}").symlink_to(FASHION / f"t10k-{kind}")
    return tmp_path


@pytest.mark.slow
def test_fashion_mnist(fashion, tmp_path):
    """With the settings that follow from the data, clusters and features pass those of pixels.

    The initial clusters are those of the pixels. The labels only measure.
    """
    output = tmp_path / "out"
    result = run_script("train.py", "--data", fashion, "--output", output, "--num-clusters", "100",
                        "--epochs", "15", processes=2, timeout=1500)
    assert result.returncode == 0, result.stderr
    agreement = [record for record in log_of(output) if "nmi" in record]
    assert len(agreement) == 17  # before the first epoch, after each, and of the final clusters
    assert agreement[-1]["nmi"] > agreement[0]["nmi"]
    assert agreement[-1]["purity"] > agreement[0]["purity"]
    accuracies = [record["knn_accuracy"] for record in log_of(output) if "knn_accuracy" in record]
    assert accuracies[-1] > accuracies[0]  # the random network's


@pytest.mark.slow
def test_photographs(tmp_path):
    """resnet50 at 224 on crops of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    data = tmp_path / "photographs"
    data.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number, pixels in enumerate(load_sample_images().images):
        height, width, _ = pixels.shape
        for crop in range(24):
            top, left = (int(torch.randint(limit - 200, (), generator=generator))
                         for limit in (height, width))
            cut = Image.fromarray(pixels[top : top + 200, left : left + 200])
            cut.save(data / f"{number}-{crop}.jpg", quality=90)
    result = run_script("train.py", "--data", data, "--output", tmp_path / "out",
                        "--arch", "resnet50", "--image-size", "224", "--epochs", "1",
                        "--batch-size", "8", "--num-clusters", "4", "--min-cluster-size", "3",
                        "--workers", "1", "--log-interval", "1", timeout=900)
    assert result.returncode == 0, result.stderr
    steps = [record["step"] for record in log_of(tmp_path / "out") if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]
    state = torch.load(tmp_path / "out" / "backbone.pth", weights_only=True)
    missing, unexpected = torchvision.models.resnet50().load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    assert len((tmp_path / "out" / "clusters.csv").read_text().splitlines()) == 49
