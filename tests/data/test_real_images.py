"""Real images end to end: Fashion-MNIST from Debian's package."""

from pathlib import Path

import pytest

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
    records = log_of(tmp_path / "out")
    for measure in ("nmi", "purity", "knn_accuracy"):  # the first kNN is of the random network
        values = [record[measure] for record in records if measure in record]
        assert values[-1] > values[0], measure
