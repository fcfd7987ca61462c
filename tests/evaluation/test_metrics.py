"""Clustering metrics against scikit-learn and SciPy."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from odc.evaluation import metrics


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
@example(50, 1, 5, 0)
@example(50, 1, 1, 0)
def test_against_scikit_learn(size, num_clusters, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.randint(num_clusters, (size,), generator=generator)
    classes = torch.randint(num_classes, (size,), generator=generator)
    expected = normalized_mutual_info_score(classes, clusters)
    assert metrics.nmi(clusters, classes) == pytest.approx(expected, abs=1e-9)
    expected = adjusted_rand_score(classes, clusters)
    assert metrics.adjusted_rand_index(clusters, classes) == pytest.approx(expected, abs=1e-9)
    counts = contingency_matrix(clusters, classes)
    assert metrics.purity(clusters, classes) == pytest.approx(counts.max(1).sum() / size)
    best = counts[linear_sum_assignment(counts, maximize=True)].sum() / size
    assert metrics.hungarian_accuracy(clusters, classes) == pytest.approx(best)


def test_many_clusters_and_classes():
    """Labels by chance are hard: most assignments are about equally good."""
    generator = torch.Generator().manual_seed(0)
    clusters, classes = torch.randint(300, (2, 5_000), generator=generator)
    counts = contingency_matrix(clusters, classes)
    best = counts[linear_sum_assignment(counts, maximize=True)].sum()
    assert metrics.hungarian_accuracy(clusters, classes) == pytest.approx(best / 5_000)


def test_a_million_clusters_need_no_table_of_all_pairs():
    """Such a table would have 10^12 cells."""
    clusters = torch.randint(10**6, (2000,), generator=torch.Generator().manual_seed(0))
    classes = clusters.flip(0)
    for ours, theirs in ((metrics.nmi, normalized_mutual_info_score),
                         (metrics.adjusted_rand_index, adjusted_rand_score)):
        assert ours(clusters, classes) == pytest.approx(theirs(classes, clusters), abs=1e-12)
