"""FID, Inception Score, precision and recall from Inception's features (torch-fidelity's formulas)."""

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
    """Return ``mu [2048]`` and ``sigma [2048, 2048]`` of a reference file, float64.

    Raises:
        UserError: there is no such file, or it does not hold a mean and a covariance of Inception's features.
    """
    stats = read_arrays(path, "mu", "sigma")
    if stats["mu"].shape != (2048,) or stats["sigma"].shape != (2048, 2048):
        shapes = f"mu {list(stats['mu'].shape)}, sigma {list(stats['sigma'].shape)}"
        raise UserError(
            f"{path} has {shapes}; FID needs 2048 Inception features: mu [2048], sigma [2048, 2048]"
        )
    if any(value.dtype.kind not in "fiu" for value in stats.values()):
        raise UserError(
            f"{path}: {' and '.join(f'{n} is {v.dtype}' for n, v in stats.items())}, expected numbers"
        )
    stats = {name: value.astype(np.float64) for name, value in stats.items()}
    sigma, remedy = (
        stats["sigma"],
        "make the statistics again, of two images or more (main_metrics.py --save_stats)",
    )
    for name, value in stats.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; {remedy}")
    if (sigma.diagonal() < 0).any() or np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max():
        raise UserError(
            f"{path}: sigma is no covariance (a variance is negative, or it is not symmetric); {remedy}"
        )
    return stats


def statistics(features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Mean and covariance of the pooled features, float64."""
    return fid_features_to_statistics(features[POOL].double())


def frechet_distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """FID between two statistics."""
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


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
        warn("%d %s are fewer than Inception's 2048 features: FID is biased", count, what)


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
    figures = dict(
        isc_features_to_metric(features[LOGITS], splits=min(IS_SPLITS, len(features[LOGITS])))
    )
    if stats is None and reference is not None:
        stats = statistics(reference)
    if stats is not None:
        figures["frechet_inception_distance"] = frechet_distance(statistics(features), stats)
    if reference is not None:
        options = {
            "prc_neighborhood": NEIGHBORS,
            "prc_batch_size": 5000,
            "save_cpu_ram": True,
            "verbose": False,
        }
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
                check_number(count, "images to measure", NEIGHBORS if reference else 0)
            measures = fid_stats and distributed.is_main_process()
            stats, images = (
                measures and load_statistics(fid_stats),
                reference and PlainImages(reference),
            )
            if images:
                check_number(len(images), "reference images", NEIGHBORS)
            return stats or None, images or None

        # All processes have all of it, or all end; errors of the references come before Inception is fetched.
        self.stats, images = distributed.on_all_ranks(read_references)
        self.inception = distributed.on_all_ranks(lambda: load_inception(inception_weights, device))
        self.reference = None
        if images:
            self.reference = self.features(images)
            warn_if_few(len(images), "reference images")

    def features(
        self, images: Dataset, stop_signals: StopSignals | None = None
    ) -> dict[str, Tensor]:
        """See :func:`extract_features`."""
        return extract_features(images, self.inception, self.device, *self.loading, stop_signals)

    def measure(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """:func:`compute_metrics` and the number of images on the main process; on others an empty dictionary."""
        if not distributed.is_main_process():
            return {}
        count = len(features[POOL])
        warn_if_few(count, "images")
        return {"images": count, **compute_metrics(features, self.stats, self.reference)}
