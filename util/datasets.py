"""The data sets that a run's flags name: images or cached moments, found, opened, and dealt to processes."""

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from util import misc
from util.config import Tokenizer
from util.errors import UserError
from util.files import read_json
from util.loader import (
    PACKED_METADATA,
    BadImages,
    CachedFolder,
    ImageFolder,
    RankSampler,
    ShuffledRankSampler,
    check_classes,
    existing_folder,
    image_transform,
    make_loader,
    read_cache_metadata,
)
from util.packed import PackedCache, open_cache
from util.sources import NO_LABELS, UNLABELED, images_root, open_images

Data = CachedFolder | PackedCache | ImageFolder


def data_root(args: argparse.Namespace, split: str) -> Path | str:
    """Where ``train`` or ``val`` lies: a cache with ``--use_cached``, else images (:func:`util.sources.images_root`).

    Raises:
        UserError: it is not there.
    """
    if args.use_cached:
        return existing_folder(args.cached_path if split == "train" else args.cached_val_path, "cache")
    return images_root(args.data_path, split)


def cache_metadata(root: Path) -> dict[str, Any]:
    """What a cache, packed or not, holds about its tokenizer and images; empty if nothing.

    Raises:
        UserError: the file that holds it is damaged.
    """
    packed = root / PACKED_METADATA
    return read_json(packed) if packed.exists() else read_cache_metadata(root) or {}


def load_data(args: argparse.Namespace, split: str, tokenizer: Tokenizer, trained: Sequence[str] | None = None) -> Data:
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
        dataset.bad_images = BadImages(None if args.dry_run else args.output_dir, args.skip_bad_images)
    labels = check_classes(dataset.classes, args.class_num, root, trained, held_out=split == "val")
    dataset.samples = [(name, labels[label]) for name, label in dataset.samples]
    dataset.classes = [name for _, name in sorted(zip(labels, dataset.classes, strict=True))]  # in order of labels
    if args.use_cached:
        if split == "val" and dataset.metadata.get("split") == "train":
            misc.warn("%s is a cache of training images: their likelihood is not a held-out one", root)
        moments, side = dataset[0][0], args.img_size // tokenizer.stride
        dataset.shape = (2 * tokenizer.config["embed_dim"], side, side)
        if moments.shape != dataset.shape:
            size = dataset.metadata.get("img_size")
            made = f"of shape {list(moments.shape)}" if size is None else f"at --img_size {size}"
            raise UserError(f"{root} holds moments {made}, which --img_size {args.img_size} does not fit")
    return dataset


def check_same_inputs(data: Mapping[str, Data], vae: nn.Module | None) -> None:
    """Compares names and classes of images, by split, and the tokenizer's weights, over all processes.

    Raises:
        UserError: they differ, as where machines have disks of their own.
    """
    if misc.get_world_size() == 1:
        return
    read = {} if vae is None else {"the tokenizer's checksum": misc.checksum(vae.state_dict().values())}
    for split, dataset in data.items():
        if isinstance(dataset, CachedFolder | PackedCache):
            read[f"the SHA-256 of the tokenizer that cached {split}"] = dataset.metadata.get("vae_sha256")
        digest = hashlib.sha256()
        digest.update(os.fsencode("\n".join(dataset.classes)))
        for path, label in dataset.samples:
            digest.update(os.fsencode(f"{os.path.basename(path)} {label}\n"))
        read[f"the list of images in {split}"] = f"{len(dataset)} images {digest.hexdigest()[:16]}"
    misc.check_same(read, "all machines must read the same files")


def training_loader(dataset: Data, device: torch.device, args: argparse.Namespace) -> DataLoader:
    """Shuffled whole batches, this process's share of every epoch.

    The images of a step, and which of them are mirrored, depend on the whole batch alone: not on the number of
    processes and of batches a step that it is divided among.

    Raises:
        UserError: there are not enough images for one step.
    """
    # An epoch that does not divide evenly is cut: padded, it may have a step more on many processes than on one.
    options = {"shuffle": True, "seed": args.seed, "drop_last": True}
    sampler = ShuffledRankSampler(dataset, misc.get_world_size(), misc.get_rank(), **options)
    # Workers start anew with each epoch, so that they know which of its images are mirrored.
    loader = make_loader(dataset, args, device, sampler=sampler, drop_last=True, persistent_workers=False)
    if len(loader) < args.accum_iter:
        whole = args.batch_size * args.accum_iter * misc.get_world_size()
        raise UserError(f"{len(dataset)} images do not fill one step of {whole}; lower --batch_size or --accum_iter")
    return loader


def loader_of_all(dataset, device: torch.device, args: argparse.Namespace, **options) -> DataLoader:
    """Batches of all items in order, each item in one process; ``options`` as torch's DataLoader takes them."""
    sampler = RankSampler(len(dataset), misc.get_rank(), misc.get_world_size())
    return make_loader(dataset, args, device, sampler=sampler, **options)
