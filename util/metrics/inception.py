"""Inception's features of images, computed on all ranks (torch-fidelity's network)."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from util import distributed
from util.checkpoint.files import read_checkpoint
from util.crop import center_crop_arr
from util.data.loaders import RankSampler, leave_signals_to_parent
from util.data.sources import AllImages, Rows, open_unlabeled, read_image
from util.errors import UserError
from util.files import read_arrays
from util.log import log, progress_bar, warn
from util.precision import exact_convolutions
from util.signals import StopSignals, until_stopped

#: Inception's layers: pooled features for FID, precision and recall; logits for the Inception Score.
POOL, LOGITS = "2048", "logits_unbiased"


INCEPTION_SHA256 = "6726825d"  # its first digits, which the name of the weights' file ends with


def inception_path() -> Path:
    """Return where torch-fidelity puts Inception's weights, in the folder of torch's hub."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


def find_inception_weights(path: str | None) -> Path:
    """Inception's weights: ``path``, or torch-fidelity's download, fetched if missing; UserError if that fails."""
    place = Path(path) if path else inception_path()
    if path is None and not place.is_file() and distributed.is_local_main_process():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(place), hash_prefix=INCEPTION_SHA256, progress=False
            )
        except Exception as error:  # a missing network shows as many types of errors
            log.debug("fetching Inception failed: %s", error)
    distributed.barrier()
    if not place.is_file():
        raise UserError(
            f"no Inception weights at {place}: fetch them with python -m tools.download inception, or put "
            f"{URL_INCEPTION_V3} there, or name their place with --inception_weights"
        )
    return place


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception-v3, in float32 throughout, whatever the precision of the run that measures."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with exact_convolutions():
            return super().forward(x)


def load_inception(path: str | None, device: torch.device) -> Inception:
    """torch-fidelity's Inception-v3 (the FID one); UserError if there are no weights, or not those of it."""
    path = find_inception_weights(path)
    weights = read_checkpoint(path)  # refuses code, which torch-fidelity would run
    if not all(value.isfinite().all() for value in weights.values() if isinstance(value, Tensor)):
        raise UserError(f"{path} is damaged: it holds NaN or infinity; fetch it again")
    try:
        return Inception("inception-v3-compat", [POOL, LOGITS], str(path)).to(device)
    except RuntimeError as error:
        what = f"the weights of torch-fidelity's Inception ({URL_INCEPTION_V3})"
        raise UserError(f"{path} does not hold {what}") from error


class PlainImages(Dataset):
    """Byte images ``[3, H, W]``, sorted, of a folder and its subfolders, of a data set in rows, or of an npz.

    Args:
        source: what :func:`util.data.sources.open_unlabeled` opens: a folder, or a data set in rows, of which it is the
            ``train`` split if there are several; or an ``.npz`` with ``arr_0``, uint8 ``[N, H, W, 3]`` (ADM's layout).
        img_size: crop and resize to this size as for training; by default images stay as they are.
        paths: the files to take of a folder, in their order; by default all images in it.

    Raises:
        UserError: there is no such folder or file, or it holds no images.
    """

    def __init__(
        self, source: str | Path, img_size: int | None = None, paths: Sequence[Path] | None = None
    ):
        self.source, self.img_size = Path(source), img_size
        self.opened: AllImages | Rows | None = None
        if paths is not None:
            self.items = paths
        elif self.source.suffix == ".npz":
            self.items = read_arrays(self.source, "arr_0")["arr_0"]
            if self.items.dtype != np.uint8 or self.items.ndim != 4 or self.items.shape[3] != 3:
                found = f"{self.items.dtype} {list(self.items.shape)}"
                raise UserError(f"{self.source}: arr_0 is {found}, expected uint8 [N, H, W, 3]")
        else:
            self.opened = open_unlabeled(source)
            self.items = [name for name, _ in self.opened.samples]
        if not len(self.items):
            raise UserError(f"{self.source} holds no images")
        self.size = self._read(0).size  # of the first image, which all must have

    def uncropped(self) -> "PlainImages":
        """Return the same images as they are."""
        images = copy(self)
        images.img_size = None
        images.size = images._read(0).size
        return images

    def __len__(self) -> int:
        return len(self.items)

    def _read(self, index: int) -> Image.Image:
        if self.opened is not None:
            image = self.opened.read(index)
        else:
            item = self.items[index]
            image = Image.fromarray(item) if isinstance(item, np.ndarray) else read_image(str(item))
        try:
            return image if self.img_size is None else center_crop_arr(image, self.img_size)
        except ValueError as error:
            name = index if isinstance(self.items, np.ndarray) else self.items[index]
            raise UserError(f"cannot crop image {name} ({error})") from error

    def __getitem__(self, index: int) -> Tensor:
        image = self._read(index)
        if image.size != self.size:  # in a folder: an array's images are alike
            raise UserError(
                f"{self.items[index]} has {image.size[0]}x{image.size[1]} pixels, {self.items[0]} has "
                f"{self.size[0]}x{self.size[1]}: images to measure must be of one size"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@torch.no_grad()
def extract_features(
    images: Dataset,
    inception: Inception,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    stop_signals: StopSignals | None = None,
) -> dict[str, Tensor]:
    """Both layers' features, ``[N, 2048]`` and ``[N, 1008]``, of all images in order, on the CPU.

    Each process computes those of its share of the images; all processes return those of all.

    Raises:
        Preempted: a process received one of the ``stop_signals``.
    """
    distributed.check_equal(
        {"the number of images": len(images)}, "all processes must see the same folder or file"
    )
    share = RankSampler(len(images), distributed.get_rank(), distributed.get_world_size())
    if len(images) < distributed.get_world_size():
        warn(
            "%d images for %d processes: some have nothing to do",
            len(images),
            distributed.get_world_size(),
        )
    options = {"num_workers": num_workers, "worker_init_fn": leave_signals_to_parent}
    loader = DataLoader(images, batch_size=batch_size, sampler=share, **options)
    batches: list[tuple[Tensor, Tensor]] = []
    with progress_bar(total=len(images), unit="img", desc="Inception") as bar:
        for batch in until_stopped(loader, stop_signals):
            batches.append(inception(batch.to(device, non_blocking=True)))
            bar.update(min(len(batch) * distributed.get_world_size(), len(images) - bar.n))
    return gather_features(batches, len(images), device)


def gather_features(
    batches: list[tuple[Tensor, Tensor]], total: int, device: torch.device
) -> dict[str, Tensor]:
    """Features of all ``total`` images by layer, on the CPU, from the batches of each process's share."""
    features = {}
    for i, (name, width) in enumerate({POOL: 2048, LOGITS: 1008}.items()):
        own = torch.cat(
            [torch.zeros(0, width, device=device), *(batch[i].to(device) for batch in batches)]
        )
        features[name] = distributed.gather_rows(own, total).cpu()
    return features
