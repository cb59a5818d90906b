"""FID, Inception Score, precision and recall: torch-fidelity's Inception and formulas, shared over processes."""

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from util import checkpoint, misc
from util.crop import center_crop_arr
from util.errors import UserError
from util.files import read_arrays, written_whole
from util.loader import RankSampler, leave_signals_to_parent
from util.sources import AllImages, Rows, open_unlabeled, read_image

#: Inception's layers: pooled features for FID, precision and recall; logits for the Inception Score.
POOL, LOGITS = "2048", "logits_unbiased"
INCEPTION_SHA256 = "6726825d"  # its first digits, which the name of the weights' file ends with
IS_SPLITS = 10
NEIGHBOURS = 3  # k of precision and recall (Kynkaanniemi et al. 2019)
#: ADM's statistics of ImageNet 256, which the paper's FID and rFID are measured against.
ADM_STATS = "fid_stats/adm_in256_stats.npz"

# --------------------------------------------------------------------------------------------------------------------
# Inception.


def inception_place() -> Path:
    """Return where torch-fidelity puts Inception's weights, in the folder of torch's hub."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


def find_inception_weights(path: str | None) -> Path:
    """Inception's weights: ``path``, or torch-fidelity's download, fetched if missing; UserError if that fails."""
    place = Path(path) if path else inception_place()
    if path is None and not place.is_file() and misc.is_local_main_process():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(place), hash_prefix=INCEPTION_SHA256, progress=False)
        except Exception as error:  # a missing network shows as many types of errors
            misc.log.debug("fetching Inception failed: %s", error)
    misc.barrier()
    if not place.is_file():
        raise UserError(
            f"no Inception weights at {place}: fetch them with python -m tools.download inception, or put "
            f"{URL_INCEPTION_V3} there, or name their place with --inception_weights"
        )
    return place


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception-v3, in float32 throughout, whatever the precision of the run that measures."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with misc.exact_convolutions():
            return super().forward(x)


def load_inception(path: str | None, device: torch.device) -> Inception:
    """torch-fidelity's Inception-v3 (the FID one); UserError if there are no weights, or not those of it."""
    path = find_inception_weights(path)
    weights = checkpoint.read(path)  # refuses code, which torch-fidelity would run
    if not all(value.isfinite().all() for value in weights.values() if isinstance(value, Tensor)):
        raise UserError(f"{path} is damaged: it holds NaN or infinity; fetch it again")
    try:
        return Inception("inception-v3-compat", [POOL, LOGITS], str(path)).to(device)
    except RuntimeError as error:
        what = f"the weights of torch-fidelity's Inception ({URL_INCEPTION_V3})"
        raise UserError(f"{path} does not hold {what}") from error


# --------------------------------------------------------------------------------------------------------------------
# Images to measure.


class PlainImages(Dataset):
    """Byte images ``[3, H, W]``, sorted, of a folder and its subfolders, of a data set in rows, or of an npz.

    Args:
        source: what :func:`util.sources.open_unlabeled` opens: a folder, or a data set in rows, of which it is the
            ``train`` split if there are several; or an ``.npz`` with ``arr_0``, uint8 ``[N, H, W, 3]`` (ADM's layout).
        img_size: crop and resize to this size as for training; by default images stay as they are.
        paths: the files to take of a folder, in their order; by default all images in it.

    Raises:
        UserError: there is no such folder or file, or it holds no images.
    """

    def __init__(self, source: str | Path, img_size: int | None = None, paths: Sequence[Path] | None = None):
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
    stop_signals: misc.StopSignals | None = None,
) -> dict[str, Tensor]:
    """Both layers' features, ``[N, 2048]`` and ``[N, 1008]``, of all images in order, on the CPU.

    Each process computes those of its share of the images; all processes return those of all.

    Raises:
        Preempted: a process received one of the ``stop_signals``.
    """
    misc.check_same({"the number of images": len(images)}, "all processes must see the same folder or file")
    share = RankSampler(len(images), misc.get_rank(), misc.get_world_size())
    if len(images) < misc.get_world_size():
        misc.warn("%d images for %d processes: some have nothing to do", len(images), misc.get_world_size())
    options = {"num_workers": num_workers, "worker_init_fn": leave_signals_to_parent}
    loader = DataLoader(images, batch_size=batch_size, sampler=share, **options)
    batches: list[tuple[Tensor, Tensor]] = []
    with misc.progress(total=len(images), unit="img", desc="Inception") as bar:
        for batch in misc.until_stopped(loader, stop_signals):
            batches.append(inception(batch.to(device, non_blocking=True)))
            bar.update(min(len(batch) * misc.get_world_size(), len(images) - bar.n))
    return gather_features(batches, len(images), device)


def gather_features(batches: list[tuple[Tensor, Tensor]], total: int, device: torch.device) -> dict[str, Tensor]:
    """Features of all ``total`` images by layer, on the CPU, from the batches of each process's share."""
    features = {}
    for i, (name, width) in enumerate({POOL: 2048, LOGITS: 1008}.items()):
        own = torch.cat([torch.zeros(0, width, device=device), *(batch[i].to(device) for batch in batches)])
        features[name] = misc.gather_shares(own, total).cpu()
    return features


# --------------------------------------------------------------------------------------------------------------------
# Statistics and metrics.


def load_statistics(path: str | Path) -> dict[str, np.ndarray]:
    """Return ``mu [2048]`` and ``sigma [2048, 2048]`` of a reference file, float64.

    Raises:
        UserError: there is no such file, or it does not hold a mean and a covariance of Inception's features.
    """
    stats = read_arrays(path, "mu", "sigma")
    if stats["mu"].shape != (2048,) or stats["sigma"].shape != (2048, 2048):
        shapes = f"mu {list(stats['mu'].shape)}, sigma {list(stats['sigma'].shape)}"
        raise UserError(f"{path} has {shapes}; FID needs 2048 Inception features: mu [2048], sigma [2048, 2048]")
    if any(value.dtype.kind not in "fiu" for value in stats.values()):
        raise UserError(f"{path}: {' and '.join(f'{n} is {v.dtype}' for n, v in stats.items())}, expected numbers")
    stats = {name: value.astype(np.float64) for name, value in stats.items()}
    sigma, remedy = stats["sigma"], "make the statistics again, of two images or more (main_metrics.py --save_stats)"
    for name, value in stats.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; {remedy}")
    if (sigma.diagonal() < 0).any() or np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max():
        raise UserError(f"{path}: sigma is no covariance (a variance is negative, or it is not symmetric); {remedy}")
    return stats


def statistics(features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Mean and covariance of the pooled features, float64."""
    return fid_features_to_statistics(features[POOL].double())


def frechet_distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """FID between two statistics."""
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def default_statistics(img_size: int, classes: int) -> str | None:
    """Return :data:`ADM_STATS` for images of ImageNet's 1,000 classes at 256 pixels; None for others."""
    return ADM_STATS if (img_size, classes) == (256, 1000) else None


def save_statistics(path: str | Path, features: Mapping[str, Tensor]) -> None:
    """Writes ``mu`` and ``sigma`` of features, as :func:`load_statistics` reads them."""
    with written_whole(path) as file:
        np.savez(file, **statistics(features))


def check_number(count: int, what: str, neighbours: int = 0) -> None:
    """Check that ``count`` images have a covariance, which FID compares, and as many ``neighbours`` each.

    Raises:
        UserError: they are too few.
    """
    least = max(2, neighbours + 1)
    if count < least:
        measures = "precision and recall" if neighbours else "FID"
        raise UserError(f"too few {what} for {measures}: {count}, at least {least} are needed")


def warn_if_few(count: int, what: str) -> None:
    """Warns that FID is biased if there are fewer images than features."""
    if count < 2048:
        misc.warn("%d %s are fewer than Inception's 2048 features: FID is biased", count, what)


def compute_metrics(
    features: Mapping[str, Tensor],
    stats: Mapping[str, np.ndarray] | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Metrics of images from their features, under torch-fidelity's names.

    Args:
        features: of the images measured.
        stats: reference statistics for FID; by default those of ``reference``.
        reference: features of reference images, for precision and recall.

    Returns:
        ``inception_score_mean``, ``inception_score_std``; ``frechet_inception_distance`` with statistics or a
        reference; ``precision``, ``recall``, ``f_score`` with a reference.
    """
    figures = dict(isc_features_to_metric(features[LOGITS], splits=min(IS_SPLITS, len(features[LOGITS]))))
    if stats is None and reference is not None:
        stats = statistics(reference)
    if stats is not None:
        figures["frechet_inception_distance"] = frechet_distance(statistics(features), stats)
    if reference is not None:
        options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 5000, "save_cpu_ram": True, "verbose": False}
        figures |= prc_features_to_metric(features[POOL], reference[POOL], **options)
    return figures


class Evaluator:
    """Inception and the reference, checked and loaded before the first image is made, so that errors come early.

    Args:
        inception_weights: see :func:`find_inception_weights`.
        fid_stats: ``.npz`` of reference statistics, or None.
        reference: folder or ``.npz`` of reference images, or None.
        count: the number of images that will be measured.

    Raises:
        UserError: one of these files is missing or has the wrong content, or there are too few images for what is
            measured; all processes end with it.
    """

    def __init__(
        self,
        inception_weights: str | None,
        fid_stats: str | None,
        reference: str | None,
        device: torch.device,
        batch_size: int,
        num_workers: int,
        count: int,
    ):
        self.device, self.loading = device, (batch_size, num_workers)

        def read_references() -> tuple[dict[str, np.ndarray] | None, PlainImages | None]:
            if fid_stats or reference:
                check_number(count, "images to measure", NEIGHBOURS if reference else 0)
            measures = fid_stats and misc.is_main_process()
            stats, images = measures and load_statistics(fid_stats), reference and PlainImages(reference)
            if images:
                check_number(len(images), "reference images", NEIGHBOURS)
            return stats or None, images or None

        # All processes have all of it, or all end; errors of the references come before Inception is fetched.
        self.stats, images = misc.in_all_processes(read_references)
        self.inception = misc.in_all_processes(lambda: load_inception(inception_weights, device))
        self.reference = None
        if images:
            self.reference = self.features(images)
            warn_if_few(len(images), "reference images")

    def features(self, images: Dataset, stop_signals: misc.StopSignals | None = None) -> dict[str, Tensor]:
        """See :func:`extract_features`."""
        return extract_features(images, self.inception, self.device, *self.loading, stop_signals)

    def measure(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """:func:`compute_metrics` and the number of images on the main process; on others an empty dictionary."""
        if not misc.is_main_process():
            return {}
        count = len(features[POOL])
        warn_if_few(count, "images")
        return {"images": count, **compute_metrics(features, self.stats, self.reference)}


#: Names of the metrics in tables, in the order of the papers' tables.
TITLES = {
    "frechet_inception_distance": "FID",
    "inception_score_mean": "Inception Score",
    "inception_score_std": "Inception Score, deviation over splits",
    "precision": "precision",
    "recall": "recall",
}


def table(figures: Mapping[str, Any]) -> str:
    """The metrics as aligned lines for the terminal."""
    return "\n".join(f"{title:<40}{figures[name]:>12.4f}" for name, title in TITLES.items() if name in figures)
