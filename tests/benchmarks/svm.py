"""All 1,520 fits of one VOC07 feature map against scikit-learn's LinearSVC, as the recipe calls it.

    python -m tests.benchmarks.svm

20 classes x 19 costs x (3 folds + all rows) on 5,011 x 8,192. LinearSVC solves every tenth fit, all
costs, folds and classes among them, in float64 and on the one thread that it can use; its time is
scaled by ten. Ours is the whole table from the features: the Gram matrix, the fits, and the test on
4,952 images. Processor seconds (of all threads) stand beside the seconds on the clock, because
other programs on the machine change them less.
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


def make_svm_parser(doc):
    parser = make_parser(doc)
    parser.add_argument("--every", type=int, default=10,
                        help="LinearSVC solves one fit in so many (a divisor of 20)")
    return parser


def compare(title, table, solution, train, problems, chosen, args):
    """Print the time of the whole table, and of LinearSVC for the chosen fits [(problem, cost)].

    solution: called with one of the chosen, it returns our b [N].
    """
    start = clock()
    table()
    ours = clock() - start
    rows, sampled, gaps = train.double().numpy(), [], []
    for p, s in chosen:
        used = (problems[p] != 0).numpy()
        t, cost, own = problems[p].numpy()[used].astype(np.int64), voc.COSTS[s], rows[used]
        seconds, weight = linear_svc(own, t, cost)
        sampled.append(seconds)
        b = solution(p, s).cpu().numpy()
        best = objective(np.append(rows.T @ b, b.sum()), own, t, cost)
        gaps.append(best / objective(weight, own, t, cost) - 1)
    theirs, fits = np.sum(sampled, axis=0) * args.every, len(problems) * len(voc.COSTS)
    print(f"\n{title}, {fits:,} fits; {machine(args.device)}\n")
    print("| | time | processor |\n|---|---|---|")
    print(f"| ours | {ours[0]:.1f} s | {ours[1]:.1f} s |")
    print(f"| LinearSVC ({len(sampled)} fits measured, times {args.every}) | {theirs[0]:.0f} s | "
          f"{theirs[1]:.0f} s |")
    print(f"| LinearSVC / ours (must reach 25) | {theirs[0] / ours[0]:.0f} | "
          f"{theirs[1] / ours[1]:.0f} |")
    print("\nObjective, ours / LinearSVC - 1, over the measured fits: "
          f"worst {max(gaps):+.1e}, best {min(gaps):+.1e}.")


def main():
    args = make_svm_parser(__doc__).parse_args()
    train, targets, test, test_targets = made_up_features()
    labels = targets.T
    folds = torch.stack([voc.stratified_folds(row == 1) for row in labels])
    problems = torch.cat([torch.where(folds == fold, 0, labels) for fold in range(4)])  # 3: all
    chosen = [(part * 20 + c, s) for part in range(4) for s in range(len(voc.COSTS))
              for c in range(20) if (c + s + 5 * part) % args.every == 0]
    device = [part.to(args.device) for part in (train, test)]
    gram = svm.gram_matrix(device[0])[None]
    basis = svm.strongest_eigenvectors(gram[0])[None]

    def solution(p, s):
        """b of one fit, by itself."""
        fits = svm.fit(gram, basis, problems[None, p : p + 1].to(gram.device),
                       voc.COSTS[s : s + 1])
        return fits.coefficients[0, 0, 0]

    compare("Full SVM of one feature map, 5,011 x 8,192",
            lambda: voc.full_svm(device[0], targets, device[1], test_targets), solution, train,
            problems, chosen, args)


if __name__ == "__main__":
    main()
