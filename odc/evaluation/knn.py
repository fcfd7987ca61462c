"""Nearest-neighbour classification (Wu et al., CVPR 2018), the bank split over the processes."""

import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.augmentation import evaluation_transform
from odc.data.datasets import open_dataset
from odc.errors import UserError
from odc.features import extract
from odc.runtime import launch

TEMPERATURE = 0.07  # a neighbour of similarity s votes with weight exp(s / TEMPERATURE)
QUERIES, ROWS = 512, 4096  # of a tile; a larger one does not fit a CPU's caches


def open_held_out(data, train):
    """The bank and the queries: train and its val split, or every 10th image of train held out.

    Raises UserError if the processes see different files. A collective.
    """
    try:
        val, reason = open_dataset(data, "val"), "its val split does not have the same labels"
    except UserError as error:
        val, reason = None, str(error).rstrip(".")
    if not distributed.same_everywhere(val and val.fingerprint):
        raise UserError(f"{data}: the processes see different val splits; make them equal.")
    if val is not None and val.labels is not None and val.classes == train.classes:
        return train, val
    distributed.print_main(
        f"Nearest-neighbour accuracy: every 10th training image is held out ({reason}).")
    images = range(len(train))
    return train.take([i for i in images if i % 10]), train.take(images[::10])


def knn_accuracy(backbone, bank, queries, image_size, workers=0):
    """Accuracy in 0..1 of the queries' classes, as their 20 nearest images in the bank vote.

    bank, queries: of `open_held_out`; the bank's images have been read before. Else as `classify`.
    """
    k, device = min(20, len(bank)), next(backbone.parameters()).device
    predictions = classify(backbone, bank, queries, image_size, device, [k], workers=workers,
                           unreadable_share=0)[k]
    return float((predictions[:, 0].cpu() == queries.labels).double().mean())


def classify(backbone, bank, queries, image_size, device, ks, batch_size=64, workers=0,
             unreadable_share=0.01):
    """`knn_predict` by the unit average of a backbone's last map, in eval mode. A collective.

    bank, queries: ImageSets. UserError if more than unreadable_share of the bank is unreadable.
    """
    features, questions = (
        extract(lambda x: F.normalize(backbone(x)[-1].mean((2, 3))), images,
                evaluation_transform(image_size), backbone.out_channels[-1], device, batch_size,
                workers, name, share)
        for images, name, share in ((bank, "bank", unreadable_share), (queries, "queries", 0.01)))
    return knn_predict(distributed.all_gather_uneven_rows(questions), features,
                       bank.labels[distributed.shard(len(bank))], len(bank.classes), ks)


def knn_predict(queries, bank, labels, num_classes, ks=(10, 20, 100, 200)):
    """Classify every query by its k most similar bank rows, weighted exp(similarity / TEMPERATURE).

    queries: [Q, d] float32, unit rows, the same on every process. bank: [n, d] and labels: [n]
    int64, this process's part. Returns {k: [Q, up to 5] int64}, the classes with the most votes,
    the lower one first of equal ones, and -1 for classes without a vote. Raises UserError if a
    feature is not finite, Interrupted on a signal. A collective.
    """
    similarities, found = nearest_neighbours(queries, bank, labels, max(ks))
    predictions = {k: [] for k in ks}
    for s, y in zip(similarities.split(QUERIES), found.split(QUERIES)):
        for k in ks:
            weights = torch.exp(s[:, :k].double() / TEMPERATURE)
            votes = weights.new_zeros(len(s), num_classes).scatter_add_(1, y[:, :k], weights)
            classes = votes.float().sort(dim=1, descending=True, stable=True).indices[:, :5]
            predictions[k].append(classes.where(votes.gather(1, classes) > 0, -1))
    return {k: torch.cat(blocks) for k, blocks in predictions.items()}


def nearest_neighbours(queries, bank, labels, k):
    """The k most similar bank rows of every query: similarities float32 and labels, both [Q, k].

    The lowest bank index is first of equal ones; -inf and 0 beyond its end. Else as `knn_predict`.
    """
    if distributed.any_process(not (queries.sum() + bank.sum()).isfinite()):
        raise UserError("The features hold values that are not finite: check the weights.")
    # topk promises no order of equal numbers. So it orders similarities less 2^-52 times the index.
    sizes = distributed.all_gather_rows(torch.tensor([len(bank)]))
    indices = sizes[: distributed.rank()].sum() + torch.arange(len(bank))
    shift, labels = (indices.double() * 2.0**-52).to(bank.device), labels.to(bank.device)
    blocks = []
    for some in queries.split(QUERIES):
        launch.check_signals()
        best = some.new_full((len(some), k), -torch.inf, dtype=torch.float64)
        found = torch.zeros_like(best, dtype=torch.int64)
        for rows, own, less in zip(bank.split(ROWS), labels.split(ROWS), shift.split(ROWS)):
            keys, index = (some @ rows.T - less).topk(min(k, len(rows)))
            best, order = torch.cat([best, keys], dim=1).topk(k)
            found = torch.cat([found, own[index]], dim=1).gather(1, order)
        best, found = (distributed.all_gather_rows(x.T).T for x in (best, found))  # [q, W * k]
        best, order = best.topk(k)
        blocks.append((best.float(), found.gather(1, order)))
    return tuple(map(torch.cat, zip(*blocks)))
