"""Read the result files, compute their statistics and format them as tables."""

import math
import statistics
from collections.abc import Collection, Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t

from experiments.plan import BASELINE, Experiments, Row
from util.files import read_json
from util.tables import markdown

RESULTS = Path(__file__).parent / "results"
BASELINE_ROW = Row("training images (baseline)", BASELINE, None, None)


class Measure(NamedTuple):
    """A number of a result file."""

    title: str
    keys: tuple[str, ...]  # path to the number in the result, or in the images of a guidance scale
    digits: int  # decimals to show
    margin: float = 0.0  # differences up to this count as no difference,
    relative_margin: float = 0.0  # or up to this fraction of the second row's mean
    of_images: bool = True
    limits: tuple[float, float] = (-math.inf, math.inf)  # smallest and largest possible value

    @property
    def better(self) -> str:
        """Which values are better: ``lower`` of distances, nats and bits, ``higher`` of others."""
        falls = any(word in self.title for word in ("distance", "nats", "bits"))
        return "lower" if falls else "higher"


MEASURES = {
    "frechet": Measure("Frechet distance", ("pixels", "frechet"), 1, relative_margin=0.05),
    "precision": Measure("precision", ("pixels", "precision"), 3, 0.05, limits=(0, 1)),
    "recall": Measure("recall", ("pixels", "recall"), 3, 0.05, limits=(0, 1)),
    "density": Measure("density", ("pixels", "density"), 2),
    "coverage": Measure("coverage", ("pixels", "coverage"), 3, 0.02, limits=(0, 1)),
    "features": Measure(
        "Frechet distance in features", ("features", "frechet"), 1, relative_margin=0.05
    ),
    "nats": Measure("nats per dimension", ("nats",), 3, 0.02, of_images=False),
    "continuous_bits": Measure(
        "continuous bits per dimension", ("continuous_bits",), 3, 0.03, of_images=False
    ),
    "recognized": Measure("share recognized", ("recognized",), 3, 0.02, limits=(0, 1)),
    "psnr_db": Measure("PSNR, dB", ("psnr_db",), 2, 0.5, of_images=False),
    "ssim": Measure("SSIM", ("ssim",), 3, 0.01, of_images=False),
    "map_distance": Measure(
        "distance of feature maps (EfficientNet-Lite0)",
        ("efficientnet_map_distance",),
        3,
        relative_margin=0.05,
        of_images=False,
    ),
    "frechet_to_originals": Measure(
        "Frechet distance to the originals (EfficientNet-Lite0)",
        ("frechet_efficientnet_distance_to_originals",),
        2,
        relative_margin=0.05,
        of_images=False,
    ),
    "same_class": Measure(
        "same predicted class (EfficientNet-Lite0)",
        ("efficientnet_same_class_share",),
        3,
        0.02,
        limits=(0, 1),
        of_images=False,
    ),
}
#: Not shown for reconstructions, which are compared with their own originals.
NEIGHBOR_MEASURES = ("precision", "recall", "density", "coverage")


class Results:
    """The results of one scale, by row and seed.

    Args:
        folder: folder that has a folder for each scale.
        scale: name of the scale.
        seeds: seeds to read; by default all.
        without: seeds to leave out.
    """

    def __init__(
        self,
        folder: str | Path,
        scale: str,
        seeds: Container[int] | None = None,
        without: Container[int] = (),
    ):
        self.by_name: dict[str, dict[int, dict[str, Any]]] = {}
        contents = [read_json(path) for path in (Path(folder) / scale).glob("*.json")]
        for content in sorted(contents, key=lambda content: content["seed"]):
            seed = content["seed"]
            if (seeds is None or seed in seeds) and seed not in without:
                self.by_name.setdefault(content["result"], {})[seed] = content

    def of(self, row: Row) -> dict[int, dict[str, Any]]:
        """Return the results of a row by seed."""
        return self.by_name.get(row.result, {})

    def guidance_scales(self, row: Row) -> list[str]:
        """Return the guidance scales of a row's samples, or ``["images"]`` for other images."""
        contents = self.of(row).values()
        scales = dict.fromkeys(cfg for content in contents for cfg in content["images"])
        return [cfg for cfg in scales if row.cfg is None or float(cfg) == row.cfg]

    def values(self, row: Row, name: str, cfg: str) -> dict[int, float]:
        """Return a measure by seed; seeds whose result does not have it are left out."""
        measure, values = MEASURES[name], {}
        for seed, content in self.of(row).items():
            space = content.get("space", "pixels")
            *groups, last = (space if key == "pixels" else key for key in measure.keys)
            part = content["images"].get(cfg, {}) if measure.of_images else content
            for group in groups:
                part = part.get(group, {})
            if last in part:
                values[seed] = part[last]
        return values


# --------------------------------------------------------------------------------------------------
# Statistics.


def confidence_interval(values: Collection[float]) -> tuple[float, float] | None:
    """Return Student's 95% interval of the mean, or None for fewer than two values."""
    return None if len(values) < 2 else student_interval(values, 1 / len(values))


def prediction_interval(
    values: Collection[float], limits: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float] | None:
    """Return Student's 95% interval of one more value, clipped to ``limits``.

    Returns None for fewer than three values: two values are often close by chance.
    """
    if len(values) < 3:
        return None
    low, high = student_interval(values, 1 + 1 / len(values))
    return max(low, limits[0]), min(high, limits[1])


def student_interval(values: Collection[float], variance: float) -> tuple[float, float]:
    """Return Student's 95% interval around the mean, for ``variance`` times that of the values."""
    mean, std = statistics.mean(values), statistics.stdev(values)
    half_width = t.ppf(0.975, len(values) - 1) * std * math.sqrt(variance)
    return mean - half_width, mean + half_width


def verdict(
    differences: Collection[float], expected: str, margin: float, exact: bool = False
) -> str:
    """Return whether ``differences``, one per seed, are as expected.

    Args:
        expected: ``lower``, ``higher``, ``not lower`` or ``not higher``.
        margin: tolerance of ``not lower`` and ``not higher``, 0 or more.
        exact: nothing is random: one difference decides.
    """
    sign = -1 if expected.endswith("lower") else 1
    if expected.startswith("not"):
        sign = -sign
    else:
        margin = 0.0
    signed = [sign * difference + margin for difference in differences]  # positive: as expected
    interval = (min(signed), max(signed)) if exact else confidence_interval(signed)
    if interval is not None and interval[0] * interval[1] > 0:
        return "holds" if interval[0] > 0 else "does not hold"
    return f"inconclusive ({sum(value > 0 for value in signed)} of {len(signed)} seeds agree)"


# --------------------------------------------------------------------------------------------------
# Formatting.


def format_interval(interval: tuple[float, float] | None, digits: int) -> str:
    """Return an interval as text, a dash for None."""
    return "-" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def format_values(values: Collection[float], digits: int) -> str | None:
    """Return mean ± standard deviation, only the mean if all values are equal, None if empty."""
    if not values:
        return None
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len({*values}) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def format_seeds(results: Results, row: Row) -> str:
    """Return the number of seeds on each device, and the mean seconds of their trainings."""
    devices: dict[str, list[float | None]] = {}
    for content in results.of(row).values():
        device = content["device"].split(",")[0]
        devices.setdefault(device, []).append(content["training_seconds"])
    parts = []
    for device, seconds in devices.items():
        known = [value for value in seconds if value is not None]
        mean = f": {statistics.mean(known):.0f}" if known else ""
        parts.append(f"{len(seconds)} {device}{mean}")
    return "; ".join(parts) or "not measured"


# --------------------------------------------------------------------------------------------------
# Tables.


def table_lines(results: Results, rows: Iterable[Row]) -> list[tuple[Row, str]]:
    """Return each row with each of its guidance scales, or with "" if it has no results."""
    return [(row, cfg) for row in rows for cfg in results.guidance_scales(row) or [""]]


def shown_measures(results: Results, lines: list[tuple[Row, str]]) -> list[str]:
    """Return the measures that any line has, without those that reconstructions do not need."""
    names = [name for name in MEASURES if any(results.values(row, name, cfg) for row, cfg in lines)]
    hidden = {*NEIGHBOR_MEASURES} if "psnr_db" in names else set()
    if any(
        content.get("space") == "features"
        for row, _ in lines
        for content in results.of(row).values()
    ):
        hidden.add("features")  # the same as "frechet"
    return [name for name in names if name not in hidden]


def row_table(results: Results, rows: Iterable[Row]) -> str:
    """Return a table with mean, standard deviation and prediction interval of each measure."""
    lines = table_lines(results, rows)
    names = shown_measures(results, lines)
    cells = []
    for row, cfg in lines:
        line = [row.name, cfg.replace("images", "") or None, format_seeds(results, row)]
        for name in names:
            values, measure = results.values(row, name, cfg).values(), MEASURES[name]
            text = format_values(values, measure.digits)
            interval = prediction_interval(values, measure.limits)
            if interval and interval[0] < interval[1]:
                text = f"{text} ({format_interval(interval, measure.digits)})"
            if 0 < len(values) < len(results.of(row)):
                text = f"{text}, {len(values)} seed{'s' * (len(values) > 1)}"
            line.append(text)
        cells.append([*line, "{}, {}".format(*row.paper) if row.paper else None])
    titles = [MEASURES[name].title for name in names]
    return markdown(
        ["row", "guidance", "seeds: training seconds", *titles, "paper: FID, IS"], cells
    )


def short_table(results: Results, rows: Iterable[Row]) -> str:
    """Return a table of mean and standard deviation of the most important measures."""
    measures = [("frechet", "1"), ("frechet", "2"), ("precision", "1"), ("recall", "1")]
    cells = []
    for row in rows:
        line: list[Any] = [row.name, len(results.of(row))]
        for name, cfg in measures:
            values = results.values(row, name, cfg).values()
            line.append(format_values(values, MEASURES[name].digits))
        cells.append(line)
    titles = [f"{MEASURES[name].title}, guidance {cfg}" for name, cfg in measures]
    return markdown(["row", "seeds", *titles], cells)


def comparison_table(results: Results, committed: Results, rows: Iterable[Row]) -> str:
    """Return a table of each seed of ``results`` and the prediction interval of ``committed``."""
    lines = table_lines(results, rows)
    names = shown_measures(results, lines)
    cells = []
    for row, cfg in lines:
        for seed in results.of(row):
            line: list[Any] = [row.name, cfg, seed]
            for name in names:
                value, measure = results.values(row, name, cfg).get(seed), MEASURES[name]
                others = committed.values(row, name, cfg).values()
                interval = prediction_interval(others, measure.limits)
                text = f"({format_interval(interval, measure.digits)})"
                line.append(None if value is None else f"{value:.{measure.digits}f} {text}")
            cells.append(line)
    titles = [MEASURES[name].title for name in names]
    return markdown(["row", "guidance", "seed", *titles], cells)


def finding_table(results: Results, experiments: Experiments) -> str:
    """Return a table of the verdicts on a scale's findings, over seeds that both rows have."""
    cells: list[list[Any]] = []
    for finding in experiments.content["findings"].get(experiments.scale, []):
        rows = {row.name: row for row in experiments.rows(finding["table"])}
        first_row, second_row = (rows[name] for name in finding["rows"])
        paper = [f"{row.paper[0]:g}" for row in (first_row, second_row) if row.paper]
        claim = [finding["claim"], " and ".join(paper) or None]
        for key, expected in finding["measures"].items():
            name, _, cfg = key.partition(" ")
            measure = MEASURES[name]
            first, second = (
                results.values(row, name, cfg or (f"{row.cfg:g}" if row.cfg else ""))
                for row in (first_row, second_row)
            )
            seeds = [seed for seed in first if seed in second]
            if not seeds:
                continue
            means = [statistics.mean(values[seed] for seed in seeds) for values in (first, second)]
            differences = [first[seed] - second[seed] for seed in seeds]
            interval = format_interval(confidence_interval(differences), measure.digits)
            margin = measure.margin + measure.relative_margin * means[1]
            cells.append(
                [
                    *claim,
                    measure.title + (f", guidance {cfg}" if cfg.isdigit() else ""),
                    " and ".join(f"{mean:.{measure.digits}f}" for mean in means),
                    f"{means[0] - means[1]:+.{measure.digits}f} ({interval})",
                    len(seeds),
                    verdict(
                        differences, expected, margin, experiments.commands.get("exact", False)
                    ),
                ]
            )
            claim = ["", ""]
    header = ["claim", "paper, FID", "measure", "means", "difference (95% interval)", "seeds"]
    return markdown([*header, "verdict"], cells)
