"""Linear SVMs on frozen feature maps: VOC07 classification, full and low-shot.

    python eval_svm.py --weights out/backbone.pth --data shapes
    python eval_svm.py --weights backbone.pth --data /path/to/VOCdevkit \\
        --low-shot-targets voc07_low_shot_targets.zip

The protocol of ODC's published numbers: one-vs-rest SVMs on each of the five pooled maps, costs by
3-fold cross-validation; the map with the best mAP counts. Classes of too few images are left out.
"""

import functools

import torch

from odc import distributed
from odc.data.augmentation import evaluation_transform, resize_exact
from odc.distributed import print_main
from odc.errors import UserError
from odc.evaluation import frozen_backbone, tables, voc
from odc.evaluation.pooling import MAP_NAMES, map_pools, map_shapes
from odc.features import extract
from odc.runtime import launch
from odc.runtime.arguments import Parser, path, whole

OTHER_TRAIN_IMAGES = 2100  # of other data than VOC07: enough for k = 96 in 10 classes, and quick


def make_parser():
    parser = Parser(__doc__.splitlines()[0])
    groups = frozen_backbone.add_arguments(parser, batch_size=64)
    groups["data"].add_argument(
        "--train-images", metavar="N", type=whole(2), help="train on at most so many images, drawn "
        "from --seed, of all classes alike (default: all of VOC07, else "
        f"{OTHER_TRAIN_IMAGES}, or {voc.FOLDS} of each class)")
    groups["data"].add_argument(
        "--low-shot-targets", metavar="PATH", type=path, help="folder or zip file of the published "
        "target files train_targets_sample1_k1.npy ... (default: samples drawn from --seed)")
    return parser


def one_vs_rest(dataset):
    """Targets [N, classes] int8: 1, -1 and, in VOC07, 0 (difficult)."""
    if dataset.targets is not None:
        return dataset.targets
    return 2 * torch.nn.functional.one_hot(dataset.labels, len(dataset.classes)).to(torch.int8) - 1


def draw_images(dataset, count, seed):
    """Ascending indices of `count` images, as many of each class as far as they reach."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    if dataset.labels is not None:
        labels, number = dataset.labels[order], torch.empty_like(order)
        for label in labels.unique():  # number the images of each class, as drawn
            own = labels == label
            number[own] = torch.arange(int(own.sum()))
        order = order[number.argsort(stable=True)]
    return order[:count].sort().values


def classes_to_judge(targets, val_targets, names):
    """Indices of the classes with enough images; a line names the others. Raises UserError."""
    positives = (targets == 1).sum(0)
    enough = ((positives >= voc.FOLDS) & (len(targets) - positives >= voc.FOLDS)
              & (val_targets == 1).any(0))
    need = f"{voc.FOLDS} training images, {voc.FOLDS} of other classes, and a val image"
    if not enough.any():
        raise UserError(f"No class has {need}: give a larger --train-images, or other --data.")
    if without := [name for name, judged in zip(names, enough.tolist()) if not judged]:
        print_main(f"left out, as a class needs {need}: {', '.join(without)}")
    return enough.nonzero()[:, 0]


def main():
    args = make_parser().parse_args()
    network = frozen_backbone.prepare(args)
    train_set, val_set = network.train, network.val
    is_voc = train_set.name == "voc07"
    protocol = "VOC07 SVM and low-shot SVM" + ("" if is_voc else ", each class against the rest")
    enough = max(OTHER_TRAIN_IMAGES, voc.FOLDS * len(train_set.classes))
    count = args.train_images or (len(train_set) if is_voc else enough)
    network.train = train_set = train_set.take(draw_images(train_set, count, args.seed))
    if args.low_shot_targets:
        with distributed.raise_everywhere():
            samples = voc.read_low_shot_targets(args.low_shot_targets, len(train_set),
                                                len(train_set.classes))
    shapes = map_shapes(network.backbone, network.image_size)
    pools = map_pools(shapes)
    dims = [pool(torch.zeros(shape)).numel() for pool, shape in zip(pools, shapes)]
    transform = evaluation_transform(network.image_size)
    if is_voc:
        transform = functools.partial(resize_exact, size=network.image_size,
                                      resize=transform.keywords["resize"])

    def pooled_maps(images):
        """[B, 3, S, S] -> the five maps, each of about unit length, beside each other."""
        rows = [pool(x).flatten(1) for pool, x in zip(pools, network.backbone(images))]
        return torch.cat([x / (x.norm(dim=1, keepdim=True) + 1e-5) for x in rows], dim=1)

    def features(dataset, name):
        """{map: the rows of all images}, on the CPU."""
        rows = extract(pooled_maps, dataset, transform, sum(dims), network.device, args.batch_size,
                       network.workers, name=name)
        parts = map(distributed.all_gather_uneven_rows, rows.split(dims, dim=1))
        return {name: part.cpu() for name, part in zip(MAP_NAMES, parts)}

    print_main(f"protocol {protocol}: {len(train_set):,} train images")
    train, val = features(train_set, "train"), features(val_set, "val")
    if args.low_shot_targets and train_set.left_out:
        raise UserError("--low-shot-targets: the published samples need every training image; "
                        "repair the images named above, or leave this argument out.")
    targets, val_targets = one_vs_rest(train_set), one_vs_rest(val_set)
    judged = classes_to_judge(targets, val_targets, train_set.classes)
    names = [train_set.classes[c] for c in judged]
    targets, val_targets = targets[:, judged], val_targets[:, judged]
    if args.low_shot_targets:
        samples = {k: [sample[:, judged] for sample in of_k] for k, of_k in samples.items()}
    else:
        samples = voc.draw_low_shot_targets(targets, args.seed)
        if left_out := [str(k) for k in voc.SHOTS if k not in samples]:
            print_main(f"some class has too few images for low-shot k = {', '.join(left_out)}")
    full = {}
    for name in MAP_NAMES:
        launch.check_signals()
        precision, costs = voc.full_svm(train[name].to(network.device), targets,
                                        val[name].to(network.device), val_targets)
        full[name] = dict(mAP=100 * float(precision.mean()), classes={
            label: dict(AP=100 * ap, cost=cost)
            for label, ap, cost in zip(names, precision.tolist(), costs)})
        print_main(f"{name}: mAP {full[name]['mAP']:.2f}")
    best = max(full, key=lambda name: full[name]["mAP"])
    launch.check_signals()
    shots = {f"k={k}": dict(mAP=100 * float(precision.mean()), cost=cost,
                            standard_deviation=100 * float(precision.std(correction=0)))
             for k, (precision, cost) in voc.low_shot(
                 train[best].to(network.device), samples, val[best].to(network.device),
                 val_targets).items()}
    row = {"Best Layer": best, "SVM": full[best]["mAP"]}
    row |= {k: shot["mAP"] for k, shot in shots.items()}
    tables.write_json(args.output, dict(
        script="eval_svm", protocol=protocol, **network.description(), seed=args.seed,
        low_shot_samples=args.low_shot_targets or "drawn", results=row, full=full, low_shot=shots))
    published = tables.VOC07_SVM if len(names) == len(val_set.classes) else None
    tables.show(f"{protocol} on {train_set.name} (mAP, %)", list(row), {network.label(args): row},
                published and published.if_comparable(network))


if __name__ == "__main__":
    launch.run_program(main)
