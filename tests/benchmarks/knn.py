"""kNN's top 200 and votes against the bare float32 product of queries and bank.

    python -m tests.benchmarks.knn    5,000 queries, a bank of 200,000 x 2,048
"""

import torch
import torch.nn.functional as F

from odc.evaluation.knn import knn_predict
from tests.benchmarks.timing import interleave, make_parser, table


def features(n, d, num_classes, seed):
    """Unit features [n, d] around the classes' directions, made in place to save memory."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (n,), generator=g)
    x = torch.empty(n, d)
    for rows in torch.arange(n).split(4096):
        noise = torch.randn(len(rows), d, generator=g)
        x[rows] = F.normalize((directions[labels[rows]] + 2 * noise).relu_())
    return x, labels


def bare_product(queries, bank):
    products = bank.new_empty(512, 8192)  # about the fastest on a CPU
    for rows in bank.split(8192):
        for some in queries.split(512):
            torch.mm(some, rows.T, out=products[: len(some), : len(rows)])


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--bank", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    queries, _ = features(arguments.queries, 2048, 1000, seed=1)
    bank, labels = features(arguments.bank, 2048, 1000, seed=2)
    queries, bank, labels = (rows.to(arguments.device) for rows in (queries, bank, labels))
    functions = {"ours": lambda: knn_predict(queries, bank, labels, 1000),
                 "bare product": lambda: bare_product(queries, bank)}
    times = interleave(functions, arguments.rounds)
    table(f"kNN, {arguments.queries:,} queries, bank {arguments.bank:,} x 2,048, k = 10 to 200",
          times, "ours", device=arguments.device)


if __name__ == "__main__":
    main()
