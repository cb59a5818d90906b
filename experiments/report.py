"""Write tables, plots and quoted numbers from the files in ``experiments/results``."""

import argparse
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import ttest_ind

import main_tokenbridge
from experiments.plan import BASELINE, DEFAULT, Experiments, Row, Step, plan
from experiments.results import (
    BASELINE_ROW,
    MEASURES,
    RESULTS,
    Results,
    finding_table,
    row_table,
    short_table,
)
from models.tokenbridge import MODELS, TokenBridge, sizes_of
from tools import scaling
from util import errors
from util.config import KL16_CONFIG, KL16_LATENT_FACTOR, Start, TokenizerInfo, resolve
from util.files import read_json
from util.log import duration
from util.metrics.plots import save_figure
from util.tables import fill, markdown, write_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "experiments/README.md",
        "docs/evaluation.md",
        "docs/experiments.md",
        "docs/variants.md",
    )
]
CURVES_FOLDER = RESULTS / "curves"
COST_FOLDER = RESULTS / "cost"
SCALES = ("digits", "cifar10", "photographs", "objects", "objects3")
#: Rows that README.md quotes.
QUOTED = ("autoregressive, 38 epochs", "parallel, 38 epochs", "masked, 85 epochs, 4 steps")
GUIDANCE_COLORS = {"1": "C0", "2": "C1", "3": "C2"}
GUIDANCE_OFFSETS = {"1": -0.15, "2": 0.15, "3": 0.15}  # so that dots of a row do not overlap
#: Measures that plots show, if there are any.
SAMPLE_MEASURES = ["frechet", "precision", "recall"]
RECONSTRUCTION_MEASURES = ["frechet", "psnr_db", "frechet_to_originals", "same_class"]
#: Measures of a table that is drawn as curves.
CURVE_MEASURES = ["nats", "frechet", "precision", "recall", "recognized"]

# --------------------------------------------------------------------------------------------------
# Plots.


def reconstructs(rows: Sequence[Row]) -> bool:
    """Return whether a table shows reconstructions."""
    return "reconstruction" in rows[0].result


def label_guidance(figure: Figure, scales: Iterable[str]) -> None:
    """Add a legend of the colors of guidance scales below a figure."""
    handles = [
        Line2D([], [], color=color, marker="o", ls="", label=f"guidance {cfg}")
        for cfg, color in GUIDANCE_COLORS.items()
        if cfg in scales
    ]
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles),
            fontsize=8,
            frameon=False,
        )


def plot_over(results: Results, rows: Sequence[Row], title: str) -> Figure:
    """Plot measures of a table over the rows' ``x``, a line for each guidance scale.

    Dotted lines are training images in place of samples.

    Args:
        title: of the x-axis.
    """
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    scales = dict.fromkeys(cfg for row in rows for cfg in results.guidance_scales(row))
    for axes, name in zip(figure.subplots(1, len(CURVE_MEASURES)), CURVE_MEASURES, strict=True):
        measure = MEASURES[name]
        for cfg in scales if measure.of_images else [*scales][:1]:
            known = [(row.x, results.values(row, name, cfg).values()) for row in rows]
            points = [(x, statistics.mean(values)) for x, values in known if values]
            color = GUIDANCE_COLORS.get(cfg) if measure.of_images else "0.3"
            axes.plot(*zip(*points, strict=True), "o-", color=color, ms=4)
        baseline = results.values(BASELINE_ROW, name, "images").values()
        if baseline:
            axes.axhline(statistics.mean(baseline), color="0.6", ls=":", lw=1)
        axes.set_title(f"{measure.title}\n({measure.better} is better)", fontsize=8)
        axes.set_xlabel(title, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    label_guidance(figure, scales)
    return figure


def plot(results: Results, rows: Sequence[Row]) -> Figure:
    """Plot the most important measures of a table: a dot per seed, a line at the mean."""
    shown = RECONSTRUCTION_MEASURES if reconstructs(rows) else SAMPLE_MEASURES
    names = [
        name
        for name in shown
        if any(
            results.values(row, name, cfg) for row in rows for cfg in results.guidance_scales(row)
        )
    ]
    figure = Figure(figsize=(9, 0.9 + 0.27 * len(rows)), layout="constrained")
    guidance_scales = set()
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        for y, row in enumerate(rows):
            for cfg in results.guidance_scales(row):
                values = results.values(row, name, cfg).values()
                if not values:
                    continue
                color, height = GUIDANCE_COLORS.get(cfg, "C2"), y + GUIDANCE_OFFSETS.get(cfg, 0)
                heights = [height] * len(values)
                axes.plot(values, heights, "o", color=color, ms=4, alpha=0.6, mew=0)
                axes.plot([sum(values) / len(values)], [height], "|", color=color, ms=10)
                guidance_scales.add(cfg)
        baseline = results.values(BASELINE_ROW, name, "images").values()
        if baseline and not reconstructs(rows):
            axes.axvline(sum(baseline) / len(baseline), color="0.6", ls=":", lw=1)
        title = MEASURES[name].title.replace(" (", "\n(")
        axes.set_title(f"{title}\n({MEASURES[name].better} is better)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    if len(guidance_scales) > 1 and guidance_scales <= {*GUIDANCE_COLORS}:
        label_guidance(figure, guidance_scales)
    return figure


def plot_training() -> Figure:
    """Plot the stored training curves, one panel each: loss and held-out nats by epoch."""
    curves = [read_json(path) for path in sorted(CURVES_FOLDER.glob("*.json"))]
    figure = Figure(figsize=(4.2 * len(curves), 3), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        epochs = range(1, len(curve["loss"]) + 1)
        axes.axhline(curve["uniform_loss"], color="0.6", ls=":", lw=1, label="uniform guessing")
        axes.plot(epochs, curve["loss"], color="C0", label="training loss")
        nats = {int(epoch): value for epoch, value in curve["nats"].items()}
        axes.plot(nats.keys(), nats.values(), "o-", color="C1", ms=3, label="held-out nats")
        axes.set_title(curve["title"], fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
        axes.set_ylabel("nats", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    return figure


class Setting(NamedTuple):
    """What sampling under one setting costs, and the quality of its images for each seed."""

    family: str
    steps: int
    gflop: float  # per image
    seconds: float  # per image, of the fastest seed
    recognized: list[float]
    frechet: list[float]

    def is_worse_than(self, other: "Setting") -> bool:
        """Return whether one of the measures is worse, by Welch's test at 5%."""
        lower = ttest_ind(self.recognized, other.recognized, equal_var=False, alternative="less")
        higher = ttest_ind(self.frechet, other.frechet, equal_var=False, alternative="greater")
        # NaN, which is not below 0.05, if all values are equal
        return bool(lower.pvalue < 0.05 or higher.pvalue < 0.05)


def without_differences_of_models(rows: list[dict], name: str) -> None:
    """Give all trained models the same mean of the measure ``name``, over all settings."""
    by_model: dict[str, list[dict]] = {}
    for row in rows:
        by_model.setdefault(row["resume"], []).append(row)
    overall = statistics.mean(row[name] for row in rows)
    for own in by_model.values():
        difference = statistics.mean(row[name] for row in own) - overall
        for row in own:
            row[name] -= difference


def measured_settings(path: Path) -> list[Setting]:
    """Return the settings that :mod:`experiments.cost` measured; the first one is the reference."""
    by_setting: dict[tuple[str, int], list[dict]] = {}
    rows = read_json(path)["rows"]
    for name in ("recognized", "frechet"):
        without_differences_of_models(rows, name)
    for row in rows:
        by_setting.setdefault((row["family"], row["steps"]), []).append(row)
    return [
        Setting(
            family,
            steps,
            seeds[0]["gflop"],
            min(row["seconds"] for row in seeds),
            [row["recognized"] for row in seeds],
            [row["frechet"] for row in seeds],
        )
        for (family, steps), seeds in by_setting.items()
    ]


def plot_cost(path: Path) -> Figure:
    """Plot quality over operations: a dot per seed, a line through the means of a family."""
    settings = measured_settings(path)
    families = dict.fromkeys(setting.family for setting in settings)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    names = {
        "recognized": "share recognized\n(higher is better)",
        "frechet": "Frechet distance in features\n(lower is better)",
    }
    for axes, (name, title) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for number, family in enumerate(families):
            shown = [setting for setting in settings if setting.family == family]
            means = [statistics.mean(getattr(setting, name)) for setting in shown]
            gflop = [setting.gflop for setting in shown]
            label = family if name == "recognized" else None
            axes.plot(gflop, means, "-", color=f"C{number}", lw=1, label=label)
            for setting in shown:
                values = getattr(setting, name)
                axes.plot([setting.gflop] * len(values), values, "o", color=f"C{number}", ms=3)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("GFLOP per image", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def cost_table(path: Path) -> str:
    """Return a table of all settings, and of which are worse than the first one."""
    settings = measured_settings(path)
    first, rows = settings[0], []
    for setting in settings:
        recognized, frechet = (
            f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
            for values in (setting.recognized, setting.frechet)
        )
        share = f"{setting.gflop:.2f} ({setting.gflop / first.gflop:.0%})"
        worse = "-" if setting is first else "worse" if setting.is_worse_than(first) else "equal"
        rows.append(
            [
                setting.family,
                setting.steps,
                share,
                f"{1000 * setting.seconds:.0f}",
                recognized,
                frechet,
                worse,
            ]
        )
    header = ["setting", "steps", "GFLOP per image", "ms per image", "recognized"]
    return markdown([*header, "Frechet distance", "against the first row"], rows)


def plots() -> dict[Path, Figure]:
    """Return the plots of all tables that have more than one measured row, by file."""
    figures = {RESULTS / "training.png": plot_training()}
    figures |= {path.with_suffix(".png"): plot_cost(path) for path in COST_FOLDER.glob("*.json")}
    for scale in SCALES:
        experiments, results = Experiments(DEFAULT, scale), Results(RESULTS, scale)
        for table, content in experiments.content["tables"].items():
            rows = [row for row in experiments.rows(table) if results.of(row)]
            if len(rows) > 1:
                curve = content.get("curve")
                figure = plot_over(results, rows, curve) if curve else plot(results, rows)
                figures[RESULTS / scale / f"{table}.png"] = figure
    return figures


# --------------------------------------------------------------------------------------------------
# Tables.


def result_tables(scale: str) -> str:
    """Return all tables of a scale that have results, with their plots."""
    experiments, results, parts = Experiments(DEFAULT, scale), Results(RESULTS, scale), []
    for table, content in experiments.content["tables"].items():
        rows = experiments.rows(table)
        if len(rows) > 1 and any(results.of(row) for row in rows):
            baseline = [] if reconstructs(rows) else [BASELINE_ROW]
            text = row_table(results, [*baseline, *rows])
            parts.append(f"### {content['title']}, {scale}\n\n{text}")
            if (RESULTS / scale / f"{table}.png").exists():
                parts.append(f"![{table}](results/{scale}/{table}.png)\n")
    return "\n".join(parts)


def model_of(words: Sequence[str]) -> TokenBridge:
    """Return the model that a main_tokenbridge.py command trains on KL-16 latents, on ``meta``."""
    parser = main_tokenbridge.get_args_parser()
    args, defaults = parser.parse_args(words[1:]), parser.parse_args([])
    main_tokenbridge.check_args(args)
    tokenizer = TokenizerInfo(KL16_CONFIG, KL16_LATENT_FACTOR, args.vae_path)
    config = resolve(args, defaults, MODELS, sizes_of, tokenizer, Start())
    config["quantizer"] = "gaussian"  # linear levels are checked, which needs their values
    with torch.device("meta"):
        return TokenBridge(**config)


def training_hours(step: Step, assumptions: argparse.Namespace) -> float:
    """Return the GPU-hours of a training on H100, as docs/scaling.md computes them."""
    epochs = main_tokenbridge.get_args_parser().parse_args(step.words[1:]).epochs
    flops = model_of(step.words).training_flops()
    return scaling.gpu_hours(flops, scaling.GPUS["H100, H200"], assumptions, epochs)


def head_sizes() -> str:
    """Return a table of the heads of Tables 2d and 2e: flags and parameter counts."""
    experiments, cells = Experiments(DEFAULT, "imagenet"), []
    shown = ("--model", "--quant_bits", "--head_dim", "--head_depth", "--channels_per_group")
    for table in ("table2d", "table2e"):
        steps = plan(experiments, [table], [0], "", "", "cuda")
        for row in experiments.rows(table):
            words = steps[f"seed0/{row.result.split('/')[0]}/training"].words
            flags = [f"{flag} {words[words.index(flag) + 1]}" for flag in shown if flag in words]
            count = sum(parameter.numel() for parameter in model_of(words).head.parameters())
            number = table.removeprefix("table")
            cells.append([number, f"`{' '.join(flags)}`", row.paper_head, f"{count / 1e6:.1f}M"])
    return markdown(["table", "flags", "head parameters, paper", "head parameters, ours"], cells)


def imagenet_costs() -> str:
    """Return a table of each table's trainings, evaluations and GPU-hours on ImageNet."""
    experiments = Experiments(DEFAULT, "imagenet")
    assumptions = scaling.get_args_parser().parse_args([])
    tables = experiments.content["tables"]
    all_tables = {name: tables[name] for name in tables if experiments.rows(name)}
    selections = {name: (content["title"], [name]) for name, content in all_tables.items()}
    selections["all"] = ("All tables, without repeated trainings", [*all_tables])
    hours: dict[str, float] = {}
    cells = []
    for selection, (title, names) in selections.items():
        steps = plan(experiments, names, [0], "output", "data", "cuda")
        trainings = [name for name in steps if name.endswith("/training")]
        for name in trainings:
            if name not in hours:
                hours[name] = training_hours(steps[name], assumptions)
        evaluations = sum(
            name.endswith("-sampling") or "/reconstruction/" in name for name in steps
        )
        total = f"{sum(hours[name] for name in trainings):,.0f}" if trainings else None
        cells.append([f"`{selection}`", title, len(trainings), evaluations, total])
    return markdown(["table", "title", "trainings", "evaluations", "training, H100-hours"], cells)


# --------------------------------------------------------------------------------------------------
# Pages.


def values() -> dict[str, str]:
    """Return the tables and numbers that pages quote, by marker name."""
    markers = {f"cost_{path.stem}": f"\n{cost_table(path)}" for path in COST_FOLDER.glob("*.json")}
    for scale in SCALES:
        experiments, results = Experiments(DEFAULT, scale), Results(RESULTS, scale)
        markers[scale] = "\n" + result_tables(scale)
        markers[f"{scale}_findings"] = "\n" + finding_table(results, experiments)
        markers[f"{scale}_heads"] = "\n" + short_table(results, experiments.rows("heads"))
    experiments, results = Experiments(DEFAULT, "objects"), Results(RESULTS, "objects")
    measured = [row for row in experiments.rows("epochs") if results.of(row)]
    markers["objects_epochs"] = "\n" + row_table(results, measured)
    seconds = [content["training_seconds"] for content in results.of(measured[-1]).values()]
    markers["objects_hours"] = duration(max(seconds))
    experiments, results = Experiments(DEFAULT, "objects3"), Results(RESULTS, "objects3")
    heads = row_table(results, experiments.rows("table2a"))
    markers["objects3_heads_at_equal_time"] = "\n" + heads
    experiments, results = Experiments(DEFAULT, "digits"), Results(RESULTS, "digits")
    counts = [len(seeds) for result, seeds in results.by_name.items() if result != BASELINE]
    quoted = [row for row in experiments.rows("heads") if row.name in QUOTED]
    baseline = results.values(BASELINE_ROW, "frechet", "images").values()
    return {
        **markers,
        "quoted_heads": "\n" + short_table(results, quoted),
        "floor": f"{sum(baseline) / len(baseline):.1f}",
        "counts": ", ".join(f"{counts.count(n)} rows have {n}" for n in sorted({*counts})),
        "imagenet": "\n" + imagenet_costs(),
        "head_sizes": "\n" + head_sizes(),
    }


def pages() -> dict[Path, str]:
    """Return the text of all pages that quote results, with current values."""
    known, texts = values(), {path: path.read_text() for path in PAGES}
    for path, text in texts.items():
        for name in re.findall(r"<!-- (\w+) -->", text):
            text = fill(text, name, known[name]) if name in known else text
        texts[path] = text
    return texts


def main() -> None:
    """Write all plots and pages."""
    for path, figure in plots().items():
        save_figure(figure, path)
    for path, text in pages().items():
        write_text(path, text)


if __name__ == "__main__":
    errors.run(main)
