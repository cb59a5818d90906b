"""Names of metrics in tables, and the reference of ImageNet 256. Importing this module loads no network."""

from collections.abc import Mapping
from typing import Any

#: ADM's statistics of ImageNet 256, which the paper's FID and rFID are measured against.
ADM_STATS = "fid_stats/adm_in256_stats.npz"

#: Names of the metrics in tables, in the order of the papers' tables.
METRIC_TITLES = {
    "frechet_inception_distance": "FID",
    "inception_score_mean": "Inception Score",
    "inception_score_std": "Inception Score, deviation over splits",
    "precision": "precision",
    "recall": "recall",
}


def default_statistics(img_size: int, classes: int) -> str | None:
    """Return :data:`ADM_STATS` for images of ImageNet's 1,000 classes at 256 pixels; None for others."""
    return ADM_STATS if (img_size, classes) == (256, 1000) else None


def metrics_table(figures: Mapping[str, Any]) -> str:
    """The metrics as aligned lines for the terminal."""
    return "\n".join(
        f"{title:<40}{figures[name]:>12.4f}"
        for name, title in METRIC_TITLES.items()
        if name in figures
    )
