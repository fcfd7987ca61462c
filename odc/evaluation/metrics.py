"""How well clusters agree with classes that the training never saw."""

import torch


def _contingency(clusters, classes):
    """Counts [K, classes] of the images in cluster k of class c, as float64."""
    num_classes = int(classes.max()) + 1
    counts = (clusters * num_classes + classes).bincount(minlength=(int(clusters.max()) + 1) * num_classes)
    return counts.view(-1, num_classes).double()


def nmi(clusters, classes):
    """Normalised mutual information of two labelings [N] int64, in 0..1 (arithmetic mean of the entropies)."""
    joint = _contingency(clusters, classes) / len(clusters)
    p_cluster, p_class = joint.sum(dim=1), joint.sum(dim=0)
    information = torch.special.xlogy(joint, joint).sum()
    information -= torch.special.xlogy(p_cluster, p_cluster).sum() + torch.special.xlogy(p_class, p_class).sum()
    entropies = torch.special.entr(p_cluster).sum() + torch.special.entr(p_class).sum()
    # One cluster and one class tell each other everything there is to tell, which is nothing.
    return float(2 * information / entropies) if entropies > 0 else 1.0


def purity(clusters, classes):
    """Share of the images [N] that belong to the most frequent class of their cluster, in 0..1."""
    return float(_contingency(clusters, classes).amax(dim=1).sum()) / len(clusters)
