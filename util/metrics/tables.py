"""Names of metrics in tables, and the reference statistics of ImageNet 256.

This module imports no network.
"""

from collections.abc import Mapping
from typing import Any

#: ADM's statistics of ImageNet 256, the reference of the paper's FID and rFID.
ADM_STATS = "fid_stats/adm_in256_stats.npz"

#: Titles of the networks whose features compare images, by the value of ``--features``.
FEATURES = {"inception": "Inception", "efficientnet": "EfficientNet-Lite0", "dinov2": "DINOv2"}


#: Metrics: pattern of the name, title with Inception's features, title with others.
METRICS = {
    "frechet": ("frechet_{}_distance", "FID", "Frechet distance"),
    "kernel": ("kernel_{}_distance_mean", "KID", "kernel distance"),
    "kernel_std": (
        "kernel_{}_distance_std",
        "KID, std over subsets",
        "kernel distance, std over subsets",
    ),
    "score": ("{}_score_mean", "Inception Score", "class score"),
    "score_std": (
        "{}_score_std",
        "Inception Score, std over splits",
        "class score, std over splits",
    ),
    "precision": ("{}_precision", "precision", "precision"),
    "recall": ("{}_recall", "recall", "recall"),
    "f_score": ("{}_f_score", "F-score", "F-score"),
}


def metric_names(features: str) -> dict[str, str]:
    """Return the names of :data:`METRICS` in results; with Inception they are torch-fidelity's."""
    names = {metric: pattern.format(features) for metric, (pattern, *_) in METRICS.items()}
    if features == "inception":
        names |= {metric: metric for metric in ("precision", "recall", "f_score")}
    return names


def metric_titles(features: str) -> dict[str, str]:
    """Return titles by name; all but those of Inception say which features were used."""
    titles = {}
    for metric, name in metric_names(features).items():
        _, title, other_title = METRICS[metric]
        titles[name] = title if features == "inception" else f"{other_title} ({FEATURES[features]})"
    return titles


#: Titles of all metrics by name, in the order of the papers' tables.
METRIC_TITLES = {
    name: title for features in FEATURES for name, title in metric_titles(features).items()
}
#: Names of the metrics that are better when low.
LOW_IS_GOOD = {
    metric_names(features)[metric] for features in FEATURES for metric in ("frechet", "kernel")
}


def default_statistics(img_size: int, classes: int, features: str) -> str | None:
    """Return :data:`ADM_STATS` for Inception on 256 pixels and 1,000 classes, else None."""
    return ADM_STATS if (img_size, classes, features) == (256, 1000, "inception") else None


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return the metrics as aligned lines for the terminal."""
    titles = {name: title for name, title in METRIC_TITLES.items() if name in metrics}
    width = max([40, *map(len, titles.values())])
    return "\n".join(f"{title:<{width}}{metrics[name]:>12.4f}" for name, title in titles.items())
