"""Real images end to end: Fashion-MNIST from Debian's package."""

from pathlib import Path

import pytest

from tests.processes import fork_ranks
from tests.runs import log_of

FASHION = Path("/usr/share/datasets/fashion-mnist")  # apt-get install dataset-fashion-mnist


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist(tmp_path):
    """Clusters and features pass those of the random network, from which they start.

    The labels only measure. The 10,000 test images are the training set.
    """
    for kind in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
        (tmp_path / f"train-{kind}").symlink_to(FASHION / f"t10k-{kind}")
    ranks = fork_ranks("train.py", "--data", tmp_path, "--output", tmp_path / "out", "--epochs",
                       "3", "--num-clusters", "100", "--initial", "network", processes=2)
    assert [rank.wait(1500) for rank in ranks] == [0, 0]
    records = log_of(tmp_path / "out")
    for measure in ("nmi", "purity", "knn_accuracy"):
        values = [record[measure] for record in records if measure in record]
        assert values[-1] > values[0] + 0.03, measure
