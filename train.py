"""Online Deep Clustering (Zhan et al., CVPR 2020): learn a ResNet from images without labels.

    torchrun --nproc_per_node=8 train.py --data /path/to/imagenet     the published recipe
    torchrun --nproc_per_node=2 train.py                              a demonstration in minutes

The method is `train_epoch` and odc/memory.py. odc/settings.py has the arguments and the presets.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from odc import distributed, settings
from odc.clusters import Clustering, cluster_images, cosine_to_centroid, neck_features, stabilities
from odc.data.augmentation import AUGMENTATIONS, augment_batch, clustering_transform
from odc.data.datasets import check_same_images, open_dataset
from odc.data.loader import steps_per_epoch, training_batches
from odc.distributed import all_gather_rows, print_main, share_statistics
from odc.errors import Interrupted, UserError
from odc.evaluation import knn, metrics
from odc.evaluation.weights import load_backbone
from odc.features import extract, unit_pixels, write_rows
from odc.kmeans import kmeans
from odc.memory import ODCMemory
from odc.model import FEATURE_DIM, ODC, CentredPool
from odc.outputs import page, results
from odc.runtime import checkpoint, launch
from odc.runtime.log import Log, print_end, print_settings, progress_bar
from odc.state import Progress, State, restore, save

LOG_INTERVAL = 50  # steps between two lines of the log, besides one at the end of each epoch


def train_epoch(args, state, model, dataset, log, autocast):
    """One epoch of the paper's iteration, from progress.step on. model: the network or its DDP."""
    memory, optimizer, progress = state.memory, state.optimizer, state.progress
    epoch, device, began, timed = progress.epoch, memory.labels.device, time.monotonic(), 0
    B = args.batch_size // distributed.world_size()
    steps = steps_per_epoch(len(dataset), B)
    # Labels move in the steps; if not, they stay as the last k-means made them.
    online = args.memory_momentum > 0 and epoch >= progress.offline_epochs
    batches = iter(training_batches(
        dataset, AUGMENTATIONS[args.augmentation], args.image_size, B, args.seed, epoch,
        progress.step, args.workers, device.type == "cuda", args.crops))
    model.train()
    state.final_clusters = None  # out of date as soon as the weights change
    loss_weights = memory.loss_weights(args.reweight_power)
    bar = progress_bar(args.epochs * steps, f"epoch {epoch + 1}/{args.epochs}",
                       initial=epoch * steps + progress.step)

    for step in range(progress.step, steps):
        try:
            with distributed.raise_everywhere():  # an error of one process stops all
                batch = next(batches)  # B images of this process
        except (UserError, Interrupted):  # an image or a worker is gone: save the steps so far
            save(state, dataset, log)
            raise
        distributed.seed(args.seed, epoch, step)  # dropout: a resumed run is the same
        images = augment_batch(batch.images.to(device, non_blocking=True), batch.draws)
        images = images.contiguous(memory_format=torch.channels_last)  # [B, 3, S, S]
        labels = memory.labels[batch.indices.to(device, non_blocking=True)]  # [B]

        # 1. Features z [B, d] and logits [B, K], one for each cluster.
        with autocast:
            z, logits = model(images)
        # 2. Classify into the clusters as they were before this step.
        loss = F.cross_entropy(logits.float(), labels, weight=loss_weights)
        mean_loss, stop = check_step(args, progress, loss)
        # 3. Samples memory: features move towards z, labels follow (Eq. 1 and 2).
        moved, splits = 0.0, 0
        if online:
            z = z.detach().float()
            if args.crops > 1:  # the memory takes the mean of an image's crops
                z = F.normalize(z).unflatten(0, (-1, args.crops)).mean(1)
            # In rank order: [M] on the CPU, and [M, d].
            indices, z = all_gather_rows(batch.indices[:: args.crops]), all_gather_rows(z)
            moved = memory.update_samples(indices, z)
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
        for key, value in dict(steps=1, loss=mean_loss, change_ratio=moved, splits=splits).items():
            progress.interval[key] += value
        bar.update()
        if progress.global_step % LOG_INTERVAL == 0 or step + 1 == steps:
            now = time.monotonic()
            rate = timed * args.batch_size / (now - began)
            log.write_steps(progress, steps, memory.cluster_sizes,
                            optimizer.param_groups[0]["lr"], rate)
            progress.interval = Progress().interval
            if progress.global_step == LOG_INTERVAL:
                left = args.epochs * steps - progress.global_step
                print_end(args.epochs, left * args.batch_size / rate)
            began, timed = now, 0
        if stop or (step + 1 < steps and progress.global_step % args.checkpoint_interval == 0):
            save(state, dataset, log)
        if stop:
            raise Interrupted(f"Stopped in epoch {epoch + 1} after step {step + 1}, as a signal "
                              "asked; the same command continues.")
    bar.close()


def learning_rate(args, epoch):
    """The learning rate at a place in the run, in epochs."""
    return args.lr * (0.4 if epoch >= args.epochs * 400 / 440 else 1)  # the recipe's drop


def check_step(args, progress, loss):
    """Mean loss, and whether to stop. A collective. Raises UserError if the loss is not finite."""
    loss, stop = distributed.all_reduce(torch.tensor(
        [float(loss.detach()) / distributed.world_size(), launch.signal_is_pending()],
        dtype=torch.float64)).tolist()
    if not math.isfinite(loss):
        raise UserError(f"The loss is {loss} at epoch {progress.epoch + 1}, step "
                        f"{progress.step + 1}; {Path(args.output, 'checkpoint.pth')} is from "
                        "before that. Start again with a lower --lr or --amp off, in another "
                        "--output.")
    return loss, bool(stop)


def cluster_before_training(args, state, dataset, device, autocast):
    """K-means, both memories, a new head (paper). Unreadable images leave the dataset."""
    network = state.network.eval()
    width = {"network": 0, "pixels": 3 * min(args.image_size, 32) ** 2,
             "backbone": network.backbone.out_channels[-1]}[args.initial]

    def forward(images):
        with autocast:
            last_map = network.backbone(images)[-1]
            features = F.normalize(network.neck(last_map).float())
        pixels = args.initial == "pixels"
        others = unit_pixels(images) if pixels else last_map.mean((2, 3)).float()
        return torch.cat([features, others[:, :width]], dim=1)
    rows = extract(forward, dataset, clustering_transform(args.image_size, dataset.whole_images),
                   FEATURE_DIM + width, device, workers=args.workers)
    features, others = rows[:, :FEATURE_DIM], rows[:, FEATURE_DIM:]
    if args.initial == "backbone":
        others = neck_features(CentredPool(width).to(device), others, len(dataset))
    rows = others if width else features
    own_labels, centroids = kmeans(rows, args.num_clusters, seed=args.seed)
    labels, similarity = map(distributed.all_gather_uneven_rows, (
        own_labels, cosine_to_centroid(rows, centroids, own_labels)))
    state.memory = make_memory(args, dataset, device)
    state.memory.initialize(features, labels)
    torch.manual_seed(args.seed + 1)
    network.reset_head()
    return Clustering(labels.cpu(), similarity.cpu(), centroids.cpu())


def make_memory(args, dataset, device):
    """Both memories, empty, for the images that can be read."""
    return ODCMemory(len(dataset), FEATURE_DIM, args.num_clusters, args.memory_momentum,
                     args.min_cluster_size, device)


def pixels_lead(args, progress):
    """Whether the clusters of the pixels stay until those of the network are more stable."""
    return args.initial == "pixels" and progress.epoch < progress.offline_epochs < args.epochs


def cluster_between_epochs(args, state, dataset):
    """Both memories from all unaugmented images again; the head stays. Ours, not in the paper."""
    progress = state.progress
    progress.reclustered_at = progress.epoch
    if pixels_lead(args, progress):
        network, pixels = stabilities(state.network.backbone, dataset, [args.image_size],
                                      args.num_clusters, args.workers)
        print_main(f"epoch {progress.epoch}: stability {network:.3f}, of pixels {pixels:.3f}")
        if network <= pixels:
            return
        progress.offline_epochs = progress.epoch  # labels move from now on
    clustering = cluster_images(state.network, dataset, state.memory, args.image_size, args.workers,
                                args.neck == "plain")
    features = neck_features(state.network.neck.eval(), clustering.pooled, len(dataset))
    state.memory.initialize(features, clustering.labels)


def cluster_after_training(args, state, dataset, log):
    """Cluster all images by the current network, save, and write what people and programs read."""
    output, size, parts, note, record = Path(args.output), args.image_size, False, "", {}
    if args.preset == "small" and not args.pretrained and len(dataset) > 40:
        # The network knows enlarged parts. Photographs gain if enlarged, letters by such parts.
        *ours, pixels = stabilities(state.network.backbone, dataset, [size, 2 * size],
                                    args.num_clusters, args.workers)
        network, size = max(zip(ours, (size, 2 * size)), key=lambda pair: pair[0])
        parts = size == args.image_size
        record = dict(stability=network, stability_of_pixels=pixels)
        advice = "" if network > pixels else ": learn longer, or start with --pretrained"
        note = (f". Clusters of two halves of the images agree by {network:.2f} (NMI), seen at "
                f"{size} pixels, those of raw pixels by {pixels:.2f}{advice}.")
        print_main(note[2:])
    clustering = cluster_images(state.network, dataset, state.memory, size, args.workers,
                                args.neck == "plain" or state.progress.global_step == 0, parts)
    if state.final_clusters is None:  # trained since the last call: not logged yet
        log.write_measures(state.progress, clustering.labels, dataset,
                           f"epoch {state.progress.epoch}, final clusters", record)
    state.final_clusters = dict(neck=clustering.neck.state_dict(), centroids=clustering.centroids,
                                image_size=size, parts=parts, whole_images=dataset.whole_images)
    save(state, dataset, log)
    write_rows(output / "features.npy", clustering.features, len(dataset))
    with distributed.raise_everywhere():
        if distributed.is_main():
            clustering.features = np.load(output / "features.npy", mmap_mode="r")
            results.write_results_files(output, state.network.backbone, args.image_size, dataset,
                                        clustering, args.workers)
            page.write_page(output, dataset, clustering, args.workers, note)


def measure(args, state, dataset, held_out, log):
    """Measure network and clusters between epochs, and renew the page. What fails is a warning."""
    progress, memory, record = state.progress, state.memory, {}
    epoch, when = progress.epoch, f"epoch {progress.epoch}" if progress.epoch else "initial k-means"
    try:
        if held_out and epoch % max(1, args.epochs // 5) == 0:
            record["knn_accuracy"] = knn.knn_accuracy(
                state.network.eval().backbone, *held_out, args.image_size, args.workers)
        if epoch:
            record["nmi_previous"] = metrics.nmi(memory.labels.cpu(), state.labels_before)
        log.write_measures(progress, memory.labels, dataset, when, record)
        with distributed.raise_everywhere():
            if distributed.is_main() and epoch:
                page.write_page(Path(args.output))
    except UserError as error:
        print_main(f"warning: {when}: {error}")
    state.labels_before = memory.labels.cpu().clone()
    progress.measured = epoch


def main(arguments=None):
    # Process group and device.
    args = settings.parse(arguments)
    device, output = distributed.init(args.device), Path(args.output)
    launch.catch_signals()

    # Data, and the checkpoint of an earlier start.
    with distributed.raise_everywhere():
        dataset = open_dataset(args.data, "train", exclude=(args.output,))
    saved, lock = checkpoint.open_run(output)  # the lock lasts as long as this function
    check_same_images(dataset)
    pretrained = None
    for turn in (0, 1) if args.pretrained and not saved else ():
        with distributed.raise_everywhere():
            if turn == min(distributed.rank(), 1):  # process 0 first: it may download the file
                pretrained, said = load_backbone(args.pretrained, args.arch, option="--pretrained")
                print_main(said)
    settings.resolve_defaults(args, dataset, saved, device, pretrained)
    print_settings(vars(args))
    settings.validate(args, dataset, saved, device)

    # Network and optimizer.
    torch.manual_seed(args.seed)
    small_stem = saved["small_stem"] if saved else settings.has_small_stem(args, pretrained)
    network = ODC(args.arch, small_stem, num_clusters=args.num_clusters,
                  plain_neck=args.neck == "plain")
    if pretrained is not None:
        network.backbone.load_state_dict(pretrained.state_dict())
    if device.type == "cuda" and distributed.world_size() > 1:  # torch has none for CPUs
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([
        {"params": [*network.backbone.parameters(), *network.neck.parameters()]},
        {"params": network.head.parameters(), "momentum": 0.0}],
        lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    half = torch.float16 if args.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=args.amp != "off")

    # Both memories: from the checkpoint, or from k-means of the first features.
    only_export = saved is not None and args.epochs == 0
    run_settings = saved["settings"] if only_export else vars(args)
    state = State(network, optimizer, scaler, run_settings, output / "checkpoint.pth")
    if saved:
        dataset.leave_out(saved["unreadable"])
        state.memory = make_memory(args, dataset, device)
        restore(state, saved)
    progress = state.progress
    if run_settings["epochs"] and args.preset == "small" and dataset.pixels is None:
        with distributed.raise_everywhere():
            largest = args.image_size * 3 // 2 if args.pretrained else 2 * args.image_size
            dataset.keep_small_copies(max(128, largest))
    with distributed.raise_everywhere():
        log = Log(output / "log.jsonl", saved["log_position"] if saved else 0, args.tensorboard)
    if not saved:
        if args.initial != "network":  # labels of features that the memory does not have
            progress.offline_epochs = args.recluster_interval
        clustering = cluster_before_training(args, state, dataset, device, autocast)
        with distributed.raise_everywhere():
            if dataset.left_out and distributed.is_main():
                results.write_unreadable(output / "unreadable.txt", dataset.left_out)
        save(state, dataset, log)
        with distributed.raise_everywhere():
            if distributed.is_main() and args.epochs:  # else the page of the end comes at once
                page.write_page(output, dataset, clustering, args.workers, ", before the training")
    elif progress.epoch >= args.epochs:
        print_main(f"{output} holds a run of {progress.epoch} epochs.")
    else:
        print_main(f"Continuing {output} in epoch {progress.epoch + 1} after step {progress.step}.")
    del saved
    held_out = knn.open_held_out(args.data, dataset) if dataset.labels is not None else None

    # Gradients are averaged over the processes.
    model = network
    if distributed.world_size() > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True)
        model.broadcast_buffers = False  # see share_statistics; as an argument it gives a warning
        # DDP's first backward pass reorders later sums. Do it now: a resumed run is then the same.
        model.eval()
        z, logits = model(torch.zeros(2, 3, args.image_size, args.image_size, device=device))
        (z.sum() + logits.sum()).backward()
        optimizer.zero_grad()

    while not only_export:
        if progress.step == 0 and progress.measured < progress.epoch:
            measure(args, state, dataset, held_out, log)
        if progress.epoch >= args.epochs:
            break
        due = progress.epoch > 0 and args.recluster_interval > 0 and (
            progress.epoch % args.recluster_interval == 0 or pixels_lead(args, progress))
        if due and progress.reclustered_at != progress.epoch:
            cluster_between_epochs(args, state, dataset)
            save(state, dataset, log)
        train_epoch(args, state, model, dataset, log, autocast)
        progress.epoch, progress.step = progress.epoch + 1, 0
        share_statistics(network)
        save(state, dataset, log)
    cluster_after_training(args, state, dataset, log)
    print_main(f"Done: backbone.pth, clusters.csv and report.html are in {output}.")


if __name__ == "__main__":
    launch.run_program(main)
