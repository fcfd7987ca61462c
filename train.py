"""Online Deep Clustering (Zhan et al., CVPR 2020): learn a ResNet from images without labels.

    torchrun --nproc_per_node=8 train.py --data /path/to/imagenet     the published recipe
    torchrun --nproc_per_node=2 train.py                              a demonstration in minutes

The method is `train_epoch` below and odc/memory.py. `main` sets it up, in the order in which things
happen. odc/settings.py has the arguments, whose defaults are the published recipe's.
"""

import copy
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from odc import distributed, settings
from odc.clusters import cluster_images
from odc.data.augmentation import Augmentation, augment_batch, evaluation_transform
from odc.data.datasets import check_same_images, open_dataset
from odc.data.loader import (
    check_unreadable, gather_unreadable, steps_per_epoch, training_batches)
from odc.distributed import all_gather_rows, print_main, share_statistics
from odc.errors import Interrupted, UserError
from odc.evaluation import knn, metrics
from odc.evaluation.weights import load_pretrained
from odc.features import extract, pixel_features, save_rows
from odc.kmeans import kmeans
from odc.memory import ODCMemory
from odc.model import ODC, use_small_stem
from odc.outputs import export, report
from odc.runtime import checkpoint, launch
from odc.runtime.log import Log, print_settings, progress_bar


@dataclass
class Progress:
    """Where a run stands. A checkpoint holds this, the network, the optimizer and the memory."""

    epoch: int = 0  # epochs that are done
    step: int = 0  # steps that are done of the epoch after them
    global_step: int = 0  # steps of all epochs
    reclustered_at: int = 0  # `epoch` when all images were last clustered; 0: at the start
    failed: list = field(default_factory=list)  # images that could not be read, ascending
    interval: dict = field(default_factory=lambda: dict(  # sums since the last line of the log
        steps=0, loss=0.0, change_ratio=0.0, splits=0))


@dataclass
class State:
    """All that learns or remembers. A checkpoint holds it."""

    network: ODC
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    memory: ODCMemory
    progress: Progress
    labels_before: torch.Tensor | None = None  # [N], at the end of the epoch before
    final_clusters: dict | None = None  # neck and centroids for odc.assign, of `write_results`


def train_epoch(args, state, model, dataset, log, autocast):
    """One epoch of the paper's iteration, from step progress.step on.

    model: state.network, as it is or wrapped by DDP or torch.compile.
    """
    memory, optimizer, progress = state.memory, state.optimizer, state.progress
    epoch, device, began, timed = progress.epoch, memory.labels.device, time.monotonic(), 0
    steps = steps_per_epoch(len(dataset), args.batch_size)
    online = epoch >= args.offline_epochs  # else labels stay as the last k-means made them
    augmentation = Augmentation(min_scale=args.crop_scale, jitter=tuple(args.jitter))
    batches = iter(training_batches(
        dataset, augmentation, args.image_size, args.batch_size, args.seed, epoch, progress.step,
        args.workers, pin_memory=device.type == "cuda"))
    model.train()
    state.final_clusters = None  # out of date as soon as the weights change
    loss_weights = memory.loss_weights(args.reweight_power)
    bar = progress_bar(steps, f"epoch {epoch + 1}/{args.epochs}", initial=progress.step)

    for step in range(progress.step, steps):
        with distributed.raise_everywhere():  # an error of one process stops all
            batch = next(batches)  # B images of this process
        distributed.seed(args.seed, epoch, step)  # for dropout: a resumed run is the same run
        images = augment_batch(batch.images.to(device, non_blocking=True), batch.draws)
        images = images.contiguous(memory_format=torch.channels_last)  # [B, 3, S, S]
        labels = memory.labels[batch.indices.to(device, non_blocking=True)]  # [B]

        # 1. Features z [B, d] and logits [B, K], one for each cluster.
        with autocast:
            z, logits = model(images)
        # 2. Classify into the clusters as they were before this step.
        loss = F.cross_entropy(logits.float(), labels, weight=loss_weights)
        mean_loss, stop = check_step(args, progress, loss, batch.failed, dataset)
        # 3. Samples memory: features move towards z, labels follow (Eq. 1 and 2).
        change_ratio, splits = 0.0, 0
        if online:
            indices = all_gather_rows(batch.indices)  # [W * B], in rank order, on the CPU
            z = all_gather_rows(z.detach().float())  # [W * B, d]
            change_ratio = memory.update_samples(indices, z)
        # 4. Learn. DDP averages the gradients over the processes.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch + step / steps)
        optimizer.zero_grad()
        state.scaler.scale(loss).backward()
        state.scaler.step(optimizer)
        state.scaler.update()
        progress.global_step += 1
        if online:
            # 5. Centroids memory.
            if progress.global_step % args.centroids_interval == 0:
                memory.update_centroids()
            # 6. Small clusters are dissolved and refilled.
            splits = memory.split_small_clusters()
            # 7. Loss re-weighting: every cluster counts, however large.
            loss_weights = memory.loss_weights(args.reweight_power)

        progress.step, timed = step + 1, timed + 1
        for name, value in dict(steps=1, loss=mean_loss, change_ratio=change_ratio,
                                splits=splits).items():
            progress.interval[name] += value
        bar.update()
        if progress.global_step % args.log_interval == 0:
            now = time.monotonic()
            rate = timed * args.batch_size * distributed.world_size() / (now - began)
            log.write_steps(progress, steps, memory.cluster_sizes,
                            optimizer.param_groups[0]["lr"], rate)
            progress.interval = Progress().interval
            began, timed = now, 0
        if stop or (step + 1 < steps and progress.global_step % args.checkpoint_interval == 0):
            save(args, state, dataset, log)
        if stop:
            raise Interrupted(f"Stopped in epoch {epoch + 1} after step {step + 1}, as a signal "
                              "asked; the same command continues.")
    bar.close()


def learning_rate(args, epoch):
    """The learning rate at a place in the run, in epochs."""
    if args.lr_schedule == "cosine":  # from lr to 0
        return args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    return args.lr * args.lr_gamma ** sum(epoch >= drop for drop in args.lr_steps)


def check_step(args, progress, loss, failed, dataset):
    """Exchange what every process must know of a step: (mean loss, whether a signal asks to stop).

    failed: indices of unreadable images, -1 elsewhere. Raises UserError on every process if the
    loss is not finite anywhere, or if too many images are unreadable.
    """
    failed = failed[failed >= 0]
    loss, num_failed, stop = distributed.all_reduce(torch.tensor(
        [float(loss.detach()) / distributed.world_size(), len(failed),
         launch.signal_is_pending()], dtype=torch.float64)).tolist()
    if not math.isfinite(loss):
        raise UserError(f"The loss is {loss} at epoch {progress.epoch + 1}, step "
                        f"{progress.step + 1}; {Path(args.output, 'checkpoint.pth')} is from "
                        "before that. Start again with a lower --lr or --amp off, in another "
                        "--output.")
    if num_failed:
        failed = distributed.all_gather_uneven_rows(failed.cpu()).tolist()
        progress.failed = sorted({*progress.failed, *failed})
        check_unreadable(len(progress.failed), dataset)
    return loss, bool(stop)


def cluster_everything(args, state, dataset, autocast):
    """Features of all images, k-means, both memories, a new head (paper, before the first step)."""
    network, memory = state.network.eval(), state.memory
    device, transform = memory.labels.device, evaluation_transform(args.image_size)
    with autocast:
        features = extract(
            lambda images: F.normalize(network.neck(network.backbone(images)[-1]).float()),
            dataset, transform, args.feature_dim, device, args.batch_size, args.workers)
    state.progress.failed = gather_unreadable(dataset)
    seen = features if args.initial == "network" else pixel_features(
        dataset, transform, args.image_size, device, args.batch_size, args.workers)
    labels, _ = kmeans(seen, args.num_clusters, args.kmeans_iterations, args.seed)
    memory.initialize(features, distributed.all_gather_uneven_rows(labels))
    state.labels_before = memory.labels.cpu().clone()
    torch.manual_seed(args.seed + 1)
    network.reset_head()


def recluster(args, state, dataset):
    """Both memories from all unaugmented images again; the head stays. Ours, not in the paper."""
    clustering = current_clustering(args, state, dataset)
    state.memory.initialize(clustering.features, clustering.labels)
    state.progress.reclustered_at = state.progress.epoch


def current_clustering(args, state, dataset):
    """The `Clustering` of the unaugmented images, by the current network."""
    clustering = cluster_images(
        state.network, dataset, state.memory.labels, args.num_clusters, args.min_cluster_size,
        args.image_size, args.batch_size, args.workers)
    state.progress.failed = sorted({*state.progress.failed, *gather_unreadable(dataset)})
    return clustering


def end_epoch(args, state, dataset, held_out, log, autocast):
    """Measure and save after an epoch; keep copies at their interval."""
    progress, memory, output = state.progress, state.memory, Path(args.output)
    epoch, record = progress.epoch + 1, {}
    share_statistics(state.network)
    if is_due(args.knn_interval, epoch):
        try:
            record["knn_accuracy"] = knn_accuracy(args, state, dataset, held_out, autocast)
        except Interrupted:  # the steps are done, and the next start measures
            save(args, state, dataset, log)
            raise Interrupted(f"Stopped at the end of epoch {epoch}, as a signal asked; the same "
                              "command continues.") from None
    progress.epoch, progress.step = epoch, 0
    record["nmi_previous"] = metrics.nmi(memory.labels.cpu(), state.labels_before)
    state.labels_before = memory.labels.cpu().clone()
    log_measures(log, progress, memory.labels, dataset, f"epoch {epoch}", record)
    with distributed.raise_everywhere():
        if distributed.is_main():
            if is_due(args.save_interval, epoch):
                export.save_backbone(output / f"backbone_epoch_{epoch}.pth", state.network.backbone)
                export.save_array(output / f"labels_epoch_{epoch}.npy", memory.labels.cpu())
            if not args.gallery_interval:
                report.save(output)
    save(args, state, dataset, log)


def write_results(args, state, dataset, log):
    """Cluster all images by the current network, and write what people and programs read."""
    output, clustering = Path(args.output), current_clustering(args, state, dataset)
    if state.final_clusters is None:  # trained since the last call: not logged yet
        mean = metrics.mean_silhouette(clustering.features, clustering.labels, clustering.centroids)
        log_measures(log, state.progress, clustering.labels, dataset,
                     f"epoch {state.progress.epoch}, final clusters", dict(silhouette=mean))
    state.final_clusters = dict(neck=clustering.neck.state_dict(), centroids=clustering.centroids)
    save_rows(output / "features.npy", clustering.features, len(dataset), f"--output {output}")
    with distributed.raise_everywhere():
        if distributed.is_main():
            clustering.features = np.load(output / "features.npy", mmap_mode="r")
            export.save_all(args, state.network.backbone, dataset, clustering, state.progress)


def is_due(interval, epoch):
    """True if something that happens every `interval` epochs (0: never) happens after this one."""
    return interval > 0 and epoch > 0 and epoch % interval == 0


def knn_accuracy(args, state, dataset, held_out, autocast):
    """Nearest-neighbour accuracy of the backbone on held-out images, in 0..1."""
    with autocast:
        return knn.knn_accuracy(state.network.eval().backbone, dataset, held_out, args.image_size,
                                state.memory.labels.device, args.batch_size, args.workers)


def log_measures(log, progress, labels, dataset, when, record):
    """Log a record, and how well labels [N] of clusters agree with the true classes."""
    if dataset.labels is not None:
        measures, line = metrics.agreement(labels.cpu(), dataset.labels)  # clusters, classes
        record = {**measures, **record}
        print_main(f"{when}: {line}")
    if "knn_accuracy" in record:
        print_main(f"{when}: nearest-neighbour accuracy {record['knn_accuracy']:.1%}")
    if record:
        log.write(epoch=progress.epoch, step=progress.global_step, **record)


def save(args, state, dataset, log, **kept):
    """Write the checkpoint. kept: parts of it that stay as they were. A collective."""
    path, network, progress = Path(args.output, "checkpoint.pth"), state.network, state.progress
    progress.interval["change_ratio"] = float(progress.interval["change_ratio"])  # off the device
    with distributed.raise_everywhere():
        if not all(torch.isfinite(value).all() for value in network.parameters()):
            raise UserError(f"The weights are not finite after step {progress.global_step}; {path} "
                            "is from before that. Start again with a lower --lr or --amp off, in "
                            "another --output.")
    checkpoint.save_run(path, dict(
        program=checkpoint.PROGRAM, settings=vars(args),
        global_batch=args.batch_size * distributed.world_size(),
        data=dict(num_images=len(dataset), fingerprint=dataset.fingerprint),
        arch=args.arch, small_stem=network.backbone.small_stem,
        backbone=network.backbone.state_dict(), neck=network.neck.state_dict(),
        head=network.head.state_dict(), optimizer=state.optimizer.state_dict(),
        scaler=state.scaler.state_dict(), memory=state.memory.state_dict(),
        labels_before=state.labels_before, final_clusters=state.final_clusters,
        progress=asdict(progress),
        log_position=log.position(),
    ) | kept, state.memory.features, len(dataset))


def restore(args, state, saved, dataset):
    """Continue from the checkpoint `saved`, with any number of processes."""
    network, memory = state.network, state.memory
    for name in ("backbone", "neck", "head"):
        getattr(network, name).load_state_dict(saved[name])
    state.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # off the mapped file
    state.scaler.load_state_dict(saved["scaler"])
    with distributed.raise_everywhere():
        features = checkpoint.load_rows(Path(args.output, "checkpoint.pth"), saved, memory.rows)
    memory.load_state_dict(saved["memory"], features)
    state.labels_before = saved["labels_before"].clone()
    state.final_clusters = saved["final_clusters"]
    progress = state.progress = Progress(**saved["progress"])
    # With another number of processes a step has another size: take the nearest whole one but 0.
    done, size = progress.step * saved["global_batch"], args.batch_size * distributed.world_size()
    if not args.export_only:
        whole = steps_per_epoch(len(dataset), args.batch_size)
        progress.step = whole if done >= len(dataset) else max(round(done / size), min(done, 1))
    print_main(
        f"Continuing {args.output} in epoch {progress.epoch + 1} after step {progress.step}."
        if progress.epoch < args.epochs else f"{args.output} holds the finished run.")


def main(arguments=None):
    # Process group and device.
    args, given = settings.parse(arguments)
    device, output = distributed.init(args.device), Path(args.output)
    launch.catch_signals()

    # Data, and the checkpoint of an earlier start.
    with distributed.raise_everywhere():
        dataset = open_dataset(args.data, "train", args.background)
    saved, lock = checkpoint.open_run(output)  # the lock ends with this function
    check_same_images(dataset)
    settings.follow_data(args, given, dataset, saved, device)
    print_settings(vars(args))
    settings.check(args, dataset, saved, device)
    held_out = knn.open_held_out(args.data, dataset) if args.knn_interval else None

    # Network and optimizer.
    torch.manual_seed(args.seed)
    network = ODC(args.arch, use_small_stem(args.image_size), dim=args.feature_dim,
                  num_clusters=args.num_clusters)
    if args.weights and not saved:
        with distributed.raise_everywhere():
            print_main(load_pretrained(network.backbone, args.weights, args.image_size))
    network.to(device, memory_format=torch.channels_last)
    if device.type == "cuda" and distributed.world_size() > 1:  # batch norm over all processes
        convert = torch.nn.SyncBatchNorm.convert_sync_batchnorm
        network.backbone = convert(network.backbone)
        if args.neck_norm == "synchronised":
            network.neck = convert(network.neck)
    optimizer = torch.optim.SGD([
        {"params": [*network.backbone.parameters(), *network.neck.parameters()]},
        {"params": network.head.parameters(), "momentum": 0.0},
    ], lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    half = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=args.amp != "off")

    # Both memories: from the checkpoint, or from k-means of the first features.
    memory = ODCMemory(len(dataset), args.feature_dim, args.num_clusters, args.memory_momentum,
                       args.min_cluster_size, device)
    state = State(network, optimizer, scaler, memory, Progress())
    if saved:
        restore(args, state, saved, dataset)
    with distributed.raise_everywhere():
        log = Log(output / "log.jsonl", saved["log_position"] if saved else 0, args.tensorboard,
                  state.progress.global_step + 1)
    if not saved:
        cluster_everything(args, state, dataset, autocast)
        record = {}
        if args.knn_interval:
            record["knn_accuracy"] = knn_accuracy(args, state, dataset, held_out, autocast)
        log_measures(log, state.progress, memory.labels, dataset, "initial k-means", record)
        save(args, state, dataset, log)
    # After --export-only the run may go on as if nothing had happened.
    parts = ("settings", "global_batch") if args.export_only else ()
    kept = {name: saved[name] for name in parts}
    del saved

    # Gradients are averaged over the processes.
    model = network
    if distributed.world_size() > 1:
        model = DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # see share_statistics; as an argument it gives a warning
        # DDP sorts its buckets by the first backward pass and adds in another order from then on.
        # Let that happen now: the first step of a resumed run then adds as without the stop.
        model.eval()
        z, logits = model(torch.zeros(2, 3, args.image_size, args.image_size, device=device))
        (z.sum() + logits.sum()).backward()
        optimizer.zero_grad()
    model = torch.compile(model) if args.compile else model

    while (epoch := state.progress.epoch) < args.epochs and not args.export_only:
        due = is_due(args.gallery_interval, epoch) and not state.final_clusters
        if due and state.progress.step == 0:
            write_results(args, state, dataset, log)
            save(args, state, dataset, log)
        due = is_due(args.recluster_interval, epoch) or epoch == args.offline_epochs
        if due and state.progress.reclustered_at != epoch:
            recluster(args, state, dataset)
            save(args, state, dataset, log)
        train_epoch(args, state, model, dataset, log, autocast)
        end_epoch(args, state, dataset, held_out, log, autocast)
    write_results(args, state, dataset, log)
    save(args, state, dataset, log, **kept)
    print_main(f"Done: backbone.pth, clusters.csv, clusters.png and report.html are in {output}.")


if __name__ == "__main__":
    launch.run_program(main)
