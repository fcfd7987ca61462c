"""k-nearest-neighbour classification on frozen features: no training, no settings to tune.

    python eval_knn.py --weights out/backbone.pth --data shapes
    torchrun --nproc_per_node=8 eval_knn.py --weights backbone.pth --data /path/to/imagenet

The protocol of Wu et al. 2018 (Non-Parametric Instance Discrimination), as DINO evaluates it: the k
training images of largest cosine similarity s vote for their class with weight exp(s / 0.07).
"""

from odc import distributed
from odc.data.augmentation import evaluation_transform
from odc.errors import UserError
from odc.evaluation import frozen_backbone, tables
from odc.evaluation.knn import knn_predict, pooled
from odc.features import extract
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
    transform = evaluation_transform(network.image_size)
    bank, queries = (extract(
        lambda images: pooled(network.backbone(images)), dataset, transform,
        network.backbone.out_channels[-1], network.device, args.batch_size, network.workers,
        name=dataset.split) for dataset in (train, val))
    queries = distributed.all_gather_uneven_rows(queries)
    labels = train.labels[distributed.shard(len(train))]
    ks = args.k or [k for k in (10, 20, 100, 200) if k <= len(train)] or [1]
    predictions = knn_predict(queries, bank, labels, len(train.classes), sorted(set(ks)))
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
