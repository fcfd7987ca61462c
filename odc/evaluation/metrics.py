"""How well clusters agree with classes that the training never saw, and with the features."""

import numpy as np
import torch


def agreement(clusters, classes):
    """All measures of agreement of two labelings [N] int64, and a line that says them."""
    values = dict(nmi=nmi(clusters, classes), purity=purity(clusters, classes),
                  ari=adjusted_rand_index(clusters, classes),
                  hungarian_accuracy=hungarian_accuracy(clusters, classes))
    return values, ("clusters against labels: NMI {:.3f}, purity {:.1%}, ARI {:.3f}, Hungarian "
                    "accuracy {:.1%}").format(*values.values())


def _pairs(clusters, classes):
    """The at most N pairs that exist: clusters [n], classes [n], numbers of images [n] float64."""
    num_classes = int(classes.max()) + 1
    keys, counts = (clusters * num_classes + classes).unique(return_counts=True)
    return keys // num_classes, keys % num_classes, counts.double()


def nmi(clusters, classes):
    """Mutual information of two labelings [N] int64 over the mean of their entropies, in 0..1."""
    joint, p_cluster, p_class = (counts.double() / len(clusters) for counts in (
        _pairs(clusters, classes)[2], clusters.bincount(), classes.bincount()))
    entropies = torch.special.entr(p_cluster).sum() + torch.special.entr(p_class).sum()
    information = entropies - torch.special.entr(joint).sum()
    return float(2 * information / entropies) if entropies > 0 else 1.0


def adjusted_rand_index(clusters, classes):
    """Agreement over all pairs of images, 0 for chance and 1 for equal labelings (Hubert 1985)."""
    N = torch.tensor([len(clusters)])
    both, same_cluster, same_class, pairs = (float((n.double() * (n - 1) / 2).sum()) for n in (
        _pairs(clusters, classes)[2], clusters.bincount(), classes.bincount(), N))
    chance = same_cluster * same_class / max(pairs, 1)
    highest = (same_cluster + same_class) / 2
    return (both - chance) / (highest - chance) if highest != chance else 1.0


def purity(clusters, classes):
    """Share of the images that are of the most frequent class of their cluster, in 0..1."""
    cluster, _, counts = _pairs(clusters, classes)
    largest = counts.new_zeros(int(cluster.max()) + 1).scatter_reduce(0, cluster, counts, "amax")
    return float(largest.sum()) / len(clusters)


def hungarian_accuracy(clusters, classes):
    """Share of the images that the best one-to-one assignment of clusters to classes gets right."""
    cluster, label, images = (part.numpy() for part in _pairs(clusters, classes))
    counts = np.zeros((cluster.max() + 1, label.max() + 1))
    counts[cluster, label] = images
    return _best_assignment(counts if len(counts) <= counts.shape[1] else counts.T) / len(clusters)


def _best_assignment(gains):
    """The largest sum of gains [rows, columns] with one column for every row; rows <= columns.

    Hungarian method (Jonker and Volgenant 1987): a new row takes a column, its owner another, and
    so on up to a free one, by the cheapest path. Prices keep reduced costs at 0 or above.
    """
    costs = gains.max() - gains
    num_rows, num_columns = costs.shape
    row_price, column_price = np.zeros(num_rows), np.zeros(num_columns)
    owner, column_of = np.full(num_columns, -1), np.full(num_rows, -1)
    for new in range(num_rows):
        distance, before = np.full(num_columns, np.inf), np.full(num_columns, -1)
        open_columns, row, shortest = np.ones(num_columns, bool), new, 0.0
        while row >= 0:  # Dijkstra's search for the nearest free column
            through = shortest + costs[row] - row_price[row] - column_price
            nearer = (through < distance) & open_columns
            distance[nearer], before[nearer] = through[nearer], row
            column = int(np.where(open_columns, distance, np.inf).argmin())
            shortest, row = distance[column], owner[column]
            open_columns[column] = False
        passed = np.flatnonzero(~open_columns & (owner >= 0))
        row_price[new] += shortest
        row_price[owner[passed]] += shortest - distance[passed]
        column_price[passed] -= shortest - distance[passed]
        row = -1
        while row != new:  # every row on the path takes the next column
            row = owner[column] = before[column]
            column_of[row], column = column, column_of[row]
    return float(gains[np.arange(num_rows), column_of].sum())
