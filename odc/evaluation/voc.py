"""The VOC2007 linear and low-shot SVM protocols of the published benchmark: folds, average precision, targets, costs.

Letters: N train images, M test images, K classes, S costs.
"""

import io
import os
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from odc import distributed
from odc.evaluation import svm
from odc.errors import UserError

COSTS = (1.0, 10.0, 100.0) + tuple(0.5**power for power in range(4, 20))
FOLDS = 3
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)  # positives a class
SAMPLES = 5  # independent draws of each
NEGATIVES = 19  # negatives a positive


# --- folds and average precision -------------------------------------------------------------------------------------


def stratified_folds(positive, folds=FOLDS):
    """The test fold of each row, [N] int64, as scikit-learn's StratifiedKFold without shuffling makes them.

    positive: [N] bool. Rows of each label go to the folds in order, in numbers that differ by one at most: the rows
    sorted by label are dealt out in turn, which says how many of each label a fold gets.
    """
    positive = positive.bool().cpu()
    # scikit-learn numbers the labels in order of first appearance before it sorts them.
    labels = (positive != positive[0]).long()
    dealt = labels.sort().values
    fold = torch.empty_like(labels)
    for label in (0, 1):
        share = torch.tensor([int((dealt[f::folds] == label).sum()) for f in range(folds)])
        fold[labels == label] = torch.arange(folds).repeat_interleave(share)
    return fold


def step_average_precision(positive, scores):
    """Average precision without interpolation, as scikit-learn computes it; tied scores are one threshold.

    positive: [n] or [n, c] bool; scores the same shape, or [n, c] with one `positive` for all columns. Returns [] or
    [c] float64; a column without positives gives 0.
    """
    if scores.dim() == 1:
        return step_average_precision(positive[:, None], scores[:, None])[0]
    scores, order = scores.sort(dim=0, descending=True, stable=True)
    hits = positive.expand_as(scores) if positive.dim() == 2 else positive[:, None].expand_as(scores)
    hits = hits.gather(0, order).double().cumsum(0)
    ranks = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)[:, None]
    last = torch.ones_like(scores, dtype=torch.bool)  # the last row of each run of tied scores is a threshold
    last[:-1] = scores[:-1] != scores[1:]
    # Hits at the threshold before: those at the last threshold row above.
    reached = torch.where(last, hits, torch.zeros_like(hits)).cummax(0).values
    before = torch.cat([torch.zeros_like(reached[:1]), reached[:-1]])
    gain = torch.where(last, hits - before, torch.zeros_like(hits))
    return (gain * hits / ranks).sum(0) / hits[-1].clamp(min=1)


def voc_average_precision(targets, scores):
    """VOC's average precision: the area under the interpolated precision-recall curve, at all points.

    targets: [n], 1 / -1 / 0 for present / absent / difficult (left out); scores: [n] or [n, c]. Tied scores are ranked
    with the absent images first, the lower bound, so that the order of the images never matters. Returns [] or [c]
    float64; without positives 0.
    """
    if scores.dim() == 1:
        return voc_average_precision(targets, scores[:, None])[0]
    kept = targets != 0
    scores, positive = scores[kept], targets[kept] > 0
    absent_first = positive.sort(stable=True).indices
    order = scores[absent_first].sort(dim=0, descending=True, stable=True).indices
    hit = positive[absent_first][order].double()
    hits = hit.cumsum(0)
    precision = hits / torch.arange(1, len(hit) + 1, dtype=torch.float64, device=hit.device)[:, None]
    envelope = precision.flip(0).cummax(0).values.flip(0)  # non-increasing from the right
    return (hit * envelope).sum(0) / hit.sum(0).clamp(min=1)


# --- low-shot targets ------------------------------------------------------------------------------------------------


def read_low_shot_targets(path, num_images, num_classes=20, shots=SHOTS, samples=SAMPLES):
    """Read published target files `train_targets_sample{1..5}_k{k}.npy` from a directory or a zip file.

    Returns {k: [targets [N, K] int8 of each sample]}, 1 / -1 / 0 for positive / negative / ignored (the files have
    1 / 0 / -1). Raises UserError naming the file that is missing or does not fit.
    """
    targets = {k: [] for k in shots}
    for k in shots:
        for sample in range(1, samples + 1):
            name = f"train_targets_sample{sample}_k{k}.npy"
            published = _read_array(path, name)
            if published.shape != (num_images, num_classes):
                raise UserError(f"{path}: {name} is an array of shape {published.shape}, but there are {num_images} "
                                f"images and {num_classes} classes; give the target files of this dataset.")
            if published.dtype.kind not in "iu" or not np.isin(published, (-1, 0, 1)).all():
                raise UserError(f"{path}: {name} has values other than 1, 0 and -1 (positive, negative, ignored).")
            published = torch.from_numpy(published.astype(np.int8))
            targets[k].append((published == 1).to(torch.int8) - (published == 0).to(torch.int8))
    return targets


def _read_array(path, name):
    """One .npy file of a directory or a zip file; never unpickles."""
    try:
        if os.path.isdir(path):
            with open(os.path.join(path, name), "rb") as file:
                data = file.read()
        else:
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.namelist() if entry.split("/")[-1] == name]
                if not entries:
                    raise FileNotFoundError
                data = archive.read(entries[0])
        return np.load(io.BytesIO(data), allow_pickle=False)
    except FileNotFoundError:
        if not os.path.exists(path):
            raise UserError(f"{path}: there is no such directory or zip file of low-shot targets.") from None
        raise UserError(f"{path}: {name} is missing among the low-shot targets.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {name} cannot be read as an array ({error}).") from None


def draw_low_shot_targets(targets, seed, shots=SHOTS, samples=SAMPLES, negatives=NEGATIVES):
    """Draw low-shot targets: for every class k positives and 19 k negatives, without replacement.

    targets: [N, K], 1 / -1 / 0 (difficult images are never drawn). Returns what `read_low_shot_targets` returns; the
    draw depends on seed, k and sample only. Raises UserError if a class has too few images for a k.
    """
    drawn = {k: [] for k in shots}
    for k in shots:
        for sample in range(samples):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + k * 101 + sample)
            chosen = torch.zeros(targets.shape, dtype=torch.int8)
            for c in range(targets.shape[1]):
                for label, count in ((1, k), (-1, negatives * k)):
                    rows = (targets[:, c] == label).nonzero()[:, 0].cpu()
                    if len(rows) < count:
                        raise UserError(f"Class {c} has {len(rows)} images of target {label}, but k = {k} needs "
                                        f"{count}; leave this k out.")
                    chosen[rows[torch.randperm(len(rows), generator=generator)[:count]], c] = label
            drawn[k].append(chosen)
    return drawn


# --- the two protocols -----------------------------------------------------------------------------------------------


@dataclass
class FullResult:
    """Full SVM of one feature map."""

    average_precision: torch.Tensor  # [K] float64, test AP of every class
    costs: list  # [K], the chosen cost of every class
    validation: torch.Tensor  # [S, K] float64, mean step-wise AP over the folds; NaN where a fit did not converge
    unconverged: int  # fits that did not converge and were not used

    @property
    def mean_average_precision(self):
        return float(self.average_precision.mean())


@dataclass
class LowShotResult:
    """Low-shot SVM of one feature map, for one k."""

    k: int
    mean_average_precision: float  # test mAP of the best cost, averaged over the samples
    cost: float  # the best cost, first on ties in the order of the list
    by_cost: torch.Tensor  # [S, samples] float64, test mAP; NaN where a fit did not converge
    unconverged: int


def full_svm(train_features, train_targets, test_features, test_targets, costs=COSTS, progress=True):
    """Full SVM of one feature map: choose each class's cost by cross-validation, refit, test.

    train_features [N, D], test_features [M, D]: rows already normalised. train_targets [N, K], test_targets [M, K]:
    1 / -1 / 0; difficult images are negatives in training and left out of the test. Needs about 12 N^2 bytes. The
    classes are split over the processes; each passes the same and gets the same result. Raises UserError for a class
    with fewer positives or negatives than folds, and for features that are not finite.
    """
    _check_finite(train_features, test_features)
    labels = torch.where(train_targets == 1, 1, -1).to(torch.int8).to(train_features.device)
    K = labels.shape[1]
    for c in range(K):
        if min(int((labels[:, c] == 1).sum()), int((labels[:, c] == -1).sum())) < FOLDS:
            raise UserError(f"Class {c} has fewer than {FOLDS} positive or negative training images; the "
                            f"{FOLDS}-fold cross-validation needs that many.")
    own = list(range(K))[distributed.shard(K)]
    validation = torch.zeros(len(own), len(costs), dtype=torch.float64)
    results = torch.zeros(len(own), 3, dtype=torch.float64)  # AP, index of the chosen cost, fits not converged
    if own:
        folds = torch.stack([stratified_folds(labels[:, c] == 1) for c in own]).to(labels.device)
        labels = labels[:, own].T
        # Problems: without fold 0 of every class, without fold 1, without fold 2, then all rows for the refit.
        problems = torch.cat([torch.where(folds == fold, 0, labels) for fold in range(FOLDS + 1)])
        with _bar("SVM fits", len(problems) * len(costs), progress) as bar:
            fits = svm.fit(svm.gram(train_features), problems, costs, progress=bar.update)
        converged = fits.converged.view(len(costs), FOLDS + 1, len(own)).cpu()
        results[:, 2] = (~converged).sum((0, 1))
        chosen = []
        for i in range(len(own)):
            for fold in range(FOLDS):
                held_out = folds[i] == fold
                scores = fits.decisions[:, fold * len(own) + i, held_out].T
                validation[i] += step_average_precision(labels[i, held_out] == 1, scores).cpu() / FOLDS
            validation[i].masked_fill_(~converged[:, :, i].all(1), torch.nan)
            chosen.append(_first_best(validation[i]))
        refits = torch.stack([fits.coefficients[s, FOLDS * len(own) + i] for i, s in enumerate(chosen)], dim=1)
        scores = _decision_values(test_features, train_features, refits)
        for i, c in enumerate(own):
            results[i, 0] = voc_average_precision(test_targets[:, c].to(scores.device), scores[:, i])
        results[:, 1] = torch.tensor(chosen)
    validation, results = distributed.all_gather_uneven_rows(validation), distributed.all_gather_uneven_rows(results)
    _refuse_unsolved(validation)
    return FullResult(results[:, 0], [costs[int(s)] for s in results[:, 1]], validation.T, int(results[:, 2].sum()))


def low_shot(train_features, samples_by_shot, test_features, test_targets, costs=COSTS, progress=True):
    """Low-shot SVM of one feature map: fit every class, cost and sample, test all of them.

    Features and test_targets as for `full_svm`; samples_by_shot: {k: [targets [N, K] of each sample]}, from
    `read_low_shot_targets` or `draw_low_shot_targets`. Returns [LowShotResult], in the order of samples_by_shot. The
    problems are split over the processes; each passes the same and gets the same result.
    """
    _check_finite(train_features, test_features)
    kernel = svm.gram(train_features)
    principal = svm.principal_rows(kernel)
    test_kernel = svm.gram(train_features, test_features)  # [N, M]
    test_targets = test_targets.to(kernel.device)
    K = test_targets.shape[1]
    problems = {k: torch.stack(samples).to(kernel.device).transpose(1, 2).flatten(0, 1)  # [samples * K, N]
                for k, samples in samples_by_shot.items()}
    own = {k: list(range(len(targets)))[distributed.shard(len(targets))] for k, targets in problems.items()}
    results = []
    with _bar("low-shot fits", sum(map(len, own.values())) * len(costs), progress) as bar:
        for k, targets in problems.items():
            precision = torch.zeros(len(own[k]), len(costs), dtype=torch.float64)
            if own[k]:
                rows, labels = svm.used_rows(targets[own[k]])
                coefficients, converged = svm.fit_subsets(kernel, principal, rows, labels, costs, bar.update)
                for i, p in enumerate(own[k]):
                    scores = coefficients[i] @ test_kernel[rows[i]]
                    precision[i] = voc_average_precision(test_targets[:, p % K], scores.T).cpu()
                precision.masked_fill_(~converged.cpu(), torch.nan)
            precision = distributed.all_gather_uneven_rows(precision)
            unconverged = int(precision.isnan().sum())
            by_cost = precision.view(-1, K, len(costs)).mean(1).T  # [S, samples]
            means = by_cost.mean(1)
            _refuse_unsolved(means[None])
            best = _first_best(means)
            results.append(LowShotResult(k, float(means[best]), costs[best], by_cost, unconverged))
    return results


def _bar(words, total, progress):
    # None shows the bar on a terminal alone.
    return tqdm(total=total, desc=words, unit="fit", disable=None if progress and distributed.is_main() else True)


def _check_finite(*features):
    if not all(bool(torch.isfinite(rows.sum())) for rows in features):
        raise UserError("The features have values that are not finite; check the weights.")


def _refuse_unsolved(scores):
    """Raise where a row of [.., S] scores has no cost left whose fits all converged."""
    if scores.isnan().all(1).any():
        raise UserError("No support vector machine converged at any cost for one of the classes; check that the "
                        "feature rows are normalised.")


def _first_best(scores):
    """Index of the first largest value of [S]; NaN never wins."""
    scores = scores.nan_to_num(-1.0)
    return int((scores == scores.max()).nonzero()[0])


def _decision_values(features, train_features, coefficients, block=1024):
    """w . x for each row of features [M, D] with w = sum_i b_i x_i, coefficients [N, K] -> [M, K] float64."""
    weight = sum(train_features[i : i + block].double().T @ coefficients[i : i + block]
                 for i in range(0, len(train_features), block))
    bias = coefficients.sum(0)
    return torch.cat([features[i : i + block].double() @ weight for i in range(0, len(features), block)]) + bias
