"""The VOC2007 protocols, full and low-shot SVM; N train images, M test images, S costs."""

import io
import itertools
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from odc import distributed
from odc.errors import UserError
from odc.evaluation import svm
from odc.runtime.log import progress_bar

COSTS = (1.0, 10.0, 100.0, *(0.5**power for power in range(4, 20)))
FOLDS = 3
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)  # positives of a class
SAMPLES = 5  # independent draws for each number of shots
NEGATIVES = 19  # negatives for each positive
BLOCK = 2**22  # numbers in the matrices of low-shot problems that are solved together, about


def stratified_folds(positive):
    """The test folds [N] int64 of positive [N] bool, as StratifiedKFold(3) of scikit-learn."""
    positive = positive.cpu()
    labels = (positive != positive[0]).long()  # numbered in the order of first appearance
    # The rows sorted by label are dealt out in turn, which says how many of each a fold gets.
    dealt, fold = labels.sort().values, torch.empty_like(labels)
    for label in (0, 1):
        shares = torch.tensor([int((dealt[f::FOLDS] == label).sum()) for f in range(FOLDS)])
        fold[labels == label] = torch.arange(FOLDS).repeat_interleave(shares)
    return fold


def step_average_precision(positive, scores):
    """Average precision without interpolation, as scikit-learn computes it; ties are one threshold.

    positive: [n] bool; scores: [n, c]. Returns [c] float64; without positives 0.
    """
    scores, order = scores.T.contiguous().sort(dim=1, descending=True)
    hit = positive[order].double()
    ranks = torch.searchsorted(-scores, -scores, right=True)  # rows with at least this score
    precision = hit.cumsum(1).gather(1, ranks - 1) / ranks
    return (hit * precision).sum(1) / hit.sum(1).clamp(min=1)


def voc_average_precision(targets, scores):
    """VOC's average precision: the area under the interpolated precision-recall curve, [c] float64.

    targets: [n], 1, -1, 0 (difficult, left out); scores: [n, c]. Negatives lead equal scores.
    """
    kept = targets != 0
    scores, positive = scores[kept], targets[kept] > 0
    absent_first = positive.sort(stable=True).indices
    order = scores[absent_first].sort(dim=0, descending=True, stable=True).indices
    hit = positive[absent_first][order].double()
    ranks = torch.arange(1, len(hit) + 1, device=hit.device)[:, None]
    precision = hit.cumsum(0) / ranks
    envelope = precision.flip(0).cummax(0).values.flip(0)  # the best precision from there on
    return (hit * envelope).sum(0) / hit.sum(0).clamp(min=1)


def read_low_shot_targets(path, num_images, num_classes):
    """Read the published files train_targets_sample{1..5}_k{k}.npy of a directory or a zip file.

    Returns {k: [int8 [N, classes] of each sample]}: 1, -1, or 0 for ignored. Raises UserError.
    """
    targets = {k: [] for k in SHOTS}
    for k, sample in itertools.product(SHOTS, range(1, SAMPLES + 1)):
        name = f"train_targets_sample{sample}_k{k}.npy"
        published = _read_array(path, name)
        # The published script draws k negatives for each of the other classes.
        counts = {1: k, 0: (num_classes - 1) * k, -1: num_images - num_classes * k}
        if published.shape != (num_images, num_classes) or any(
                ((published == value).sum(0) != count).any() for value, count in counts.items()):
            raise UserError(f"{path}: {name} must be {(num_images, num_classes)} with {k} ones, "
                            f"{counts[0]} zeros and else -1 for each class; give the published "
                            "files of this dataset.")
        targets[k].append(torch.from_numpy((published == 1).astype(np.int8) - (published == 0)))
    return targets


def _read_array(path, name):
    """One .npy file of a directory or a zip file; never unpickles."""
    try:
        if os.path.isfile(path):
            with zipfile.ZipFile(path) as archive:
                entry = next((e for e in archive.namelist() if e.split("/")[-1] == name), name)
                content = archive.read(entry)
        elif (file := Path(path, name)).is_file():
            content = file.read_bytes()
        else:
            raise FileNotFoundError("there is no such file")
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False).astype(np.float64)
    except Exception as error:  # whatever a foreign file makes them raise
        raise UserError(f"{path}: {name} cannot be read ({error}); give the folder or the zip file "
                        "of the published low-shot targets.") from None


def draw_low_shot_targets(targets, seed):
    """Draw k positives and 19 k negatives of every class, without replacement.

    targets: [N, classes]. Returns what `read_low_shot_targets` does, for each k that is possible.
    """
    positives, negatives = (int((targets == label).sum(0).min()) for label in (1, -1))
    drawn = {k: [] for k in SHOTS if k <= positives and NEGATIVES * k <= negatives}
    for k, sample in itertools.product(drawn, range(SAMPLES)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + k * 101 + sample)
        drawn[k].append(torch.zeros(targets.shape, dtype=torch.int8))
        for c, (label, count) in itertools.product(range(targets.shape[1]),
                                                   ((1, k), (-1, NEGATIVES * k))):
            rows = (targets[:, c] == label).nonzero()[:, 0].cpu()
            picked = torch.randperm(len(rows), generator=generator)[:count]
            drawn[k][-1][rows[picked], c] = label
    return drawn


def full_svm(train, train_targets, test, test_targets):
    """Full SVM of one feature map: each class's cost by cross-validation, then refit and test.

    train: [N, D], test: [M, D], unit rows. Targets: [N, classes] and [M, classes], 1, -1, or 0,
    which is negative in training and left out of the test. Every class needs FOLDS positives and
    negatives. Returns the average precision of each class, [classes] float64, and its cost, a list.
    Takes about 12 N^2 bytes. Raises UserError if a feature is not finite. A collective.
    """
    if not (train.isfinite().all() and test.isfinite().all()):
        raise UserError("The features have values that are not finite; check the weights.")
    labels = torch.where(train_targets == 1, 1, -1).to(torch.int8).to(train.device)
    own = list(range(labels.shape[1]))[distributed.shard(labels.shape[1])]
    results = torch.zeros(len(own), 2, dtype=torch.float64)  # average precision, index of the cost
    with distributed.raise_everywhere():
        if own:
            folds = torch.stack([stratified_folds(labels[:, c] == 1) for c in own]).to(train.device)
            labels = labels[:, own].T
            # Problems of each class: without fold 0, without fold 1, without fold 2, with all rows.
            problems = torch.cat([torch.where(folds == f, 0, labels) for f in range(FOLDS + 1)])
            gram = svm.gram_matrix(train)
            with progress_bar(len(problems) * len(COSTS), "SVM fits", "fit") as bar:
                fits = svm.fit(gram[None], svm.strongest_eigenvectors(gram)[None], problems[None],
                               COSTS, bar.update)
            # [S, folds and all, classes, ...]
            coefficients, decisions, converged = (
                x[:, 0].unflatten(1, (FOLDS + 1, len(own)))
                for x in (fits.coefficients, fits.decisions, fits.converged.cpu()))
            train, test = train.double(), test.double()
        for i, c in enumerate(own):
            precision = sum(step_average_precision(
                labels[i, folds[i] == f] == 1, decisions[:, f, i, folds[i] == f].T).cpu()
                for f in range(FOLDS)) / FOLDS  # [S]
            s = _best_cost(precision.where(converged[:, :, i].all(1), torch.nan))
            b = coefficients[s, FOLDS, i]
            scores = (test @ (b @ train) + b.sum())[:, None]
            ap = voc_average_precision(test_targets[:, c].to(b.device), scores)
            results[i] = torch.tensor([float(ap), s])
    precision, chosen = distributed.all_gather_uneven_rows(results).T
    return precision, [COSTS[int(s)] for s in chosen]


def low_shot(train, samples_by_shot, test, test_targets):
    """Low-shot SVM of one feature map: {k: (mean average precision, cost)}. A collective.

    Arguments as `full_svm`, but samples_by_shot is what `draw_low_shot_targets` returns. The
    precision, [SAMPLES] float64, is of the cost that is best on the test images, as published.
    """
    gram = svm.gram_matrix(train)
    basis = svm.strongest_eigenvectors(gram)
    products = svm.gram_matrix(train, test)  # [N, M]
    test_targets = test_targets.to(gram.device)
    num_classes = test_targets.shape[1]
    own = distributed.shard(SAMPLES * num_classes)
    total = len(samples_by_shot) * (own.stop - own.start) * len(COSTS)
    results = {}
    with progress_bar(total, "low-shot fits", "fit") as bar:
        for k, samples in samples_by_shot.items():
            problems = torch.stack(samples).transpose(1, 2).flatten(0, 1)[own].to(gram.device)
            used = int((samples[0][:, 0] != 0).sum())  # rows of each problem
            precision = torch.zeros(len(problems), len(COSTS), dtype=torch.float64)
            size = max(1, BLOCK // (used * (used + svm.RANK**2)))
            for start in range(0, len(problems), size):
                part = problems[start : start + size]
                rows = part.nonzero()[:, 1].view(len(part), used)
                fits = svm.fit(gram[rows[:, :, None], rows[:, None]], basis[rows][..., :used],
                               part.gather(1, rows)[:, None], COSTS, bar.update)
                for i in range(len(part)):
                    scores = fits.coefficients[:, i, 0] @ products[rows[i]]  # [S, M]
                    targets = test_targets[:, (own.start + start + i) % num_classes]
                    precision[start + i] = voc_average_precision(targets, scores.T)
                precision[start : start + size][~fits.converged[:, :, 0].T.cpu()] = torch.nan
            precision = distributed.all_gather_uneven_rows(precision)
            by_cost = precision.view(-1, num_classes, len(COSTS)).mean(1).T  # [S, samples]
            best = _best_cost(by_cost.mean(1))
            results[k] = by_cost[best], COSTS[best]
    return results


def _best_cost(scores):
    """Index of the first largest of scores [S]; NaN, of a fit that did not converge, never wins."""
    if scores.isnan().all():
        raise UserError("No support vector machine converged at any cost for one of the classes; "
                        "check that the feature rows are normalised.")
    return int(scores.nan_to_num(-1.0).argmax())
