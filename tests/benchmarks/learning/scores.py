"""What features and clusters know of classes that the training never saw."""

import torch
import torch.nn.functional as F
from sklearn.cluster import SpectralClustering

from odc.clusters import average_maps
from odc.data.augmentation import evaluation_transform
from odc.data.loader import evaluation_batches
from odc.evaluation import knn, metrics
from odc.features import extract
from odc.kmeans import kmeans


def pixels(images, image_size):
    """Pixels of all images in 0..1: [N, S * S] if all are gray, else [N, 3 * S * S]."""
    batches = evaluation_batches(images, slice(None), evaluation_transform(image_size), 1024)
    rows = torch.cat([batch.images for batch in batches])
    if (rows[:, :1] == rows).all():
        rows = rows[:, :1]
    return rows.flatten(1).float() / 255


def principal_components(train, val, width, seed):
    """Rows whose mean is 0 on train, projected on the first `width` principal components of it."""
    torch.manual_seed(seed)
    _, _, axes = torch.pca_lowrank(train, min(width, *train.shape), center=False)
    return train @ axes, val @ axes


def network_features(backbone, images, image_size, parts, device):
    """`average_maps` of a frozen backbone's last map: [N, d], on the device."""
    backbone = backbone.to(device).eval()
    return extract(lambda batch: average_maps(backbone, batch, parts), images,
                   evaluation_transform(image_size), backbone.out_channels[-1], device, 256)


def knn_accuracy(bank, bank_labels, queries, labels, num_classes):
    """Accuracy of the 20 nearest neighbours, weighted by similarity, in 0..1."""
    predictions = knn.knn_predict(F.normalize(queries), F.normalize(bank), bank_labels, num_classes,
                                  [20])[20]
    return float((predictions[:, 0].cpu() == labels).double().mean())


def probe_accuracy(train, train_labels, val, labels, num_classes, decay=1e-3, iterations=200):
    """Accuracy of a linear classifier of standardised features, in 0..1.

    Logistic regression, L-BFGS on all of train at once:
    mean cross-entropy + decay / 2 * the squared norm of the weights.
    """
    mean, std = train.mean(0), train.std(0)
    x, targets = (train - mean) / (std + 1e-6), train_labels.to(train.device)
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), targets)
        loss = loss + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        predictions = F.linear((val - mean) / (std + 1e-6), weight, bias).argmax(1).cpu()
    return float((predictions == labels).double().mean())


def half_whitened(rows):
    """Rows of mean 0 times the power -1/4 of their covariance, so that each direction keeps the
    square root of its variance: [N, d'] of unit length, without directions that have none."""
    variances, axes = torch.linalg.eigh(torch.cov(rows.T).double())
    has_some = variances > 1e-6 * variances[-1]
    return F.normalize(rows @ (axes[:, has_some] * variances[has_some] ** -0.25).float())


def best_kmeans(rows, num_clusters):
    """Labels int64 [N] of the best of ten k-means, by its own objective."""
    runs = [kmeans(rows, num_clusters, 50, seed) for seed in range(10)]
    return min(runs, key=lambda run: float((rows - run[1][run[0]]).square().sum()))[0].cpu()


def clusters_as_classes(features, num_classes):
    """As many clusters as classes, int64 [N]: {"few": by k-means, "half": by k-means of
    half-whitened features, "spectral": by a graph}."""
    rows = F.normalize(features)
    rows = rows - rows.mean(0)
    half, rows = half_whitened(rows), F.normalize(rows)
    own, centroids = kmeans(rows, min(1000, len(rows) // 4), 50)
    graph = SpectralClustering(num_classes, affinity="nearest_neighbors", random_state=0)
    parts = torch.from_numpy(graph.fit_predict(centroids.cpu().numpy())).long()
    return {"few": best_kmeans(rows, num_classes), "half": best_kmeans(half, num_classes),
            "spectral": parts[own.cpu()]}


def all_scores(train_features, val_features, train, val, clusters, to_cluster):
    """Every column of the table but the time.

    clusters: int64 [N] of the training images. to_cluster: features of both sets for K = classes.
    """
    known = train_features, train.labels, val_features, val.labels, len(train.classes)
    few = clusters_as_classes(torch.cat(to_cluster), len(train.classes))
    classes = torch.cat([train.labels, val.labels])
    return dict(knn=knn_accuracy(*known), probe=probe_accuracy(*known),
                nmi=metrics.nmi(clusters, train.labels),
                purity=metrics.purity(clusters, train.labels),
                hungarian=metrics.hungarian_accuracy(clusters, train.labels)) | {
        f"{way}_{name}": measure(few[way], classes) for way in few for name, measure in (
            ("accuracy", metrics.hungarian_accuracy), ("nmi", metrics.nmi),
            ("ari", metrics.adjusted_rand_index))}
