"""The clusters that a user gets."""

import pytest
import torch

from odc import clusters
from odc.memory import ODCMemory
from tests.processes import run_processes


def clusters_of_shards(features, labels):
    memory = ODCMemory(len(features), features.shape[1], 6)
    memory.initialize(features, labels)
    return clusters.memory_clusters(memory)


def test_similarities_and_features_are_gathered_from_all_processes():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 6
    alone = clusters_of_shards(features, labels)
    first, second = run_processes(clusters_of_shards, 2, features, labels)
    assert torch.equal(first.similarity, alone.similarity) and second is None
    unit = torch.nn.functional.normalize(features)
    expected = [float(torch.cosine_similarity(unit[i], unit[labels == labels[i]].mean(0), dim=0))
                for i in range(50)]
    assert alone.similarity.tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(alone.features, first.features)
    assert torch.allclose(alone.features, unit, atol=1e-6)
