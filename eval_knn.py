"""k-nearest-neighbour classification on frozen features: no training, no settings to tune.

    python eval_knn.py --weights out/backbone.pth --data shapes
    torchrun --nproc_per_node=8 eval_knn.py --weights backbone.pth --data /path/to/imagenet

The protocol of Wu et al. 2018 ("Unsupervised Feature Learning via Non-Parametric Instance Discrimination"), as DINO
evaluates it: the k training images of largest cosine similarity s vote for their class with weight exp(s / 0.07).
"""

import torch.nn.functional as F

from odc.runtime import program
from odc import distributed
from odc.evaluation import frozen as evaluation
from odc.evaluation import tables as report
from odc.runtime.arguments import Parser, number, whole
from odc.distributed import print_main
from odc.errors import UserError
from odc.features import extract, extract_rows
from odc.evaluation.knn import knn_predict


def make_parser():
    parser = Parser(__doc__.splitlines()[0])
    groups = evaluation.add_arguments(parser)
    method = parser.add_argument_group("nearest neighbours")
    method.add_argument("--k", metavar="K", type=whole(1), nargs="+", default=[10, 20, 100, 200],
                        help="numbers of neighbours that vote")
    method.add_argument("--temperature", metavar="T", type=number(0, above=True), default=0.07,
                        help="a neighbour of cosine similarity s weighs exp(s / T)")
    groups["run"].add_argument("--batch-size", metavar="N", type=whole(1, 65536), default=128,
                               help="images in a batch, per process")
    evaluation.add_features_cache(groups["run"])
    return parser


def main():
    args = make_parser().parse_args()
    frozen = evaluation.prepare(args)
    train, val = frozen.train, frozen.val
    if train.labels is None:
        raise UserError(f"{train.name} has several classes an image, and neighbours vote for one: use eval_svm.py.")
    if max(args.k) > len(train):
        raise UserError(f"--k {max(args.k)}: the bank has only {len(train)} images, in {train.root}; choose less.")

    def pooled(images):
        """[B, 3, S, S] -> the global average of the last map, L2-normalised: [B, d]."""
        return F.normalize(frozen.maps(images)[-1].mean((2, 3)))

    def features(take, dataset, name):
        cache = frozen.cache(args.features_cache, dataset, frozen.transform, "average pool")
        return take(pooled, dataset, frozen.transform, frozen.backbone.out_channels[-1], frozen.device, args.batch_size,
                    frozen.workers, cache, name).to(frozen.device)

    bank = features(extract_rows, train, "bank")  # [n_local, d], this process's rows
    queries = features(extract, val, "queries")  # [Q, d], all of them
    print_main(f"voting: {len(val):,} queries, k = {', '.join(map(str, args.k))}")
    predictions = knn_predict(queries, bank, train.labels[distributed.shard(len(train))], len(train.classes),
                              sorted(set(args.k)), args.temperature)

    results = {}
    for k in args.k:
        hits = predictions[k].cpu() == val.labels[:, None]
        top1, top5 = hits[:, 0].double().mean(), hits.any(1).double().mean()
        results[f"k={k}"] = dict(top1=100 * float(top1), top5=100 * float(top5))
    table = report.IMAGENET_KNN
    comparable = args.temperature == 0.07 and table.is_comparable(train, val, frozen.backbone, frozen.image_size)
    published = table if comparable else None
    protocol = f"weighted k-nearest neighbours, temperature {args.temperature:g}"
    row = frozen.label(args)
    report.show(
        f"{'ImageNet' if published else train.name} nearest neighbour (%), {protocol}", list(results),
        {f"{row}, top-1": {k: r["top1"] for k, r in results.items()},
         f"{row}, top-5": {k: r["top5"] for k, r in results.items()}}, published)
    report.write_json(args.output, dict(
        script="eval_knn", protocol=protocol, temperature=args.temperature, **frozen.description(), results=results,
        published=report.published_rows(published)))


if __name__ == "__main__":
    program.run_program(main)
