"""Linear SVMs on frozen feature maps: VOC07 classification, full and low-shot.

    python eval_svm.py --weights out/backbone.pth --data shapes
    python eval_svm.py --weights backbone.pth --data /path/to/VOCdevkit --low-shot-targets voc07_low_shot_targets.zip

The protocol of the benchmark that published ODC's numbers: one-vs-rest SVMs on each of the five pooled maps, costs by
3-fold cross-validation; the map with the best mAP is the table's, for the low-shot numbers, too. On other labelled data
the same is done for each class against the rest.
"""

import functools

import torch

from odc.runtime import program
from odc import distributed
from odc.evaluation import frozen as evaluation
from odc.evaluation import tables as report
from odc.runtime.arguments import Parser, whole
from odc.data.augmentation import evaluation_transform, resize_exact
from odc.distributed import print_main
from odc.errors import UserError
from odc.features import MAP_NAMES, extract, map_pools, map_shapes, pooled_shapes
from odc.evaluation.voc import FOLDS, NEGATIVES, SAMPLES, SHOTS, draw_low_shot_targets, full_svm, low_shot, read_low_shot_targets

PROTOCOLS = {"voc07": "VOC07 SVM and low-shot SVM", "other": "VOC07 SVM and low-shot SVM, each class against the rest"}
OTHER_TRAIN_IMAGES = 2100  # of other data than VOC07; enough for k = 96 in 10 classes, and quick


def make_parser():
    parser = Parser(__doc__.splitlines()[0])
    groups = evaluation.add_arguments(parser)
    groups["data"].add_argument("--train-images", metavar="N", type=whole(2), default=None,
                                help="train on so many images, drawn from --seed, of all classes alike (default: all "
                                f"of VOC07, else at most {OTHER_TRAIN_IMAGES}, or {FOLDS} of each class)")
    method = parser.add_argument_group("support vector machines")
    method.add_argument("--maps", choices=MAP_NAMES, nargs="+", metavar="MAP",
                        help="feature maps to judge, of feature1 to feature5 (default: all)")
    method.add_argument("--shots", metavar="K", type=whole(1), nargs="*", default=None,
                        help=f"low-shot: positives of a class (default: {' '.join(map(str, SHOTS))}, as far as the "
                        "data has so many)")
    method.add_argument("--low-shot-targets", metavar="PATH", help="folder or zip file of the published target files "
                        "train_targets_sample1_k1.npy ... (default: samples drawn from --seed)")
    groups["run"].add_argument("--batch-size", metavar="N", type=whole(1, 65536), default=64,
                               help="images in a batch, per process")
    evaluation.add_features_cache(groups["run"])
    return parser


def one_vs_rest(dataset, images):
    """Targets [N, classes] int8 of some images: 1, -1 and, in VOC07, 0 (difficult)."""
    if dataset.targets is not None:
        return dataset.targets[images]
    hits = dataset.labels[images][:, None] == torch.arange(len(dataset.classes))
    return 2 * hits.to(torch.int8) - 1


def draw_images(dataset, count, seed):
    """Indices of `count` images in ascending order, as many of each class as of any other as far as they reach."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    if dataset.labels is not None:
        labels = dataset.labels[order]
        by_class = labels.argsort(stable=True)
        sizes = labels.bincount()
        number = torch.empty_like(order)  # each image's number among those of its class, in the drawn order
        number[by_class] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
        order = order[number.argsort(stable=True)]
    return order[:count].sort().values


def possible_shots(targets, shots):
    """Those of the shots k for which every class has k positives and 19 k negatives."""
    positives, negatives = (targets == 1).sum(0), (targets == -1).sum(0)
    return [k for k in shots if k <= int(positives.min()) and NEGATIVES * k <= int(negatives.min())]


def choose_shots(args, targets):
    """{k: [targets [N, classes] of each sample]}: published, or drawn. Raises UserError."""
    if args.low_shot_targets:
        return read_low_shot_targets(args.low_shot_targets, *targets.shape, SHOTS if args.shots is None else args.shots)
    if args.shots is not None:
        return draw_low_shot_targets(targets, args.seed, args.shots)
    shots = possible_shots(targets, SHOTS)
    if len(shots) < len(SHOTS):
        left_out = ", ".join(str(k) for k in SHOTS if k not in shots)
        print_main(f"too few images for low-shot k = {left_out}: some class has fewer than k or {NEGATIVES} k others")
    return draw_low_shot_targets(targets, args.seed, shots)


def check_targets(targets, classes, root):
    """Raise UserError for a class with too few positives or negatives for the cross-validation."""
    for label, present in zip(classes, (targets == 1).T):
        fewest = min(int(present.sum()), int((~present).sum()))
        if fewest < FOLDS:
            raise UserError(f"class {label!r} of {root} has {int(present.sum())} of the {len(targets)} images to train on, and "
                            f"the {FOLDS}-fold cross-validation needs {FOLDS} with it and {FOLDS} without: give a larger "
                            "--train-images, or other --data.")


def main():
    args = make_parser().parse_args()
    frozen = evaluation.prepare(args)
    is_voc = frozen.train.name == "voc07"
    protocol = PROTOCOLS["voc07" if is_voc else "other"]
    if args.train_images and args.train_images > len(frozen.train):
        raise UserError(f"--train-images {args.train_images}: {frozen.train.root} has only {len(frozen.train)}.")
    enough = len(frozen.train) if is_voc else max(OTHER_TRAIN_IMAGES, FOLDS * len(frozen.train.classes))
    count = min(len(frozen.train), args.train_images or enough)
    images = draw_images(frozen.train, count, args.seed)
    val_images = torch.arange(len(frozen.val))
    targets, val_targets = one_vs_rest(frozen.train, images), one_vs_rest(frozen.val, val_images)
    with distributed.together():
        check_targets(targets, frozen.train.classes, frozen.train.root)
        samples = choose_shots(args, targets)
    for label, positives in zip(frozen.val.classes, (val_targets == 1).sum(0).tolist()):
        if positives == 0:
            print_main(f"{frozen.val.root} has no image of class {label!r}: its average precision counts as 0")

    shapes = map_shapes(frozen.backbone, frozen.image_size)
    pools = map_pools(shapes)
    chosen = [MAP_NAMES.index(name) for name in MAP_NAMES if name in (args.maps or MAP_NAMES)]
    dims = [channels * height * width for channels, height, width in pooled_shapes(shapes)]
    transform = frozen.transform
    if is_voc:
        resize = evaluation_transform(frozen.image_size).keywords["resize"]
        transform = functools.partial(resize_exact, size=frozen.image_size, resize=resize)

    def pooled(images):
        """[B, 3, S, S] -> [B, D] of each map, rows divided by their norm."""
        maps = frozen.maps(images)
        rows = [pools[i](maps[i]).flatten(1) for i in chosen]
        return [x / (x.norm(dim=1, keepdim=True) + 1e-5) for x in rows]

    def features(dataset, images, name):
        cache = frozen.cache(args.features_cache, dataset, transform, "pooled maps", chosen, images.tolist())
        return extract(pooled, dataset, transform, [dims[i] for i in chosen], frozen.device, args.batch_size,
                       frozen.workers, cache, name, images)

    print_main(f"protocol {protocol}: {count:,} train images, "
               f"{'published' if args.low_shot_targets else f'{SAMPLES} drawn'} low-shot samples")
    train = features(frozen.train, images, "train")
    val = features(frozen.val, val_images, "val")

    full = {}
    for i, train_rows, val_rows in zip(chosen, train, val):
        program.check_signals()
        result = full_svm(train_rows.to(frozen.device), targets, val_rows.to(frozen.device), val_targets)
        full[MAP_NAMES[i]] = result
        print_main(f"{MAP_NAMES[i]}: mAP {100 * result.mean_average_precision:.2f}{unconverged(result)}")
    best = max(full, key=lambda name: full[name].mean_average_precision)
    at = list(full).index(best)
    program.check_signals()
    shots = []
    if samples:
        shots = low_shot(train[at].to(frozen.device), samples, val[at].to(frozen.device), val_targets)
    for result in shots:
        if result.unconverged:
            print_main(f"k = {result.k}{unconverged(result)}")

    row = {"Best Layer": best, "SVM": 100 * full[best].mean_average_precision}
    row |= {f"k={result.k}": 100 * result.mean_average_precision for result in shots}
    table = report.VOC07_SVM
    comparable = count == len(frozen.train) and len(chosen) == len(MAP_NAMES) and table.is_comparable(
        frozen.train, frozen.val, frozen.backbone, frozen.image_size)
    published = table if comparable else None
    report.show(f"{protocol} on {frozen.train.name} (mAP, %)", list(row), {frozen.label(args): row}, published)
    report.write_json(args.output, dict(
        script="eval_svm", protocol=protocol, **frozen.description(), train_images_used=count, seed=args.seed,
        low_shot_samples=args.low_shot_targets or "drawn", results=row,
        full={name: dict(mAP=100 * r.mean_average_precision, unconverged=r.unconverged, classes={
            label: dict(AP=100 * ap, cost=cost)
            for label, ap, cost in zip(frozen.train.classes, r.average_precision.tolist(), r.costs)
        }) for name, r in full.items()},
        low_shot={f"k={r.k}": dict(mAP=100 * r.mean_average_precision, cost=r.cost, unconverged=r.unconverged)
                  for r in shots},
        published=report.published_rows(published)))


def unconverged(result):
    """A remark on fits that did not converge, or nothing."""
    return f" (fits that did not converge, and were left out: {result.unconverged})" if result.unconverged else ""


if __name__ == "__main__":
    program.run_program(main)
