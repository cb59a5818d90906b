"""Data sets, samplers and loaders of a run."""

import argparse
import hashlib
import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset

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
    Source,
    existing_folder,
    images_root,
    open_images,
)
from util.errors import UserError
from util.log import warn
from util.signals import StopSignals

#: A data set of a split: cached moments, packed or not, or images
Data = CachedFolder | PackedCache | ImageFolder


# --------------------------------------------------------------------------------------------------
# Loaders and samplers


def leave_signals_to_parent(worker: int) -> None:
    """Make a worker ignore the signals that ask a run to stop.

    Schedulers send them to every process of a job, but the parent needs its workers until it has
    taken and saved a last step. A SIGTERM from the parent, which sends it when it exits, ends the
    worker.
    """
    for name in ("SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # macOS does not report the sender of a signal. There any SIGTERM ends the worker.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for a SIGTERM from the parent process, then end this one."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class WorkerLoader(DataLoader):
    """DataLoader whose workers leave the signals that ask a run to stop to the parent process.

    See :func:`leave_signals_to_parent`. Workers start with these signals blocked: one that arrived
    before a worker has run that function would end it.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, worker_init_fn=leave_signals_to_parent, **options)

    def __iter__(self) -> Any:
        if self.num_workers == 0 or not hasattr(signal, "sigwaitinfo"):
            return super().__iter__()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.NUMBERS)  # workers inherit it
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def make_loader(
    dataset: Dataset, args: argparse.Namespace, device: torch.device, **options: Any
) -> DataLoader:
    """Return a DataLoader with the run's batch size and workers.

    Args:
        dataset: the data set.
        args: the flags of the run.
        device: on CUDA, batches are in pinned memory unless the flags say otherwise.
        options: arguments of torch's DataLoader (``sampler``, ``drop_last``, ...).

    Raises:
        UserError: ``--num_workers`` or ``--seed`` is negative.
    """
    names = [name for name in ("num_workers", "seed") if hasattr(args, name)]
    check_range(args, 0, math.inf, *names)
    options = {"batch_size": args.batch_size, "persistent_workers": args.num_workers > 0, **options}
    pin = args.pin_mem and device.type == "cuda"
    return WorkerLoader(dataset, num_workers=args.num_workers, pin_memory=pin, **options)


def evenly_spaced(dataset: Data, limit: int) -> Subset:
    """Return at most ``limit`` items of ``dataset`` at equal distances, with the first item."""
    step = -(-len(dataset) // limit)
    return Subset(dataset, range(0, len(dataset), step))


class ShuffledRankSampler(DistributedSampler):
    """A rank's share of a shuffled epoch, without its first ``start`` items.

    A run that resumes within an epoch sets ``start``, to skip the items before the interruption.
    """

    start = 0

    def __iter__(self):
        return islice(super().__iter__(), self.start, None)


class RankSampler(Sampler):
    """Every ``world_size``-th index from ``rank`` on, so that each index belongs to one rank."""

    def __init__(self, length: int, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


def training_loader(dataset: Data, device: torch.device, args: argparse.Namespace) -> DataLoader:
    """Return a loader of this rank's share of each epoch: shuffled, full batches.

    The images of a step, and which of them are mirrored, depend only on the global batch size. They
    do not depend on the number of ranks or on ``--accum_iter``.

    Raises:
        UserError: there are too few images for one step.
    """
    # The last images of an epoch that do not fill a step are dropped. With padding instead, an
    # epoch could have one step more on many ranks than on one.
    options = {"shuffle": True, "seed": args.seed, "drop_last": True}
    ranks = distributed.get_world_size()
    sampler = ShuffledRankSampler(dataset, ranks, distributed.get_rank(), **options)
    # Workers are restarted for each epoch, so that they receive its choice of mirrored images.
    loader = make_loader(
        dataset, args, device, sampler=sampler, drop_last=True, persistent_workers=False
    )
    if len(loader) < args.accum_iter:
        global_batch_size = args.batch_size * args.accum_iter * ranks
        raise UserError(
            f"{len(dataset)} images do not fill one step of {global_batch_size}; lower "
            "--batch_size or --accum_iter"
        )
    return loader


def loader_of_all(
    dataset: Any, device: torch.device, args: argparse.Namespace, **options: Any
) -> DataLoader:
    """Return a loader of all items in order, each on one rank; see :func:`make_loader`."""
    sampler = RankSampler(len(dataset), distributed.get_rank(), distributed.get_world_size())
    return make_loader(dataset, args, device, sampler=sampler, **options)


# --------------------------------------------------------------------------------------------------
# Data sets


def data_root(args: argparse.Namespace, split: str) -> Path | str:
    """Return the location of ``train`` or ``val``.

    With ``--use_cached`` it is a cache, otherwise images (:func:`util.data.sources.images_root`).

    Raises:
        UserError: there is no such cache or image folder.
    """
    if args.use_cached:
        path = args.cached_path if split == "train" else args.cached_val_path
        return existing_folder(path, "cache")
    return images_root(args.data_path, split)


def load_data(
    args: argparse.Namespace,
    split: str,
    tokenizer: TokenizerInfo,
    trained: Sequence[str] | None = None,
) -> Data:
    """Open the images of ``train`` or ``val``, or their cached moments.

    With ``--class_num 1`` all items have one class, whatever the classes of the data.

    Args:
        args: the flags of the run.
        split: ``"train"`` or ``"val"``.
        tokenizer: the tokenizer of the run, of which cached moments must be.
        trained: the class names that the model is or was trained on, if they are known.

    Raises:
        UserError: the data does not exist, or its classes do not match ``--class_num`` or
            ``trained``, or its size does not match ``--img_size``.
    """
    root = data_root(args, split)
    mirror = args.mirror and split == "train"
    source: CachedFolder | PackedCache | Source
    if args.use_cached:
        source = open_cache(root, mirror=mirror)
    else:
        label_column = NO_LABELS if args.class_num == 1 else args.label_column
        source = open_images(args.data_path, split, args.image_column, label_column)
    if args.class_num == 1:
        source.samples = [(name, 0) for name, _ in source.samples]
        source.classes = [UNLABELED]
    if isinstance(source, CachedFolder | PackedCache):
        dataset: Data = source
    else:
        dataset = ImageFolder(source, image_transform(args.img_size), mirror=mirror)
    if split == "train":  # in measurements each unreadable image is an error
        folder = None if args.dry_run else args.output_dir
        dataset.bad_images = BadImages(folder, args.skip_bad_images)

    # Labels of the model
    labels = check_classes(dataset.classes, args.class_num, root, trained, held_out=split == "val")
    dataset.samples = [(name, labels[label]) for name, label in dataset.samples]
    dataset.classes = [name for _, name in sorted(zip(labels, dataset.classes, strict=True))]

    if isinstance(dataset, CachedFolder | PackedCache):
        if split == "val" and dataset.metadata.get("split") == "train":
            warn("%s is a cache of training images: their likelihood is not held-out", root)
        check_moments(dataset, args.img_size, tokenizer)
    return dataset


def check_moments(
    cache: CachedFolder | PackedCache, img_size: int, tokenizer: TokenizerInfo
) -> None:
    """Set the cache's ``shape`` to that of the run's moments, and check the first item.

    Raises:
        UserError: the moments of the first item have another shape.
    """
    moments = cache[0][0]
    cache.shape = tokenizer.moments_shape(img_size)
    if moments.shape != cache.shape:
        size = cache.metadata.get("img_size")
        origin = f"of shape {list(moments.shape)}" if size is None else f"at --img_size {size}"
        raise UserError(
            f"{cache.root} holds moments {origin}, which do not fit --img_size {img_size}"
        )


def check_same_inputs(data: Mapping[str, Data], vae: nn.Module | None) -> None:
    """Check that all ranks have the same images, classes and tokenizer weights.

    Args:
        data: the data sets by split.
        vae: the tokenizer, if the run has one.

    Raises:
        UserError: they differ, for example if each machine has its own disk.
    """
    if distributed.get_world_size() == 1:
        return
    inputs: dict[str, Any] = {}
    if vae is not None:
        inputs["the tokenizer's checksum"] = checksum(vae.state_dict().values())
    for split, dataset in data.items():
        if isinstance(dataset, CachedFolder | PackedCache):
            name = f"the SHA-256 of the tokenizer that cached {split}"
            inputs[name] = dataset.metadata.get("vae_sha256")
        digest = hashlib.sha256()
        digest.update(os.fsencode("\n".join(dataset.classes)))
        for path, label in dataset.samples:
            digest.update(os.fsencode(f"{os.path.basename(path)} {label}\n"))
        images = f"{len(dataset)} images {digest.hexdigest()[:16]}"
        inputs[f"the list of images in {split}"] = images
    distributed.check_equal(inputs, "all machines must read the same files")
