"""Real images end to end: Fashion-MNIST from Debian's package, and photographs as JPEG files."""

from pathlib import Path

import pytest
import torch
import torchvision

from tests.benchmarks.input import write_photographs
from tests.processes import run_script
from tests.runs import log_of

FASHION = Path("/usr/share/datasets/fashion-mnist")  # apt-get install dataset-fashion-mnist


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist(tmp_path):
    """With the settings that follow from the data, clusters and features pass those of pixels.

    The initial clusters are those of the pixels. The labels only measure. The 10,000 test images
    are the training set.
    """
    for kind in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
        (tmp_path / f"train-{kind}").symlink_to(FASHION / f"t10k-{kind}")
    result = run_script("train.py", "--data", tmp_path, "--output", tmp_path / "out", "--epochs",
                        "15", "--num-clusters", "100", processes=2, timeout=1500)
    assert result.returncode == 0, result.stderr
    agreement = [record for record in log_of(tmp_path / "out") if "nmi" in record]
    assert agreement[-1]["nmi"] > agreement[0]["nmi"]
    assert agreement[-1]["purity"] > agreement[0]["purity"]
    accuracies = [record["knn_accuracy"] for record in log_of(tmp_path / "out")
                  if "knn_accuracy" in record]
    assert accuracies[-1] > accuracies[0]  # the random network's


@pytest.mark.slow
def test_photographs(tmp_path):
    """resnet50 at 224 on crops of scikit-learn's two photographs."""
    (tmp_path / "photographs").mkdir()
    write_photographs(tmp_path / "photographs", 48)
    result = run_script("train.py", "--data", tmp_path / "photographs", "--output",
                        tmp_path / "out", "--arch", "resnet50", "--image-size", "224", "--epochs",
                        "1", "--batch-size", "8", "--num-clusters", "4", "--min-cluster-size", "3",
                        "--workers", "1", timeout=900)
    assert result.returncode == 0, result.stderr
    state = torch.load(tmp_path / "out" / "backbone.pth", weights_only=True)
    missing, unexpected = torchvision.models.resnet50().load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    assert len((tmp_path / "out" / "clusters.csv").read_text().splitlines()) == 49
