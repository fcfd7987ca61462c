"""k-nearest-neighbour classification on frozen features: no training, no settings to tune.

    python eval_knn.py --weights out/backbone.pth --data shapes
    torchrun --nproc_per_node=8 eval_knn.py --weights backbone.pth --data /path/to/imagenet

The protocol of Wu et al. 2018 (Non-Parametric Instance Discrimination), as DINO evaluates it: the k
training images of largest cosine similarity s vote for their class with weight exp(s / 0.07).
"""

from odc.errors import UserError
from odc.evaluation import frozen_backbone, tables
from odc.evaluation.knn import classify
from odc.runtime import launch
from odc.runtime.arguments import Parser, whole


def make_parser():
    parser = Parser(__doc__.splitlines()[0])
    frozen_backbone.add_arguments(parser, batch_size=128)
    add = parser.add_argument_group("nearest neighbours").add_argument
    add("--k", metavar="K", type=whole(1), nargs="+", help="numbers of neighbours that vote "
        "(default: 10 20 100 200, as far as there are so many training images)")
    return parser


def main():
    args = make_parser().parse_args()
    network = frozen_backbone.prepare(args, one_class=True)
    train, val = network.train, network.val
    if args.k and max(args.k) > len(train):
        raise UserError(f"--k {max(args.k)}: {train.root} has only {len(train)} images to vote.")
    ks = args.k or [k for k in (10, 20, 100, 200) if k <= len(train)] or [1]
    predictions = classify(network.backbone, train, val, network.image_size, network.device,
                           sorted(set(ks)), args.batch_size, network.workers)
    results = {}
    for k in ks:
        hits = (predictions[k].cpu() == val.labels[:, None]).double().mean(0)
        results[f"k={k}"] = dict(top1=100 * float(hits[0]), top5=100 * float(hits.sum()))
    rows = {f"{network.label(args)}, top-{n}": {k: r[f"top{n}"] for k, r in results.items()}
            for n in (1, 5)}
    tables.write_json(args.output, dict(script="eval_knn", **network.description(),
                                        results=results))
    tables.show(f"{train.name} nearest neighbour (%)", list(results), rows,
                tables.IMAGENET_KNN.if_comparable(network))


if __name__ == "__main__":
    launch.run_program(main)
