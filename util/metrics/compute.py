"""Frechet and kernel distance, class score, precision and recall, as torch-fidelity does.

With Inception's features, the first three are FID, KID and Inception Score.
"""

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
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)
from torch_fidelity.metric_prc import prc_features_to_metric

from util import distributed
from util.data.datasets import PlainImages
from util.errors import UserError
from util.files import read_arrays, written_whole
from util.log import warn
from util.metrics.inception import Inception
from util.metrics.networks import (
    LOGITS,
    POOL,
    DINOv2,
    EfficientNet,
    FeatureNetwork,
    extract_features,
)
from util.metrics.tables import FEATURES, METRIC_TITLES, metric_names
from util.signals import StopSignals

IS_SPLITS = 10
KID_SUBSET = 1000  # images of a random subset, or all if there are fewer
NEIGHBORS = 3  # k of precision and recall (Kynkaanniemi et al. 2019)
#: Values of ``--features``.
NETWORKS: dict[str, type[FeatureNetwork]] = {
    network.name: network for network in (Inception, EfficientNet, DINOv2)
}


def load_statistics(
    path: str | Path, network: type[FeatureNetwork] | FeatureNetwork = Inception
) -> dict[str, np.ndarray]:
    """Return ``mu [D]`` and ``sigma [D, D]`` of a file of reference statistics, float64.

    Args:
        network: the network whose features they must be of. A file that names none, such as ADM's,
            has those of Inception.

    Raises:
        UserError: the file does not exist, or does not contain a mean and a covariance of these
            features.
    """
    stats = read_arrays(path, "mu", "sigma")
    saved = saved_features(path)
    if saved != network.name:
        raise UserError(f"{path} has statistics of {saved} features: pass --features {saved}")
    check_width(stats, network.widths.get(POOL, stats["mu"].size), path, network)
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


def check_width(
    stats: Mapping[str, np.ndarray],
    width: int,
    path: str | Path,
    network: type[FeatureNetwork] | FeatureNetwork,
) -> None:
    """Raise UserError unless statistics are of ``width`` features."""
    if stats["mu"].shape != (width,) or stats["sigma"].shape != (width, width):
        shapes = f"mu {list(stats['mu'].shape)}, sigma {list(stats['sigma'].shape)}"
        raise UserError(
            f"{path} has {shapes}; {width} features of {FEATURES[network.name]} need "
            f"mu [{width}], sigma [{width}, {width}]"
        )


def statistics(features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the mean ``mu`` and covariance ``sigma`` of the pooled features, float64."""
    return fid_features_to_statistics(features[POOL].double())


def frechet_distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Return the Frechet distance between two statistics; with Inception's features, the FID."""
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def save_statistics(path: str | Path, features: Mapping[str, Tensor], network: str) -> None:
    """Write ``mu``, ``sigma`` and the ``network`` of features, for :func:`load_statistics`."""
    stats = statistics(features)
    with written_whole(path) as file:
        np.savez(file, mu=stats["mu"], sigma=stats["sigma"], features=network)


def saved_features(path: str | Path) -> str:
    """Return the network that a file of statistics names, Inception by default."""
    with np.load(path, allow_pickle=False) as file:
        return str(file["features"]) if "features" in file else Inception.name


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


def warn_if_few(count: int, what: str, network: FeatureNetwork) -> None:
    """Warn that the Frechet distance is biased if there are fewer images than features."""
    width, metric = network.widths[POOL], METRIC_TITLES[metric_names(network.name)["frechet"]]
    if count < width:
        text = (
            "%d %s are fewer than %s's %d features: %s is too high, and only comparable with that "
            "of equally many"
        )
        warn(text, count, what, FEATURES[network.name], width, metric)


def compute_metrics(
    features: Mapping[str, Tensor],
    stats: Mapping[str, np.ndarray] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    network: str = Inception.name,
) -> dict[str, float]:
    """Return the metrics of images from their features, see :data:`util.metrics.tables.METRICS`.

    Args:
        features: of the measured images.
        stats: reference statistics for the Frechet distance; by default those of ``reference``.
        reference: features of reference images, for the other distances.
        network: the features, a name in :data:`NETWORKS`.

    Returns:
        class score and its std, if the network has classes; Frechet distance, with statistics or a
        reference; kernel distance and its std, precision and recall, with a reference.
    """
    metrics: dict[str, float] = {}
    if features[LOGITS].shape[1]:
        splits = min(IS_SPLITS, len(features[LOGITS]))
        score = isc_features_to_metric(features[LOGITS], splits=splits)
        metrics["score"] = score["inception_score_mean"]
        metrics["score_std"] = score["inception_score_std"]
    if stats is None and reference is not None:
        stats = statistics(reference)
    if stats is not None:
        metrics["frechet"] = frechet_distance(statistics(features), stats)
    if reference is not None:
        metrics |= reference_metrics(features[POOL], reference[POOL])
    names = metric_names(network)
    return {names[metric]: value for metric, value in metrics.items()}


def reference_metrics(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the distances of features ``[N, D]`` to those of reference images ``[M, D]``."""
    subset = min(KID_SUBSET, len(features), len(reference))
    kernel = kid_features_to_metric(
        features.double(), reference.double(), kid_subset_size=subset, verbose=False
    )
    precision_recall = prc_features_to_metric(
        features,
        reference,
        prc_neighborhood=NEIGHBORS,
        prc_batch_size=5000,
        save_cpu_ram=True,
        verbose=False,
    )
    return {
        "kernel": kernel[KEY_METRIC_KID_MEAN],
        "kernel_std": kernel[KEY_METRIC_KID_STD],
        **precision_recall,
    }


class Evaluator:
    """Network and reference, loaded and checked before sampling, so that errors come early.

    Args:
        features: the network, a name in :data:`NETWORKS`.
        weights: its weights; by default the published ones.
        fid_stats: ``.npz`` of reference statistics, or None.
        reference: folder or ``.npz`` of reference images, or None.
        count: the number of images that will be measured.

    Raises:
        UserError: on all ranks, if a file is missing or has the wrong content, or if there are too
            few images for the metrics.
    """

    def __init__(
        self,
        features: str,
        weights: str | None,
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
                stats = load_statistics(fid_stats, NETWORKS[features])
            images = PlainImages(reference) if reference else None
            if images:
                check_number(len(images), "reference images", NEIGHBORS)
            return stats, images

        # An error on one rank ends all ranks. References first: weights may be downloaded.
        self.stats, images = distributed.on_all_ranks(read_references)
        self.network = distributed.on_all_ranks(lambda: NETWORKS[features](weights).to(device))

        def check_stats() -> None:
            if self.stats is not None and fid_stats is not None:  # the weights decide the width
                check_width(self.stats, self.network.widths[POOL], fid_stats, self.network)

        distributed.on_rank_0(check_stats)
        self.reference = None
        if images:
            self.reference = self.features(images)
            warn_if_few(len(images), "reference images", self.network)

    def features(
        self, images: Dataset, stop_signals: StopSignals | None = None
    ) -> dict[str, Tensor]:
        """Return the features of images; see :func:`util.metrics.networks.extract_features`."""
        return extract_features(
            images, self.network, self.device, self.batch_size, self.num_workers, stop_signals
        )

    def measure(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return :func:`compute_metrics` and the number of images on rank 0, else an empty dict."""
        if not distributed.is_main_process():
            return {}
        count = len(features[POOL])
        warn_if_few(count, "images", self.network)
        metrics = compute_metrics(features, self.stats, self.reference, self.network.name)
        return {"images": count, **metrics}
