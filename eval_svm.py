"""Linear SVMs on frozen feature maps: VOC07 classification, full and low-shot.

    python eval_svm.py --weights out/backbone.pth --data shapes
    python eval_svm.py --weights backbone.pth --data /path/to/VOCdevkit \\
        --low-shot-targets voc07_low_shot_targets.zip

The protocol of the benchmark that published ODC's numbers: one-vs-rest SVMs on each of the five
pooled maps, costs by 3-fold cross-validation. The table has the map with the best mAP, for the
low-shot numbers, too. On other labelled data the same is done for each class against the rest.
"""

import functools

import torch

from odc import distributed
from odc.data.augmentation import evaluation_transform, resize_exact
from odc.data.loader import readable
from odc.distributed import print_main
from odc.errors import UserError
from odc.evaluation import frozen_backbone, tables, voc
from odc.evaluation.pooling import MAP_NAMES, map_pools, map_shapes
from odc.features import extract
from odc.runtime import launch
from odc.runtime.arguments import Parser, whole

OTHER_TRAIN_IMAGES = 2100  # of other data than VOC07: enough for k = 96 in 10 classes, and quick


def make_parser():
    parser = Parser(__doc__.splitlines()[0])
    groups = frozen_backbone.add_arguments(parser, batch_size=64)
    groups["data"].add_argument(
        "--train-images", metavar="N", type=whole(2), help="train on so many images, drawn from "
        "--seed, of all classes alike (default: all of VOC07, else at most "
        f"{OTHER_TRAIN_IMAGES}, or {voc.FOLDS} of each class)")
    add = parser.add_argument_group("support vector machines").add_argument
    add("--maps", choices=MAP_NAMES, nargs="+", metavar="MAP",
        help="feature maps to judge, of feature1 to feature5 (default: all)")
    add("--shots", metavar="K", type=whole(1), nargs="*", help="low-shot: positives of a class "
        f"(default: {' '.join(map(str, voc.SHOTS))}, as far as the data has so many)")
    add("--low-shot-targets", metavar="PATH", help="folder or zip file of the published target "
        "files train_targets_sample1_k1.npy ... (default: samples drawn from --seed)")
    return parser


def one_vs_rest(dataset, images):
    """Targets [N, classes] int8 of some images: 1, -1 and, in VOC07, 0 (difficult)."""
    if dataset.targets is not None:
        return dataset.targets[images]
    hits = dataset.labels[images][:, None] == torch.arange(len(dataset.classes))
    return 2 * hits.to(torch.int8) - 1


def draw_images(dataset, count, seed):
    """Ascending indices of `count` images, as many of each class as far as they reach."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    if dataset.labels is not None:
        labels = dataset.labels[order]
        by_class = labels.argsort(stable=True)
        sizes = labels.bincount()
        number = torch.empty_like(order)  # of each image among those of its class, as drawn
        number[by_class] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
        order = order[number.argsort(stable=True)]
    return order[:count].sort().values


def check_targets(targets, dataset):
    """Raise UserError for a class with too few positives or negatives for cross-validation."""
    for label, present in zip(dataset.classes, (targets == 1).T):
        positives, negatives = int(present.sum()), int((~present).sum())
        if min(positives, negatives) < voc.FOLDS:
            raise UserError(
                f"class {label!r} of {dataset.root} has {positives} of the {len(targets)} images "
                f"to train on, and the {voc.FOLDS}-fold cross-validation needs {voc.FOLDS} with it "
                f"and {voc.FOLDS} without: give a larger --train-images, or other --data.")


def choose_shots(args, targets):
    """{k: [targets [N, classes] of each sample]}: published, or drawn. Raises UserError."""
    if args.low_shot_targets:
        return voc.read_low_shot_targets(args.low_shot_targets, *targets.shape,
                                         voc.SHOTS if args.shots is None else args.shots)
    shots = args.shots
    if shots is None:
        positives, negatives = (int((targets == t).sum(0).min()) for t in (1, -1))
        shots = [k for k in voc.SHOTS if k <= positives and voc.NEGATIVES * k <= negatives]
        if left_out := [str(k) for k in voc.SHOTS if k not in shots]:
            print_main(f"too few images for low-shot k = {', '.join(left_out)}: some class has "
                       f"fewer than k or {voc.NEGATIVES} k others")
    return voc.draw_low_shot_targets(targets, args.seed, shots)


def unconverged(result):
    """A remark on fits that did not converge, or nothing."""
    count = result.unconverged
    return f" (fits that did not converge, and were left out: {count})" if count else ""


def main():
    args = make_parser().parse_args()
    network = frozen_backbone.prepare(args)
    train_set, val_set = network.train, network.val
    is_voc = train_set.name == "voc07"
    protocol = "VOC07 SVM and low-shot SVM" + ("" if is_voc else ", each class against the rest")
    if args.train_images and args.train_images > len(train_set):
        raise UserError(f"--train-images {args.train_images}: {train_set.root} has only "
                        f"{len(train_set)}.")
    enough = max(OTHER_TRAIN_IMAGES, voc.FOLDS * len(train_set.classes))
    count = args.train_images or (len(train_set) if is_voc else min(len(train_set), enough))
    train_images = draw_images(train_set, count, args.seed)
    val_images = torch.arange(len(val_set))
    targets, val_targets = one_vs_rest(train_set, train_images), one_vs_rest(val_set, val_images)
    with distributed.raise_everywhere():
        check_targets(targets, train_set)
        samples = choose_shots(args, targets)
    for label, positives in zip(val_set.classes, (val_targets == 1).sum(0).tolist()):
        if positives == 0:
            print_main(f"{val_set.root} has no image of class {label!r}: its average precision "
                       "counts as 0")

    shapes = map_shapes(network.backbone, network.image_size)
    pools = map_pools(shapes)
    chosen = [i for i, name in enumerate(MAP_NAMES) if name in (args.maps or MAP_NAMES)]
    dims = [pools[i](torch.zeros(shapes[i])).numel() for i in chosen]
    transform = network.transform
    if is_voc:
        resize = evaluation_transform(network.image_size).keywords["resize"]
        transform = functools.partial(resize_exact, size=network.image_size, resize=resize)

    def pooled_maps(images):
        """[B, 3, S, S] -> the chosen maps, each of about unit length, beside each other."""
        maps = network.maps(images)
        rows = [pools[i](maps[i]).flatten(1) for i in chosen]
        return torch.cat([x / (x.norm(dim=1, keepdim=True) + 1e-5) for x in rows], dim=1)

    def features(dataset, images, name):
        """Rows of all images for each chosen map, on the CPU."""
        cache = network.cache(args.features_cache, dataset, transform, "pooled maps", chosen,
                              images.tolist())
        rows = extract(pooled_maps, dataset, transform, sum(dims), network.device, args.batch_size,
                       network.workers, cache, name, images)
        return [distributed.all_gather_uneven_rows(part).cpu() for part in rows.split(dims, dim=1)]

    drawn = "published" if args.low_shot_targets else f"{voc.SAMPLES} drawn"
    print_main(f"protocol {protocol}: {count:,} train images, {drawn} low-shot samples")
    train, val = features(train_set, train_images, "train"), features(val_set, val_images, "val")
    val_targets[~network.readable()] = 0  # as difficult ones, they do not count
    kept = readable(train_set)[train_images]
    if not kept.all():
        print_main(f"{int((~kept).sum())} of {count:,} train images cannot be read; they are left "
                   "out")
        train, targets, count = [rows[kept] for rows in train], targets[kept], int(kept.sum())
        with distributed.raise_everywhere():
            check_targets(targets, train_set)
            samples = ({k: [sample[kept] for sample in of_k] for k, of_k in samples.items()}
                       if args.low_shot_targets else choose_shots(args, targets))

    full = {}
    for i, train_rows, val_rows in zip(chosen, train, val):
        launch.check_signals()
        result = voc.full_svm(train_rows.to(network.device), targets, val_rows.to(network.device),
                              val_targets)
        full[MAP_NAMES[i]] = result
        print_main(f"{MAP_NAMES[i]}: mAP {100 * result.mean_average_precision:.2f}"
                   f"{unconverged(result)}")
    best = max(full, key=lambda name: full[name].mean_average_precision)
    at = list(full).index(best)
    launch.check_signals()
    shots = voc.low_shot(train[at].to(network.device), samples, val[at].to(network.device),
                         val_targets) if samples else []
    for result in shots:
        if result.unconverged:
            print_main(f"k = {result.k}{unconverged(result)}")

    row = {"Best Layer": best, "SVM": 100 * full[best].mean_average_precision}
    row |= {f"k={result.k}": 100 * result.mean_average_precision for result in shots}
    published = None
    if (len(train_images) == len(train_set) and len(chosen) == len(MAP_NAMES)
            and tables.VOC07_SVM.is_comparable(train_set, val_set, network.backbone,
                                               network.image_size)):
        published = tables.VOC07_SVM
    tables.write_json(args.output, dict(
        script="eval_svm", protocol=protocol, **network.description(), train_images_used=count,
        seed=args.seed, low_shot_samples=args.low_shot_targets or "drawn", results=row,
        full={name: dict(mAP=100 * r.mean_average_precision, unconverged=r.unconverged, classes={
            label: dict(AP=100 * ap, cost=cost) for label, ap, cost in
            zip(train_set.classes, r.average_precision.tolist(), r.costs)})
            for name, r in full.items()},
        low_shot={f"k={r.k}": dict(mAP=100 * r.mean_average_precision,
                                   standard_deviation=100 * r.deviation, cost=r.cost,
                                   unconverged=r.unconverged) for r in shots},
        published=tables.published_rows(published)))
    tables.show(f"{protocol} on {train_set.name} (mAP, %)", list(row), {network.label(args): row},
                published)


if __name__ == "__main__":
    launch.run_program(main)
