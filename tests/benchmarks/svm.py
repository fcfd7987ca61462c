"""All 1,520 fits of one VOC07 feature map against scikit-learn's LinearSVC, as the recipe calls it.

    python -m tests.benchmarks.svm

20 classes x 19 costs x (3 folds + all rows) on 5,011 x 8,192. LinearSVC solves every tenth fit, all
costs, folds and classes among them, in float64 and on the one thread that it can use; its time is
scaled by ten. Ours is the time from the features, so with the Gram matrix. Both are measured in
turn, in the same run. Processor seconds (of all threads) stand beside the seconds on the clock,
because other programs on the machine change them less.
"""

import time
import warnings

import numpy as np
import torch
from sklearn.svm import LinearSVC

from odc.evaluation import svm, voc
from tests.benchmarks.timing import machine, make_parser

# Images of each class in VOC2007 trainval, in alphabetical order, about.
POSITIVES = (238, 243, 330, 181, 244, 186, 713, 337, 445, 141, 200, 421, 287, 245, 2008, 245, 96,
             229, 261, 256)


def made_up_features(num_train=5011, num_test=4952, width=8192, seed=0):
    """Features like the pooled maps of a pre-trained network.

    Dense, non-negative, unit rows, all with a large common part, a spectrum that falls as a power,
    and classes that a linear classifier finds with APs of about 0.3 to 0.9.
    Returns train features, train targets, test features, test targets.
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


def linear_svc(rows, targets, cost):
    """The recipe's fit -> [seconds, processor seconds], (w, bias)."""
    model = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, penalty="l2",
                      loss="squared_hinge", tol=1e-4, max_iter=2000, dual=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not always converge
        start = clock()
        model.fit(rows, targets)
        seconds = clock() - start
    return seconds, np.append(model.coef_[0], model.intercept_)


def objective(weight, rows, targets, cost):
    """P(w) from its definition; rows [n, D] and weight [D + 1] float64."""
    hinge = np.maximum(0, 1 - targets * (rows @ weight[:-1] + weight[-1]))
    return 0.5 * weight @ weight + cost * (np.where(targets > 0, 2, 1) * hinge**2).sum()


def report(title, fits, ours, sampled, every, gaps, must, device):
    """Print the table of both benchmarks.

    ours: `clock` of each round; sampled: that of LinearSVC's fits.
    """
    theirs = np.sum(sampled, axis=0) * every
    median, least = np.median(ours, axis=0), np.min(ours, axis=0)
    print(f"\n{title}, {fits:,} fits; {machine(device)}\n")
    print("| | median | minimum | processor, median |")
    print("|---|---|---|---|")
    print(f"| ours | {median[0]:.1f} s | {least[0]:.1f} s | {median[1]:.1f} s |")
    print(f"| LinearSVC ({len(sampled)} fits measured, times {every}) | {theirs[0]:.0f} s | | "
          f"{theirs[1]:.0f} s |")
    print(f"| LinearSVC / ours (must reach {must}) | {theirs[0] / median[0]:.0f} | "
          f"{theirs[0] / least[0]:.0f} | {theirs[1] / median[1]:.0f} |")
    print("\nObjective, ours / LinearSVC - 1, over the measured fits: "
          f"worst {max(gaps):+.1e}, best {min(gaps):+.1e}.")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--every", type=int, default=10,
                        help="LinearSVC solves one fit in so many (a divisor of 20)")
    arguments = parser.parse_args()

    train, targets, test, test_targets = made_up_features()
    labels = targets.T
    folds = torch.stack([voc.stratified_folds(row == 1) for row in labels])
    problems = torch.cat([torch.where(folds == fold, 0, labels) for fold in range(4)])  # 3: all
    sample = [(part * 20 + c, s) for part in range(4) for s in range(len(voc.COSTS))
              for c in range(20) if (c + s + 5 * part) % arguments.every == 0]
    rows = train.double().numpy()
    train, test = train.to(arguments.device), test.to(arguments.device)
    ours, sampled, gaps = [], [], []
    for number in range(arguments.rounds):
        start = clock()
        fits = svm.fit(svm.gram_matrix(train), problems, voc.COSTS)
        ours.append(clock() - start)
        assert fits.converged.all()
        for p, s in sample[number :: arguments.rounds]:
            used = (problems[p] != 0).numpy()
            t, cost = problems[p].numpy()[used].astype(np.int64), voc.COSTS[s]
            seconds, weight = linear_svc(rows[used], t, cost)
            sampled.append(seconds)
            b = fits.coefficients[s, p].cpu().numpy()
            best = objective(np.append(rows.T @ b, b.sum()), rows[used], t, cost)
            gaps.append(best / objective(weight, rows[used], t, cost) - 1)
    report("Full SVM of one feature map, 5,011 x 8,192", problems.shape[0] * len(voc.COSTS), ours,
           sampled, arguments.every, gaps, 20, arguments.device)
    del fits, rows
    start = time.perf_counter()
    result = voc.full_svm(train, targets, test, test_targets)
    seconds, precision = time.perf_counter() - start, result.average_precision
    print(f"\nThe whole table of the map (folds, costs, refit, test): {seconds:.1f} s; test AP "
          f"{float(precision.min()):.2f} to {float(precision.max()):.2f}.")


if __name__ == "__main__":
    main()
