"""The fast search for the best centroid against all scores in double precision."""

import pytest
import torch
import torch.nn.functional as F

from odc import nearest, products
from odc.nearest import NearestCentroid, nearest_centroids


def plain(features, centroids, inner_product):
    """One row at a time: every score in float64, the lowest index of the best."""
    c = centroids.double()
    if inner_product:
        return torch.stack([(f * c).sum(1).argmax() for f in features.double()])
    return torch.stack([(f - c).square().sum(1).argmin() for f in features.double()])


def unit_features(n, d, seed, latent=8):
    """Features as of a ReLU network, on a curved surface: many centroids are about as near."""
    g = torch.Generator().manual_seed(seed)
    surface = torch.randn(latent, d, generator=torch.Generator().manual_seed(7))
    x = torch.randn(n, latent, generator=g) @ surface
    return F.normalize(x.relu() + 1e-3 * torch.rand(n, d, generator=g))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def product_dtype(request, monkeypatch):
    """Both kinds of product, whatever this machine would choose."""
    monkeypatch.setattr(products, "coarse_dtype", lambda device: request.param)


@pytest.mark.parametrize("inner_product", [False, True])
@pytest.mark.parametrize("n, K, d", [(300, 1, 5), (1, 7, 16), (999, 40, 64), (2000, 333, 256),
                                     (1500, 1001, 33)])
def test_equals_the_plain_search(product_dtype, n, K, d, inner_product):
    features, centroids = unit_features(n, d, 0), unit_features(4 * K, d, 1).view(K, 4, d).mean(1)
    assert torch.equal(nearest_centroids(features, centroids, inner_product),
                       plain(features, centroids, inner_product))


@pytest.mark.parametrize("inner_product", [False, True])
@pytest.mark.parametrize("scale, offset", [(1e-20, 0.0), (1e-4, 0.0), (1e12, 0.0), (1.0, 100.0),
                                           (1e-3, -5.0)])
def test_any_scale_and_offset(product_dtype, scale, offset, inner_product):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(500, 32, generator=g) * scale + offset
    centroids = torch.randn(90, 32, generator=g) * scale + offset
    assert torch.equal(nearest_centroids(features, centroids, inner_product),
                       plain(features, centroids, inner_product))


@pytest.mark.parametrize("inner_product", [False, True])
def test_differences_far_below_bfloat16_decide(product_dtype, inner_product):
    g = torch.Generator().manual_seed(0)
    centroid = F.normalize(torch.rand(64, generator=g), dim=0)
    centroids = torch.cat([centroid + 1e-5 * torch.randn(5, 64, generator=g),
                           torch.randn(100, 64, generator=g) / 16])
    features = F.normalize(centroid + 0.1 * torch.randn(400, 64, generator=g))
    expected = plain(features, centroids, inner_product)
    assert len(expected.unique()) >= 4
    assert torch.equal(nearest_centroids(features, centroids, inner_product), expected)


@pytest.mark.parametrize("inner_product", [False, True])
def test_the_lowest_index_wins_ties(product_dtype, inner_product):
    features = unit_features(400, 24, 0)
    centroids = unit_features(50, 24, 1)
    repeated = torch.cat([centroids, centroids.flip(0), centroids])
    assert torch.equal(nearest_centroids(features, repeated, inner_product),
                       nearest_centroids(features, centroids, inner_product))
    assert nearest_centroids(torch.zeros(3, 24), repeated, True).tolist() == [0, 0, 0]
    alike = torch.ones(77, 24)
    assert not nearest_centroids(features, alike, inner_product).any()


def test_blocks_do_not_matter(product_dtype, monkeypatch):
    features, centroids = unit_features(3000, 64, 0), unit_features(500, 64, 1)
    whole = nearest_centroids(features, centroids)
    search = NearestCentroid(centroids)
    parts = [search(part) for part in features.split([1, 0, 999, 2000])]
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(nearest, "BLOCK", 17)
    assert torch.equal(nearest_centroids(features, centroids), whole)


def test_rows_that_are_not_numbers_get_a_label_in_range(product_dtype):
    features, centroids = unit_features(40, 24, 0), unit_features(31, 24, 1)
    expected = nearest_centroids(features, centroids)
    features[3, 5] = float("nan")
    features[7] = float("inf")
    features[9, 0] = -float("inf")
    labels = nearest_centroids(features, centroids)
    assert labels[3] == 0 and 0 <= labels.min() and labels.max() < 31
    good = [i for i in range(40) if i not in (3, 7, 9)]
    assert torch.equal(labels[good], expected[good])
    centroids[4] = float("nan")
    labels = nearest_centroids(features, centroids)
    assert 0 <= labels.min() and labels.max() < 31


def test_half_precision_features(product_dtype):
    features, centroids = unit_features(200, 24, 0).half(), unit_features(31, 24, 1)
    assert torch.equal(nearest_centroids(features, centroids), plain(features, centroids, False))
    assert nearest_centroids(features[:0], centroids).shape == (0,)
