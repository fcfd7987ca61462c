"""All SVM fits of one VOC07 feature map against scikit-learn's LinearSVC, as the recipe calls it.

    python -m tests.benchmarks.svm    1,520 fits: 20 classes x 19 costs x (3 folds + all)

On 5,011 x 8,192. LinearSVC solves some of the fits, drawn at random, in float64 and on the one
thread that it can use; its time is scaled to all. Ours is the whole table from the features: Gram
matrices, fits, and the test on 4,952 images. Processor seconds (of all threads) stand beside the
seconds on the clock, because other programs on the machine change them less.
"""

import random
import time

import numpy as np
import torch

from odc.evaluation import svm, voc
from tests.benchmarks.timing import machine, make_parser
from tests.evaluation.test_svm import linear_svc, primal_objective, primal_weight

# Images of each class in VOC2007 trainval, in alphabetical order, about.
POSITIVES = (238, 243, 330, 181, 244, 186, 713, 337, 445, 141, 200, 421, 287, 245, 2008, 245, 96,
             229, 261, 256)


def made_up_features(num_train=5011, num_test=4952, width=8192, seed=0):
    """Features like the pooled maps of a pre-trained network.

    Dense, non-negative, unit rows, all with a large common part, a spectrum that falls as a power,
    and classes that a linear classifier finds with APs of about 0.3 to 0.9.
    """
    generator = torch.Generator().manual_seed(seed)
    N, hidden = num_train + num_test, 256
    targets = torch.full((N, 20), -1, dtype=torch.int8)
    for c, count in enumerate(POSITIVES):
        for start, size in ((0, num_train), (num_train, num_test)):
            drawn = torch.randperm(size, generator=generator)[: round(count * size / 5011)]
            targets[start + drawn, c] = 1
    causes = torch.randn(N, hidden, generator=generator) * torch.arange(1, hidden + 1) ** -0.5
    present = (targets == 1) * torch.rand(N, 20, generator=generator)  # an object may be small
    causes += 0.5 * present @ torch.randn(20, hidden, generator=generator) * hidden**-0.5
    rows = causes @ torch.randn(hidden, width, generator=generator)
    rows += torch.randn(N, width, generator=generator)
    rows = torch.nn.functional.softplus(rows.mul_(2))
    rows /= rows.norm(dim=1, keepdim=True) + 1e-5
    return rows[:num_train], targets[:num_train], rows[num_train:], targets[num_train:]


def clock():
    """[seconds on the clock, processor seconds of this process]."""
    return np.array([time.perf_counter(), time.process_time()])


def solve_one(gram, basis, targets, cost):
    """Our b of one fit, by itself, for the rows in use; targets [N] of 1, -1, 0."""
    rows = targets.nonzero()[:, 0].to(gram.device)
    fits = svm.fit(gram[rows[:, None], rows][None], basis[rows][None, :, :len(rows)],
                   targets.to(gram.device)[rows][None, None], (cost,))
    return fits.coefficients[0, 0, 0].cpu()


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--fits", type=int, default=150, help="how many LinearSVC solves")
    args = parser.parse_args()
    train, targets, test, test_targets = made_up_features()
    device = [part.to(args.device) for part in (train, test)]
    folds = torch.stack([voc.stratified_folds(row == 1) for row in targets.T])
    problems = torch.cat([torch.where(folds == fold, 0, targets.T) for fold in range(4)])
    start = clock()
    voc.full_svm(device[0], targets, device[1], test_targets)
    ours = clock() - start
    gram = svm.gram_matrix(device[0])
    basis = svm.strongest_eigenvectors(gram)
    rows, sampled, gaps = train.double(), [], []
    every = list(np.ndindex(len(problems), len(voc.COSTS)))
    for p, s in random.Random(0).sample(every, args.fits):
        used = problems[p] != 0
        t, cost, own = problems[p][used].long(), voc.COSTS[s], rows[used]
        start = clock()
        weight, _ = linear_svc(own, t, cost, tol=1e-4, max_iter=2000)  # the recipe's
        sampled.append(clock() - start)
        best = primal_weight(solve_one(gram, basis, problems[p], cost), own)
        gaps.append(float(primal_objective(best, own, t, cost)
                          / primal_objective(weight, own, t, cost)) - 1)
    theirs = np.mean(sampled, axis=0) * len(every)
    print(f"\nSVMs of one feature map, 5,011 x 8,192, {len(every):,} fits; {machine(args.device)}")
    print("\n| | time | processor |\n|---|---|---|")
    print(f"| ours | {ours[0]:.1f} s | {ours[1]:.1f} s |")
    print(f"| LinearSVC (scaled from {len(sampled)} fits) | {theirs[0]:.0f} s | "
          f"{theirs[1]:.0f} s |")
    print("| LinearSVC / ours | {:.0f} | {:.0f} |".format(*theirs / ours))
    print("\nObjective, ours / LinearSVC - 1, over the measured fits: "
          f"worst {max(gaps):+.1e}, best {min(gaps):+.1e}.")


if __name__ == "__main__":
    main()
