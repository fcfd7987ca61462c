"""The low-shot table of one VOC07 feature map, 15,200 fits, against scikit-learn's LinearSVC.

    python -m tests.benchmarks.lowshot

8 k x 5 samples x 20 classes x 19 costs on 5,011 x 8,192. LinearSVC solves every tenth fit, all k,
samples and costs among them, in float64 and on the one thread that it can use; its time is scaled
by ten. Ours is the whole table: the Gram matrices, the fits, and their test on 4,952 images.
"""

import torch

from odc.evaluation import svm, voc
from tests.benchmarks.svm import compare, made_up_features, make_svm_parser


def main():
    args = make_svm_parser(__doc__).parse_args()
    train, targets, test, test_targets = made_up_features()
    samples = voc.draw_low_shot_targets(targets, seed=0)
    problems = torch.cat([torch.stack(drawn).transpose(1, 2).flatten(0, 1)
                          for drawn in samples.values()])
    chosen = [(p, s) for p in range(len(problems)) for s in range(len(voc.COSTS))
              if (p + 3 * (p // 20) + s) % args.every == 0]
    device = [part.to(args.device) for part in (train, test)]
    gram = svm.gram_matrix(device[0])
    basis = svm.strongest_eigenvectors(gram)

    def solution(p, s):
        """b of one fit, by itself."""
        rows = problems[p].nonzero()[:, 0].to(gram.device)
        fits = svm.fit(gram[rows[:, None], rows][None], basis[rows][None, :, :len(rows)],
                       problems[p].to(gram.device)[rows][None, None], voc.COSTS[s : s + 1])
        b = gram.new_zeros(len(gram))
        b[rows] = fits.coefficients[0, 0, 0]
        return b

    compare("Low-shot SVM of one feature map, 5,011 x 8,192",
            lambda: voc.low_shot(device[0], samples, device[1], test_targets), solution, train,
            problems, chosen, args)


if __name__ == "__main__":
    main()
