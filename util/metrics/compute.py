"""FID, Inception Score, precision and recall from Inception features, as torch-fidelity does."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from util import distributed
from util.data.datasets import PlainImages
from util.errors import UserError
from util.files import read_arrays, written_whole
from util.log import warn
from util.metrics.inception import LOGITS, POOL, extract_features, load_inception
from util.signals import StopSignals

IS_SPLITS = 10
NEIGHBORS = 3  # k of precision and recall (Kynkaanniemi et al. 2019)


def load_statistics(path: str | Path) -> dict[str, np.ndarray]:
    """Return ``mu [2048]`` and ``sigma [2048, 2048]`` of a file of reference statistics, float64.

    Raises:
        UserError: the file does not exist, or does not contain a mean and a covariance of
            Inception's features.
    """
    stats = read_arrays(path, "mu", "sigma")
    if stats["mu"].shape != (2048,) or stats["sigma"].shape != (2048, 2048):
        shapes = f"mu {list(stats['mu'].shape)}, sigma {list(stats['sigma'].shape)}"
        raise UserError(
            f"{path} has {shapes}; FID needs 2048 Inception features: mu [2048], sigma [2048, 2048]"
        )
    if any(value.dtype.kind not in "fiu" for value in stats.values()):
        types = " and ".join(f"{name} is {value.dtype}" for name, value in stats.items())
        raise UserError(f"{path}: {types}, expected numbers")
    stats = {name: value.astype(np.float64) for name, value in stats.items()}
    sigma = stats["sigma"]
    remedy = "compute the statistics again from at least two images (main_metrics.py --save_stats)"
    for name, value in stats.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} contains NaN or infinity; {remedy}")
    if (sigma.diagonal() < 0).any() or np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max():
        raise UserError(
            f"{path}: sigma is not a covariance matrix (a variance is negative, or sigma is not "
            f"symmetric); {remedy}"
        )
    return stats


def statistics(features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the mean ``mu`` and covariance ``sigma`` of the pooled features, float64."""
    return fid_features_to_statistics(features[POOL].double())


def frechet_distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Return the FID between two statistics."""
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def save_statistics(path: str | Path, features: Mapping[str, Tensor]) -> None:
    """Write ``mu`` and ``sigma`` of features, in the format of :func:`load_statistics`."""
    stats = statistics(features)
    with written_whole(path) as file:
        np.savez(file, mu=stats["mu"], sigma=stats["sigma"])


def check_number(count: int, what: str, neighbors: int = 0) -> None:
    """Check that ``count`` images are enough for FID, or for ``neighbors`` of each image.

    Args:
        what: the name of the images in the message.
        neighbors: k of precision and recall; 0 to check for FID only.

    Raises:
        UserError: there are too few.
    """
    least = max(2, neighbors + 1)
    if count < least:
        metrics = "precision and recall" if neighbors else "FID"
        raise UserError(f"too few {what} for {metrics}: {count}, at least {least} are needed")


def warn_if_few(count: int, what: str) -> None:
    """Warn that FID is biased if there are fewer images than features."""
    if count < 2048:
        warn("%d %s are fewer than Inception's 2048 features: FID is biased", count, what)


def compute_metrics(
    features: Mapping[str, Tensor],
    stats: Mapping[str, np.ndarray] | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Return the metrics of images from their features, under torch-fidelity's names.

    Args:
        features: of the measured images.
        stats: reference statistics for FID; by default those of ``reference``.
        reference: features of reference images, for precision and recall.

    Returns:
        ``inception_score_mean``, ``inception_score_std``; ``frechet_inception_distance`` with
        statistics or a reference; ``precision``, ``recall``, ``f_score`` with a reference.
    """
    splits = min(IS_SPLITS, len(features[LOGITS]))
    metrics = dict(isc_features_to_metric(features[LOGITS], splits=splits))
    if stats is None and reference is not None:
        stats = statistics(reference)
    if stats is not None:
        metrics["frechet_inception_distance"] = frechet_distance(statistics(features), stats)
    if reference is not None:
        metrics |= prc_features_to_metric(
            features[POOL],
            reference[POOL],
            prc_neighborhood=NEIGHBORS,
            prc_batch_size=5000,
            save_cpu_ram=True,
            verbose=False,
        )
    return metrics


class Evaluator:
    """Inception and the reference, loaded and checked before sampling, so that errors come early.

    Args:
        inception_weights: see :func:`util.metrics.inception.find_inception_weights`.
        fid_stats: ``.npz`` of reference statistics, or None.
        reference: folder or ``.npz`` of reference images, or None.
        count: the number of images that will be measured.

    Raises:
        UserError: on all ranks, if a file is missing or has the wrong content, or if there are too
            few images for the metrics.
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
        self.device = device
        self.batch_size = batch_size
        self.num_workers = num_workers

        def read_references() -> tuple[dict[str, np.ndarray] | None, PlainImages | None]:
            if fid_stats or reference:
                check_number(count, "images to measure", NEIGHBORS if reference else 0)
            stats = None
            if fid_stats and distributed.is_main_process():
                stats = load_statistics(fid_stats)
            images = PlainImages(reference) if reference else None
            if images:
                check_number(len(images), "reference images", NEIGHBORS)
            return stats, images

        # An error on one rank ends all ranks. References first: Inception may be downloaded.
        self.stats, images = distributed.on_all_ranks(read_references)
        self.inception = distributed.on_all_ranks(lambda: load_inception(inception_weights, device))
        self.reference = None
        if images:
            self.reference = self.features(images)
            warn_if_few(len(images), "reference images")

    def features(
        self, images: Dataset, stop_signals: StopSignals | None = None
    ) -> dict[str, Tensor]:
        """Return Inception's features; see :func:`util.metrics.inception.extract_features`."""
        return extract_features(
            images, self.inception, self.device, self.batch_size, self.num_workers, stop_signals
        )

    def measure(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return :func:`compute_metrics` and the number of images on rank 0, else an empty dict."""
        if not distributed.is_main_process():
            return {}
        count = len(features[POOL])
        warn_if_few(count, "images")
        return {"images": count, **compute_metrics(features, self.stats, self.reference)}
