"""Reads the files of results: what the seeds of a row have measured, their spread, and how rows differ."""

import math
import statistics
from collections.abc import Collection, Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t

from experiments.plan import FLOOR, Experiments, Row
from util.files import read_json
from util.tables import markdown

RESULTS = Path(__file__).parent / "results"
FLOOR_ROW = Row("training images, the floor", FLOOR, None, None)


class Measure(NamedTuple):
    """Something that results hold."""

    title: str
    keys: tuple[str, ...]  # where it lies in a result, or in the images of a guidance scale
    digits: int  # that are shown behind the point
    margin: float = 0.0  # what is worse by no more than this counts as no worse
    share: float = 0.0  # or by no more than this share
    of_images: bool = True
    limits: tuple[float, float] = (-math.inf, math.inf)  # of possible values


MEASURES = {
    "frechet": Measure("Frechet distance", ("pixels", "frechet"), 1, share=0.05),
    "precision": Measure("precision", ("pixels", "precision"), 3, 0.05, limits=(0, 1)),
    "recall": Measure("recall", ("pixels", "recall"), 3, 0.05, limits=(0, 1)),
    "density": Measure("density", ("pixels", "density"), 2),
    "coverage": Measure("coverage", ("pixels", "coverage"), 3, 0.02, limits=(0, 1)),
    "features": Measure("Frechet distance in features", ("features", "frechet"), 1, share=0.05),
    "nats": Measure("nats a dimension", ("nats",), 3, 0.02, of_images=False),
    "continuous_bits": Measure(
        "continuous bits a dimension", ("continuous_bits",), 3, 0.03, of_images=False
    ),
    "psnr_db": Measure("PSNR, dB", ("psnr_db",), 2, 0.5, of_images=False),
}


class Results:
    """The results of a folder at one scale, by row and seed.

    Args:
        folder: of the scales' folders.
        scale: the name of one.
        seeds: those to read; by default all.
        without: seeds to leave out.
    """

    def __init__(
        self,
        folder: str | Path,
        scale: str,
        seeds: Container[int] | None = None,
        without: Container[int] = (),
    ):
        self.found: dict[str, dict[int, dict[str, Any]]] = {}
        contents = [read_json(path) for path in (Path(folder) / scale).glob("*.json")]
        for content in sorted(contents, key=lambda content: content["seed"]):
            if (seeds is None or content["seed"] in seeds) and content["seed"] not in without:
                self.found.setdefault(content["result"], {})[content["seed"]] = content

    def guidance_scales(self, row: Row) -> list[str]:
        """What a row's images are told apart by: guidance scales, or ``images`` for reconstructions."""
        there = dict.fromkeys(cfg for content in self.of(row).values() for cfg in content["images"])
        return [cfg for cfg in there if row.cfg is None or float(cfg) == row.cfg]

    def of(self, row: Row) -> dict[int, dict[str, Any]]:
        """The row's results by seed."""
        return self.found.get(row.result, {})

    def values(self, row: Row, name: str, cfg: str) -> dict[int, float]:
        """A measure by seed, where the seed's result has it."""
        measure, values = MEASURES[name], {}
        for seed, content in self.of(row).items():
            *groups, last = measure.keys
            part = content["images"].get(cfg, {}) if measure.of_images else content
            for group in groups:
                part = part.get(group, {})
            if last in part:
                values[seed] = part[last]
        return values


# --------------------------------------------------------------------------------------------------------------------
# Statistics.


def interval(values: Collection[float], more: int) -> tuple[float, float] | None:
    """Student's 95% interval: of the mean (``more`` is 0), or of one further value (1); None for too few values.

    The mean needs two; a further value three, since two that happen to be close promise too much.
    """
    count = len(values)
    if count < 2 + more:
        return None
    half = t.ppf(0.975, count - 1) * statistics.stdev(values) * math.sqrt(more + 1 / count)
    return statistics.mean(values) - half, statistics.mean(values) + half


def between(limits: tuple[float, float] | None, digits: int) -> str:
    """An interval, as text."""
    return "-" if limits is None else f"{limits[0]:.{digits}f} to {limits[1]:.{digits}f}"


def prediction(values: Collection[float], measure: Measure) -> tuple[float, float] | None:
    """The :func:`interval` of one further value, within what is possible."""
    limits, (least, most) = interval(values, 1), measure.limits
    return limits and (max(limits[0], least), min(limits[1], most))


def spread(values: Collection[float], digits: int) -> str | None:
    """Mean and standard deviation; one value alone, or the same again and again, as it is; none as None."""
    if len({*values}) < 2:
        return f"{next(iter(values)):.{digits}f}" if values else None
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def verdict(differences: Collection[float], expected: str, margin: float) -> str:
    """Whether ``differences``, one a seed, show what is expected.

    Args:
        expected: ``lower``, ``higher``, ``not lower`` or ``not higher``. The last two leave the margin.
        margin: 0 or more.
    """
    sign = -1 if expected.endswith("lower") else 1
    asked, margin = (-sign, margin) if expected.startswith("not") else (sign, 0.0)
    signed = [asked * difference + margin for difference in differences]  # above 0: as expected
    limits = interval(signed, 0)
    if limits is not None and limits[0] * limits[1] > 0:
        return "holds" if limits[0] > 0 else "does not hold"
    return f"cannot be told; so in {sum(value > 0 for value in signed)} of {len(signed)}"


# --------------------------------------------------------------------------------------------------------------------
# Tables.


def lines(results: Results, rows: Iterable[Row]) -> list[tuple[Row, str]]:
    """The lines of a table: each row with each of its guidance scales; a row without results once, with none."""
    return [(row, cfg) for row in rows for cfg in results.guidance_scales(row) or [""]]


def measured(results: Results, shown: list[tuple[Row, str]]) -> list[str]:
    """The measures that any of the lines has, but of reconstructions those of neighbours: all have their originals."""
    there = [name for name in MEASURES if any(results.values(row, name, cfg) for row, cfg in shown)]
    neighbours = ("precision", "recall", "density", "coverage")
    return [name for name in there if name not in neighbours or "psnr_db" not in there]


def row_table(results: Results, rows: Iterable[Row]) -> str:
    """A table of results: mean, deviation and prediction interval of each measure; where and how long trainings ran."""
    shown = lines(results, rows)
    names = measured(results, shown)
    cells = []
    for row, cfg in shown:
        line = [row.name, cfg.replace("images", "") or None, seeds_of(results, row)]
        for name in names:
            values, measure = results.values(row, name, cfg).values(), MEASURES[name]
            text, known = spread(values, measure.digits), prediction(values, measure)
            fewer = f", {len(values)} seeds" if 0 < len(values) < len(results.of(row)) else ""
            around = f" ({between(known, measure.digits)})" if known and known[0] < known[1] else ""
            line.append(text and text + around + fewer)
        cells.append([*line, "{}, {}".format(*row.paper) if row.paper else None])
    titles = [MEASURES[name].title for name in names]
    return markdown(["row", "guidance", "seeds: training, s", *titles, "paper: FID, IS"], cells)


def short_table(results: Results, rows: Iterable[Row]) -> str:
    """A table of means and deviations of Frechet distance, precision and recall at guidance scales 1 and 2."""
    measures = [("frechet", "1"), ("frechet", "2"), ("precision", "1"), ("recall", "1")]
    cells = []
    for row in rows:
        found = [
            (results.values(row, name, cfg).values(), MEASURES[name].digits)
            for name, cfg in measures
        ]
        cells.append([row.name, len(results.of(row)), *(spread(*each) for each in found)])
    return markdown(
        ["row", "seeds", *(f"{MEASURES[name].title}, guidance {cfg}" for name, cfg in measures)],
        cells,
    )


def seeds_of(results: Results, row: Row) -> str:
    """How many seeds a row has on each device, and the mean of their training's seconds."""
    devices: dict[str, list[float | None]] = {}
    for content in results.of(row).values():
        devices.setdefault(content["device"].split(",")[0], []).append(content["training_seconds"])
    parts = []
    for device, seconds in devices.items():
        known = [value for value in seconds if value is not None]
        parts.append(
            f"{len(seconds)} {device}" + (f": {statistics.mean(known):.0f}" if known else "")
        )
    return "; ".join(parts) or "not measured"


def beside(results: Results, committed: Results, rows: Iterable[Row]) -> str:
    """A table of each seed of ``results``, with the prediction interval that the other results leave for it."""
    shown = lines(results, rows)
    names = measured(results, shown)
    cells = []
    for row, cfg in shown:
        for seed in results.of(row):
            line: list[Any] = [row.name, cfg, seed]
            for name in names:
                value, measure = results.values(row, name, cfg).get(seed), MEASURES[name]
                known = between(
                    prediction(committed.values(row, name, cfg).values(), measure), measure.digits
                )
                line.append(None if value is None else f"{value:.{measure.digits}f} ({known})")
            cells.append(line)
    return markdown(["row", "guidance", "seed", *(MEASURES[name].title for name in names)], cells)


def finding_table(results: Results, experiments: Experiments) -> str:
    """A table of what the findings of a scale come to, over the seeds that both rows of each have."""
    cells: list[list[Any]] = []
    for finding in experiments.content["findings"].get(experiments.scale, []):
        rows = {row.name: row for row in experiments.rows(finding["table"])}
        pair = [rows[name] for name in finding["rows"]]
        told = [
            finding["claim"],
            " and ".join(f"{row.paper[0]:g}" for row in pair if row.paper) or None,
        ]
        for asked, expected in finding["measures"].items():
            name, _, cfg = asked.partition(" ")
            scales = [cfg or (f"{row.cfg:g}" if row.cfg else "") for row in pair]
            first, second = (
                results.values(row, name, cfg) for row, cfg in zip(pair, scales, strict=True)
            )
            seeds, measure = [seed for seed in first if seed in second], MEASURES[name]
            if not seeds:
                continue
            means = [statistics.mean(values[seed] for seed in seeds) for values in (first, second)]
            differences, digits = [first[seed] - second[seed] for seed in seeds], measure.digits
            cells.append(
                [
                    *told,
                    measure.title + (f", guidance {cfg}" if cfg.isdigit() else ""),
                    " and ".join(f"{mean:.{digits}f}" for mean in means),
                    f"{means[0] - means[1]:+.{digits}f} ({between(interval(differences, 0), digits)})",
                    len(seeds),
                    verdict(differences, expected, measure.margin + measure.share * means[1]),
                ]
            )
            told = ["", ""]
    return markdown(
        ["finding", "paper, FID", "measure", "means", "difference (95% interval)", "seeds", "here"],
        cells,
    )
