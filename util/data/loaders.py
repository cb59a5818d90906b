"""The data sets that flags name, samplers, and loaders."""

import argparse
import hashlib
import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    Sampler,
    Subset,
)

from util import distributed
from util.args import check_range
from util.checksums import checksum
from util.config import TokenizerInfo
from util.data.caches import CachedFolder
from util.data.classes import check_classes
from util.data.datasets import BadImages, ImageFolder, image_transform
from util.data.packed import PackedCache, open_cache
from util.data.sources import (
    NO_LABELS,
    UNLABELED,
    existing_folder,
    images_root,
    open_images,
)
from util.errors import UserError
from util.log import warn


def leave_signals_to_parent(worker: int) -> None:
    """Has a worker ignore the signals that ask a run to stop, which schedulers send to every process of a job.

    The parent still needs its workers until it has taken and saved a last step. A SIGTERM that the parent itself sends,
    as it does on its exit, ends the worker.
    """
    for name in ("SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(
        signal, "sigwaitinfo"
    ):  # macOS cannot tell who sent a signal: there any SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Waits for a SIGTERM of the parent process, and ends this one."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def make_loader(
    dataset: Dataset, args: argparse.Namespace, device: torch.device, **options
) -> DataLoader:
    """A DataLoader with the run's batch size and workers; ``options`` go to torch (``sampler``, ``drop_last``, ...)."""
    check_range(
        args, 0, math.inf, *(name for name in ("num_workers", "seed") if hasattr(args, name))
    )
    options = {"batch_size": args.batch_size, "persistent_workers": args.num_workers > 0, **options}
    options["worker_init_fn"] = leave_signals_to_parent
    pin = args.pin_mem and device.type == "cuda"
    return DataLoader(dataset, num_workers=args.num_workers, pin_memory=pin, **options)


def evenly_spaced(dataset: Dataset, limit: int) -> Subset:
    """At most ``limit`` items of ``dataset`` at equal distances, the first among them."""
    return Subset(dataset, range(0, len(dataset), -(-len(dataset) // limit)))


class ShuffledRankSampler(DistributedSampler):
    """A process's share of a shuffled epoch, without its first ``start`` items, seen before an interruption."""

    start = 0

    def __iter__(self):
        return islice(super().__iter__(), self.start, None)


class RankSampler(Sampler):
    """Every ``world_size``-th index from ``rank`` on, so that each index goes to one process."""

    def __init__(self, length: int, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


Data = CachedFolder | PackedCache | ImageFolder


def data_root(args: argparse.Namespace, split: str) -> Path | str:
    """Where ``train`` or ``val`` lies: a cache with ``--use_cached``, else images (:func:`util.data.sources.images_root`).

    Raises:
        UserError: it is not there.
    """
    if args.use_cached:
        return existing_folder(
            args.cached_path if split == "train" else args.cached_val_path, "cache"
        )
    return images_root(args.data_path, split)


def load_data(
    args: argparse.Namespace,
    split: str,
    tokenizer: TokenizerInfo,
    trained: Sequence[str] | None = None,
) -> Data:
    """The images of ``train`` or ``val``, or their cached moments, which must be of ``tokenizer``.

    With ``--class_num 1`` all are of one class, whatever their own.

    Args:
        trained: names of the classes that the model is, or was, trained on, if they are known.

    Raises:
        UserError: they are not there, of other classes than ``--class_num`` or ``trained``, or of another size than
            ``--img_size``.
    """
    root, mirror = data_root(args, split), args.mirror and split == "train"
    if args.use_cached:
        dataset = open_cache(root, mirror=mirror)
    else:
        labels = NO_LABELS if args.class_num == 1 else args.label_column
        dataset = open_images(args.data_path, split, args.image_column, labels)
    if args.class_num == 1:
        dataset.samples, dataset.classes = [(name, 0) for name, _ in dataset.samples], [UNLABELED]
    if not args.use_cached:
        dataset = ImageFolder(dataset, image_transform(args.img_size), mirror=mirror)
    if split == "train":  # measurements are of all images or none
        dataset.bad_images = BadImages(
            None if args.dry_run else args.output_dir, args.skip_bad_images
        )
    labels = check_classes(dataset.classes, args.class_num, root, trained, held_out=split == "val")
    dataset.samples = [(name, labels[label]) for name, label in dataset.samples]
    dataset.classes = [
        name for _, name in sorted(zip(labels, dataset.classes, strict=True))
    ]  # in order of labels
    if args.use_cached:
        if split == "val" and dataset.metadata.get("split") == "train":
            warn("%s is a cache of training images: their likelihood is not a held-out one", root)
        moments, dataset.shape = dataset[0][0], tokenizer.moments_shape(args.img_size)
        if moments.shape != dataset.shape:
            size = dataset.metadata.get("img_size")
            made = f"of shape {list(moments.shape)}" if size is None else f"at --img_size {size}"
            raise UserError(
                f"{root} holds moments {made}, which --img_size {args.img_size} does not fit"
            )
    return dataset


def check_same_inputs(data: Mapping[str, Data], vae: nn.Module | None) -> None:
    """Compares names and classes of images, by split, and the tokenizer's weights, over all processes.

    Raises:
        UserError: they differ, as where machines have disks of their own.
    """
    if distributed.get_world_size() == 1:
        return
    read = {} if vae is None else {"the tokenizer's checksum": checksum(vae.state_dict().values())}
    for split, dataset in data.items():
        if isinstance(dataset, CachedFolder | PackedCache):
            read[f"the SHA-256 of the tokenizer that cached {split}"] = dataset.metadata.get(
                "vae_sha256"
            )
        digest = hashlib.sha256()
        digest.update(os.fsencode("\n".join(dataset.classes)))
        for path, label in dataset.samples:
            digest.update(os.fsencode(f"{os.path.basename(path)} {label}\n"))
        read[f"the list of images in {split}"] = f"{len(dataset)} images {digest.hexdigest()[:16]}"
    distributed.check_equal(read, "all machines must read the same files")


def training_loader(dataset: Data, device: torch.device, args: argparse.Namespace) -> DataLoader:
    """Shuffled whole batches, this process's share of every epoch.

    The images of a step, and which of them are mirrored, depend on the whole batch alone: not on the number of
    processes and of batches a step that it is divided among.

    Raises:
        UserError: there are not enough images for one step.
    """
    # An epoch that does not divide evenly is cut: padded, it may have a step more on many processes than on one.
    options = {"shuffle": True, "seed": args.seed, "drop_last": True}
    sampler = ShuffledRankSampler(
        dataset, distributed.get_world_size(), distributed.get_rank(), **options
    )
    # Workers start anew with each epoch, so that they know which of its images are mirrored.
    loader = make_loader(
        dataset, args, device, sampler=sampler, drop_last=True, persistent_workers=False
    )
    if len(loader) < args.accum_iter:
        whole = args.batch_size * args.accum_iter * distributed.get_world_size()
        raise UserError(
            f"{len(dataset)} images do not fill one step of {whole}; lower --batch_size or --accum_iter"
        )
    return loader


def loader_of_all(dataset, device: torch.device, args: argparse.Namespace, **options) -> DataLoader:
    """Batches of all items in order, each item in one process; ``options`` as torch's DataLoader takes them."""
    sampler = RankSampler(len(dataset), distributed.get_rank(), distributed.get_world_size())
    return make_loader(dataset, args, device, sampler=sampler, **options)
