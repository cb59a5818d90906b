"""Names of metrics in tables, and the reference statistics of ImageNet 256.

This module imports no network.
"""

from collections.abc import Mapping
from typing import Any

#: ADM's statistics of ImageNet 256, the reference of the paper's FID and rFID.
ADM_STATS = "fid_stats/adm_in256_stats.npz"

#: Titles of the metrics, in the order of the papers' tables.
METRIC_TITLES = {
    "frechet_inception_distance": "FID",
    "inception_score_mean": "Inception Score",
    "inception_score_std": "Inception Score, std over splits",
    "precision": "precision",
    "recall": "recall",
}


def default_statistics(img_size: int, classes: int) -> str | None:
    """Return :data:`ADM_STATS` for 256-pixel images of 1,000 classes (ImageNet), else None."""
    return ADM_STATS if (img_size, classes) == (256, 1000) else None


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return the metrics as aligned lines for the terminal."""
    return "\n".join(
        f"{title:<40}{metrics[name]:>12.4f}"
        for name, title in METRIC_TITLES.items()
        if name in metrics
    )
