"""Watching a run: nearest-neighbour accuracy of the backbone on labelled images that are not in the bank."""

import torch
import torch.nn.functional as F

from odc import distributed
from odc.data.augmentation import evaluation_transform
from odc.data.layouts import open_dataset
from odc.distributed import print_main
from odc.errors import UserError
from odc.features import extract
from odc.evaluation.knn import knn_predict

K, TEMPERATURE = 20, 0.07  # of the published protocol, see eval_knn.py
EVERY = 10  # without a val split, every 10th training image is held out of the bank


def open_held_out(data, train):
    """The val split of the data whose train split is given, or None: then training images must do. A collective."""
    val, reason = None, None
    with distributed.together():
        try:
            val = open_dataset(data, "val")
        except UserError as error:
            reason = str(error)
    if not distributed.same_everywhere(val and (len(val), val.fingerprint)):
        raise UserError(f"{data}: the processes see different val splits there; give all machines the same files.")
    if val is not None and (val.labels is None or val.classes != train.classes):
        val, reason = None, f"the val split of {data} does not have the same labels."
    if val is None:
        print_main(f"Nearest-neighbour accuracy: every {EVERY}th training image is held out ({reason.rstrip('.')}).")
    return val


def knn_accuracy(backbone, train, val, image_size, device, batch_size=64, workers=0):
    """Share of the images of `val` whose class their K nearest training images tell, in 0..1.

    train: an ImageSet with labels. val: one with the same classes, or None; then every 10th image of `train` takes its
    place and is no one's neighbour. The backbone must be in eval mode. A collective.
    """

    def pooled(images):
        """[B, 3, S, S] -> the global average of the last map, L2-normalised: [B, d]."""
        return F.normalize(backbone(images)[-1].float().mean((2, 3)))

    def features(take, dataset, name):
        rows = extract(pooled, dataset, evaluation_transform(image_size), backbone.out_channels[-1], device, batch_size,
                    workers, name=name).to(device)
        return distributed.all_gather_uneven_rows(rows) if take else rows

    bank = features(0, train, "bank")  # [n_local, d]
    rows = torch.arange(len(train))[distributed.shard(len(train))]
    if val is not None:
        queries, answers = features(1, val, "held-out images"), val.labels
    else:
        held_out = rows % EVERY == 0
        queries, answers = distributed.all_gather_uneven_rows(bank[held_out.to(device)]), train.labels[::EVERY]
        bank, rows = bank[~held_out.to(device)], rows[~held_out]
    k = min(K, int(distributed.all_reduce(torch.tensor(len(bank)))))
    predictions = knn_predict(queries, bank, train.labels[rows], len(train.classes), [k], TEMPERATURE)[k]
    return float((predictions[:, 0].cpu() == answers).double().mean())
