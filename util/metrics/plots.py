"""Plots drawn with matplotlib, without a display."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from util.files import write_json, written_whole
from util.metrics.tables import LOW_IS_GOOD, METRIC_TITLES
from util.tables import markdown, write_text


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a matplotlib figure as a PNG, completely or not at all. No display is needed."""
    FigureCanvasAgg(figure)
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)


def heat_map(rows: Sequence[Mapping[str, float]], metric: str, axes) -> None:
    """Draw ``metric`` over guidance scale (horizontal) and temperature (vertical).

    Args:
        rows: the measurements, each with ``cfg``, ``temperature`` and ``metric``.
    """
    scales = sorted({row["cfg"] for row in rows})
    temperatures = sorted({row["temperature"] for row in rows})
    values = {(row["temperature"], row["cfg"]): row[metric] for row in rows}
    grid = [
        [values.get((temperature, scale), math.nan) for scale in scales]
        for temperature in temperatures
    ]
    colors = "viridis_r" if metric in LOW_IS_GOOD else "viridis"  # bright is good
    axes.imshow(grid, origin="lower", aspect="auto", cmap=colors)
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axes.set_yticks(range(len(temperatures)), [f"{temperature:g}" for temperature in temperatures])
    axes.set(xlabel="guidance scale", ylabel="temperature", title=METRIC_TITLES[metric])
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.4g}", ha="center", va="center", fontsize=8, bbox=box)


def write_search(rows: Sequence[Mapping[str, float]], out: Path) -> None:
    """Write the results of a search as ``search.md``, ``search.json`` and ``search.png``.

    Args:
        rows: the measurements, each with ``cfg``, ``temperature`` and the metrics.
        out: the folder.
    """
    metrics = [name for name in METRIC_TITLES if all(name in row for row in rows)]
    header = ["guidance", "temperature", *(METRIC_TITLES[name] for name in metrics)]
    cells = [[row["cfg"], row["temperature"], *(row[name] for name in metrics)] for row in rows]
    write_text(out / "search.md", markdown(header, cells))
    write_json(out / "search.json", list(rows))
    plotted = [name for name in metrics if not name.endswith("_std")]
    figure = Figure(figsize=(4.2 * len(plotted), 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(plotted), squeeze=False)[0]
    for axes, metric in zip(all_axes, plotted, strict=True):
        heat_map(rows, metric, axes)
    save_figure(figure, out / "search.png")
