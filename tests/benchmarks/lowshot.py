"""All 15,200 low-shot fits of one VOC07 feature map against scikit-learn's LinearSVC.

    python -m tests.benchmarks.lowshot

8 k x 5 samples x 20 classes x 19 costs on 5,011 x 8,192. LinearSVC solves every tenth fit, all k,
samples and costs among them, in float64 and on the one thread that it can use; its time is scaled
by ten. Ours is the time from the features, so with the Gram matrix. Both are measured in turn, in
the same run.
"""

import time

import numpy as np
import torch

from odc.evaluation import svm, voc
from tests.benchmarks.svm import clock, linear_svc, made_up_features, objective, report
from tests.benchmarks.timing import make_parser


def fit_all(train, problems):
    """{k: (row numbers, targets, coefficients)} of all problems {k: [P, N]}."""
    gram = svm.gram_matrix(train)
    eigenvectors = svm.strongest_eigenvectors(gram)
    solved = {}
    for k, targets in problems.items():
        rows, labels = svm.used_rows(targets)
        coefficients, converged = svm.fit_subsets(gram, eigenvectors, rows, labels, voc.COSTS)
        assert converged.all()
        solved[k] = rows, labels, coefficients
    return solved


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--every", type=int, default=10,
                        help="LinearSVC solves one fit in so many (a divisor of 20)")
    arguments = parser.parse_args()

    train, targets, test, test_targets = made_up_features()
    samples = voc.draw_low_shot_targets(targets, seed=0)
    problems = {k: torch.stack(drawn).transpose(1, 2).flatten(0, 1) for k, drawn in samples.items()}
    sample = [(k, p, s) for k in problems for p in range(len(problems[k]))
              for s in range(len(voc.COSTS)) if (p + 3 * (p // 20) + s) % arguments.every == 0]
    rows = train.double().numpy()
    train, test = train.to(arguments.device), test.to(arguments.device)
    ours, sampled, gaps = [], [], []
    for number in range(arguments.rounds):
        start = clock()
        solved = fit_all(train, problems)
        ours.append(clock() - start)
        for k, p, s in sample[number :: arguments.rounds]:
            used, labels, coefficients = (part[p].cpu().numpy() for part in solved[k])
            t, cost, own = labels.astype(np.int64), voc.COSTS[s], rows[used]
            seconds, weight = linear_svc(own, t, cost)
            sampled.append(seconds)
            b = coefficients[s]
            best = objective(np.append(own.T @ b, b.sum()), own, t, cost)
            gaps.append(best / objective(weight, own, t, cost) - 1)
    fits = sum(len(targets) for targets in problems.values()) * len(voc.COSTS)
    report("Low-shot SVM of one feature map, 5,011 x 8,192", fits, ours, sampled, arguments.every,
           gaps, 50, arguments.device)
    del solved, rows
    start = time.perf_counter()
    results = voc.low_shot(train, samples, test, test_targets)
    print(f"\nThe whole table of the map (fits, tests on 4,952 images): "
          f"{time.perf_counter() - start:.1f} s; mAP "
          + ", ".join(f"{result.mean_average_precision:.2f}" for result in results) + ".")


if __name__ == "__main__":
    main()
