"""Everything around the iteration of train.py: the data, the network, the log and the checkpoints of one run."""

import contextlib
import copy
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from odc.runtime import program
from odc import distributed
from odc.data import augmentation as augment
from odc.runtime import checkpoint
from odc.outputs import report as curves
from odc.outputs import export
from odc.evaluation import heldout
from odc.data import loader
from odc.evaluation import metrics
from odc.runtime import settings
from odc.evaluation import weights
from odc.data.augmentation import Augmentation
from odc.data.layouts import check_same_images, open_dataset
from odc.distributed import print_main
from odc.errors import Interrupted, UserError
from odc.features import extract_rows
from odc.kmeans import kmeans
from odc.memory import ODCMemory
from odc.model import ODC, use_small_stem
from odc.runtime.log import RunLog, plain_line, progress_bar


class Run:
    """args: the arguments of train.py. Opens, or continues, what lies in args.output. A collective, as every method
    is but `finish`."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.output = Path(args.output)
        with distributed.together():
            self.dataset = open_dataset(args.data, "train")
            self.state = self.open_output()
        self.check_same_files()
        settings.check(args, self.dataset, device, self.output, self.state)
        self.augmentation = Augmentation(min_scale=args.crop_scale, jitter=tuple(args.jitter))
        self.autocast = contextlib.nullcontext
        if args.amp != "off":
            dtype = torch.bfloat16 if args.amp == "bf16" else torch.float16
            self.autocast = lambda: torch.autocast(device.type, dtype=dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.steps = loader.steps_per_epoch(len(self.dataset), args.batch_size)
        self.global_batch = args.batch_size * distributed.world_size()
        self.epoch, self.first_step, self.global_step = 0, 0, 0  # where to go on
        self.clustered = 0  # the epoch before which k-means last made the clusters
        self.failed = set()  # images that could not be read, so far
        self.interval = {"steps": 0, "loss": 0.0, "change_ratio": 0.0, "splits": 0}  # since the last line of the log
        self.last_logged, self.steps_here = time.monotonic(), 0
        self.error = None  # why this process cannot go on, until the others know
        self.held_out = heldout.open_held_out(args.data, self.dataset) if args.knn_interval else None
        self.build_network()
        N = len(self.dataset)
        self.memory = ODCMemory(N, args.feature_dim, args.num_clusters, args.memory_momentum, args.min_cluster_size, device)
        if self.state:
            self.restore()
        else:
            self.open_log()
            self.cluster_everything(epoch=0)
        self.state = None
        self.wrap_network()
        self.last_logged = time.monotonic()

    # --- set-up ------------------------------------------------------------------------------------------------------

    def open_output(self):
        """The checkpoint in the output folder, or None; the folder is made, and must be writable."""
        self.output.mkdir(parents=True, exist_ok=True)
        if not os.access(self.output, os.W_OK):
            raise UserError(f"--output {self.output}: the folder is not writable; choose another.")
        path = self.output / "checkpoint.pth"
        if distributed.is_main():
            checkpoint.remove_temporary_files(self.output)
        return checkpoint.load(path) if path.exists() else None

    def check_same_files(self):
        """Every process must have the same arguments, and have found the same images and the same checkpoint."""
        check_same_images(self.dataset)
        arguments = {name: value for name, value in vars(self.args).items() if name not in ("data", "output", "workers")}
        if not distributed.same_everywhere(arguments):
            raise UserError("The processes have different arguments: start all machines with the same command.")
        if not distributed.same_everywhere(self.state and (self.state.get("global_step"), self.state.get("log_position"))):
            raise UserError(f"--output {self.output}: the processes see different checkpoints there; it must be a folder "
                            "that all machines share.")

    def build_network(self):
        args = self.args
        small_stem = use_small_stem(args.image_size)
        torch.manual_seed(args.seed)
        self.network = ODC(args.arch, small_stem, dim=args.feature_dim, num_clusters=args.num_clusters)
        if args.weights and not self.state:
            with distributed.together():
                backbone, description = weights.load_backbone(args.weights, args.arch, args.image_size, args.seed)
                if backbone.small_stem != small_stem:
                    raise UserError(f"--weights {args.weights}: its stem is for images of "
                                    f"{'more than' if small_stem else 'up to'} 64 pixels and --image-size is "
                                    f"{args.image_size}; change --image-size, or take other weights.")
            print_main(description)
            self.network.backbone.load_state_dict(backbone.state_dict())
        self.network.to(self.device, memory_format=torch.channels_last)
        if self.device.type == "cuda" and distributed.world_size() > 1:
            self.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        head = list(self.network.head.parameters())
        body = list(self.network.backbone.parameters()) + list(self.network.neck.parameters())
        self.optimizer = torch.optim.SGD([{"params": body}, {"params": head, "momentum": 0.0}], lr=args.lr, momentum=0.9,
                                         weight_decay=args.weight_decay)

    def wrap_network(self):
        """self.model: the network as the loop calls it, gradients averaged over the processes."""
        self.model = self.network
        if distributed.world_size() > 1:
            cuda = self.device.type == "cuda"
            self.model = DistributedDataParallel(self.network, device_ids=[self.device.index] if cuda else None)
            # DDP sorts its buckets by the first backward pass and adds in another order from then on. Let that happen
            # now, so that the first step of a resumed run adds in the same order as it would have without the stop.
            self.model.eval()
            size = self.args.image_size
            z, logits = self.model(torch.zeros(2, 3, size, size, device=self.device))
            (z.sum() + logits.sum()).backward()
            self.optimizer.zero_grad()
        if self.args.compile:
            self.model = torch.compile(self.model)

    def cluster_everything(self, epoch):
        """Before an epoch, usually only the first: features of all images, k-means, both memories, a new head."""
        args, before, began = self.args, self.memory.labels.cpu().clone(), time.monotonic()
        self.share_buffers()
        self.network.eval()
        with self.autocast():
            features = extract_rows(
                lambda images: self.network.neck(self.network.backbone(images)[-1]), self.dataset,
                augment.evaluation_transform(args.image_size), args.feature_dim, device=self.device,
                batch_size=args.batch_size, workers=args.workers)
        unreadable = torch.tensor(sorted(self.dataset.unreadable), dtype=torch.int64)
        self.failed.update(distributed.all_gather_uneven_rows(unreadable).tolist())
        features = F.normalize(features)
        labels, _ = kmeans(features, args.num_clusters, args.kmeans_iterations, args.seed + epoch)
        self.memory.initialize(features, distributed.all_gather_uneven_rows(labels))
        if epoch == 0:
            self.log_agreement(epoch, "initial k-means")
            if args.knn_interval:
                self.log_knn(epoch, self.knn_accuracy())
        else:
            agreement = metrics.nmi(self.memory.labels.cpu(), before)
            self.log_agreement(epoch, f"k-means after epoch {epoch}", nmi_previous=agreement)
        torch.manual_seed(args.seed + epoch + 1)
        self.network.reset_head()
        self.epoch, self.first_step, self.clustered = epoch, 0, epoch
        self.save()
        self.last_logged += time.monotonic() - began  # no training time

    def share_buffers(self):
        """Give all processes the main one's batch norm statistics, which DDP shares before a step, not after."""
        for buffer in self.network.buffers():
            distributed.broadcast(buffer)

    def open_log(self, position=0):
        with distributed.together():
            self.log = RunLog(self.output / "log.jsonl", position, self.args.tensorboard, self.global_step + 1)

    def restore(self):
        state = self.state
        for name in ("backbone", "neck", "head"):
            getattr(self.network, name).load_state_dict(state[name])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # or it would go on using the mapped file
        self.scaler.load_state_dict(state["scaler"])
        self.memory.load_state_dict(state["memory"])
        self.epoch, self.global_step, self.clustered = state["epoch"], state["global_step"], state["clustered"]
        # With another number of processes a step has another size; go on at the nearest whole one.
        done = state["step"] * state["global_batch"]
        self.first_step = self.steps if done >= len(self.dataset) else round(done / self.global_batch)
        self.failed, self.interval = set(state["failed"]), dict(state["interval"])
        self.open_log(state["log_position"])
        print_main(f"Continuing {self.output} at epoch {self.epoch + 1}, step {self.first_step}.")

    # --- the loop's surroundings -------------------------------------------------------------------------------------

    def begin_epoch(self, epoch):
        """An ablation, DeepCluster's alternation: new clusters at --recluster-interval, which steps leave alone."""
        if is_due(self.args.recluster_interval, epoch) and self.clustered != epoch:
            self.cluster_everything(epoch)

    def batches(self, epoch, first_step):
        """This process's batches of an epoch, from first_step on."""
        args = self.args
        batches = iter(loader.training_batches(self.dataset, self.augmentation, args.image_size, args.batch_size, args.seed,
                                               epoch, first_step, args.workers, pin_memory=self.device.type == "cuda"))
        with progress_bar(self.steps, first_step, f"epoch {epoch + 1}/{args.epochs}") as self.bar:
            for _ in range(first_step, self.steps):
                try:
                    batch = next(batches)
                except UserError as error:
                    # The others are on their way into the next collective. Go with them, with an empty picture, as far
                    # as `agree`, where all learn of it.
                    self.error, batch = error, loader.blank_batch(args.batch_size, args.image_size)
                yield batch
                self.bar.update()

    def finish(self, batch):
        """The half of the augmentation that runs on the device: [B, 3, S, S] float32, channels last."""
        images = batch.images.to(self.device, non_blocking=True)
        images = augment.finish(images, batch.parameters)
        return images.contiguous(memory_format=torch.channels_last)

    def agree(self, epoch, step, loss, failed):
        """The mean loss over the processes, which also learn here whether one met a bad image or cannot go on."""
        failed, error = failed[failed >= 0], self.error or self.log.error
        totals = torch.tensor([float(loss.detach()) / distributed.world_size(), len(failed),
                               program.signal_is_pending(), error is not None], dtype=torch.float64)
        loss, num_failed, self.must_stop, num_errors = distributed.all_reduce(totals).tolist()
        if num_errors:
            with distributed.together():
                if error:
                    raise error
        if not abs(loss) < float("inf"):
            raise UserError(f"The loss is {loss} at epoch {epoch + 1}, step {step + 1}; {self.output / 'checkpoint.pth'} "
                            "is from before that. Start again with a lower --lr or --amp off, in another --output.")
        if num_failed:
            self.count_failed(failed)
        return loss

    def after_step(self, epoch, step, loss, change_ratio, splits):
        """Log and save when it is time to, and stop if a signal asked for it."""
        self.steps_here += 1
        for name, value in (("steps", 1), ("loss", loss), ("change_ratio", change_ratio), ("splits", splits)):
            self.interval[name] += value
        if self.global_step % self.args.log_interval == 0:
            self.log_interval(epoch, step)
        if self.must_stop or (step + 1 < self.steps and self.global_step % self.args.checkpoint_interval == 0):
            self.epoch, self.first_step = epoch, step + 1
            self.save()
        if self.must_stop:
            raise Interrupted(f"Stopped after epoch {epoch + 1}, step {step + 1}, as a signal asked; the same "
                                          "command continues.")

    def count_failed(self, failed):
        """Remember unreadable images, given the indices that this process met. A collective."""
        self.failed.update(distributed.all_gather_uneven_rows(failed.cpu()).tolist())
        if len(self.failed) > 0.01 * len(self.dataset):
            raise UserError(f"{len(self.failed)} of {len(self.dataset)} images in {self.args.data} cannot be read, more "
                            f"than 1%, among them {self.dataset.name_of(min(self.failed))}: repair or remove them.")

    def log_interval(self, epoch, step):
        """A line of the log: means over the steps since the last line, and the clusters as they are."""
        sizes, interval, now = self.memory.cluster_sizes, self.interval, time.monotonic()
        count = interval["steps"]
        record = dict(
            epoch=epoch + 1, step=self.global_step, loss=interval["loss"] / count,
            change_ratio=interval["change_ratio"] / count, empty=int((sizes == 0).sum()), smallest=int(sizes.min()),
            largest=int(sizes.max()), splits=interval["splits"], lr=self.optimizer.param_groups[0]["lr"],
            failed_images=len(self.failed),
            images_per_second=round(self.steps_here * self.global_batch / (now - self.last_logged), 1))
        self.log.write(**record)
        short = {name: f"{value:.4g}" for name, value in record.items() if name not in ("epoch", "step", "failed_images")}
        self.bar.set_postfix(short, refresh=False)
        plain_line(f"epoch {epoch + 1} step {step + 1}/{self.steps}: " + ", ".join(f"{k} {v}" for k, v in short.items()))
        self.interval, self.last_logged = dict(steps=0, loss=0.0, change_ratio=0.0, splits=0), now
        self.steps_here = 0

    def log_agreement(self, epoch, when, **more):
        """NMI and purity of the clusters against labels that the training never sees, if the data has any."""
        if self.dataset.labels is not None:
            clusters = self.memory.labels.cpu()
            more["nmi"] = metrics.nmi(clusters, self.dataset.labels)
            more["purity"] = metrics.purity(clusters, self.dataset.labels)
            print_main(f"{when}: clusters against labels: NMI {more['nmi']:.3f}, purity {more['purity']:.1%}")
        if more:
            self.log.write(epoch=epoch, step=self.global_step, **more)

    def knn_accuracy(self):
        """Nearest-neighbour accuracy of the backbone on held-out images."""
        args = self.args
        self.share_buffers()
        self.network.eval()
        with self.autocast():
            return heldout.knn_accuracy(self.network.backbone, self.dataset, self.held_out, args.image_size, self.device,
                                        args.batch_size, args.workers)

    def log_knn(self, epoch, accuracy):
        self.log.write(epoch=epoch, step=self.global_step, knn_accuracy=accuracy)
        print_main(f"{f'epoch {epoch}' if epoch else 'before training'}: nearest-neighbour accuracy {accuracy:.1%}")

    def save(self):
        """Write checkpoint.pth. A collective."""
        memory = self.memory.state_dict()
        with distributed.together():
            if not all(torch.isfinite(value).all() for value in self.network.parameters()):
                raise UserError(f"The weights are no longer finite after step {self.global_step}; "
                                f"{self.output / 'checkpoint.pth'} is from before that. Start again with a lower --lr or "
                                "--amp off, in another --output.")
            if self.log.error:
                raise self.log.error
            if distributed.is_main():
                self.log.sync()
                checkpoint.save(self.output / "checkpoint.pth", dict(
                    program="odc train", settings=vars(self.args), global_batch=self.global_batch,
                    data=dict(num_images=len(self.dataset), fingerprint=self.dataset.fingerprint),
                    arch=self.args.arch, small_stem=self.network.backbone.small_stem,
                    backbone=self.network.backbone.state_dict(), neck=self.network.neck.state_dict(),
                    head=self.network.head.state_dict(), optimizer=self.optimizer.state_dict(),
                    scaler=self.scaler.state_dict(), memory=memory, epoch=self.epoch, step=self.first_step,
                    clustered=self.clustered, global_step=self.global_step, interval=self.interval,
                    failed=sorted(self.failed), log_position=self.log.position))

    def end_epoch(self, epoch):
        """Log and save, and keep copies and draw pictures at their intervals."""
        args, began = self.args, time.monotonic()
        with_knn = is_due(args.knn_interval, epoch)
        if with_knn:
            try:
                accuracy = self.knn_accuracy()
            except Interrupted:  # all steps of the epoch are done; this end of it is for the next start
                self.epoch, self.first_step = epoch - 1, self.steps
                self.save()
                raise Interrupted(f"Stopped at the end of epoch {epoch}, as a signal asked; the same command "
                                              "continues.") from None
        self.log_agreement(epoch, f"epoch {epoch}")
        if with_knn:
            self.log_knn(epoch, accuracy)
        self.epoch, self.first_step = epoch, 0
        with_gallery = is_due(args.gallery_interval, epoch)
        similarity = export.similarities(self.memory) if with_gallery else None
        with distributed.together():
            if distributed.is_main():
                if is_due(args.save_interval, epoch):
                    export.save_backbone(self.output / f"backbone_epoch_{epoch}.pth", self.network.backbone)
                    export.save_array(self.output / f"labels_epoch_{epoch}.npy", self.memory.labels)
                if with_gallery:
                    export.save_gallery(self, similarity)
                curves.save(self.output / "report.html", self.output / "log.jsonl", self.output.resolve().name)
        self.save()
        self.last_logged += time.monotonic() - began  # no training time


def is_due(interval, epoch):
    """Whether something that happens every `interval` epochs, never if 0, happens after this one."""
    return interval > 0 and epoch % interval == 0
