"""Writes tables, plots and figures in running text from the files in ``experiments/results``."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import main_tokenbridge
from experiments.plan import DEFAULT, FLOOR, Experiments, Row, Step, plan
from experiments.results import FLOOR_ROW, MEASURES, RESULTS, Results, finding_table, row_table, short_table
from models.tokenbridge import MODELS, TokenBridge, sizes_of
from tools import scaling
from util import errors
from util.config import KL16_CONFIG, KL16_LATENT_FACTOR, Start, Tokenizer, resolve
from util.plots import save_figure
from util.tables import fill, markdown, write_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "experiments/README.md", "docs/experiments.md", "docs/variants.md")]
SCALES = ("digits", "cifar10")
QUOTED = ("autoregressive, 38 epochs", "parallel, 38 epochs", "masked, 85 epochs, 4 steps")
COLOURS = {"1": "C0", "2": "C1"}  # of guidance scales

# --------------------------------------------------------------------------------------------------------------------
# Plots.


def plot(results: Results, rows: Sequence[Row]) -> Figure:
    """Every seed of a table's rows as a dot, their means as lines, for the measures that tell them apart."""
    names = ["frechet", *(["psnr_db"] if "reconstruction" in rows[0].result else ["precision", "recall"])]
    figure = Figure(figsize=(9, 0.9 + 0.27 * len(rows)), layout="constrained")
    scales: dict[str, None] = {}
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        for y, row in enumerate(rows):
            for cfg in results.guidance_scales(row):
                values = results.values(row, name, cfg).values()
                colour, place = COLOURS.get(cfg, "C2"), y + (0.15 if cfg == "2" else -0.15 if cfg == "1" else 0)
                axes.plot(values, [place] * len(values), "o", color=colour, ms=4, alpha=0.6, mew=0)
                axes.plot([sum(values) / len(values)], [place], "|", color=colour, ms=10)
                scales[cfg] = None
        floor = results.values(FLOOR_ROW, name, "images").values()
        if floor and "reconstruction" not in rows[0].result:
            axes.axvline(sum(floor) / len(floor), color="0.6", ls=":", lw=1)
        axes.set_title(MEASURES[name].title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    if {"1", "2"} == {*scales}:
        handles = [Line2D([], [], color=COLOURS[cfg], marker="o", ls="", label=f"guidance {cfg}") for cfg in COLOURS]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def plots() -> dict[Path, Figure]:
    """The plots of all tables that have results, by their files."""
    found = {}
    for scale in SCALES:
        experiments, results = Experiments(DEFAULT, scale), Results(RESULTS, scale)
        for table in experiments.content["tables"]:
            rows = [row for row in experiments.rows(table) if results.of(row)]
            if len(rows) > 1:
                found[RESULTS / scale / f"{table}.png"] = plot(results, rows)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Tables.


def tables(scale: str) -> str:
    """A section of a scale: each table that has results, and its plot."""
    experiments, results, parts = Experiments(DEFAULT, scale), Results(RESULTS, scale), []
    for table, content in experiments.content["tables"].items():
        rows = experiments.rows(table)
        if len(rows) > 1 and any(results.of(row) for row in rows):
            floor = [] if "reconstruction" in rows[0].result else [FLOOR_ROW]
            parts.append(f"### {content['title']}, {scale}\n\n{row_table(results, [*floor, *rows])}")
            if (RESULTS / scale / f"{table}.png").exists():
                parts.append(f"![{table}](results/{scale}/{table}.png)\n")
    return "\n".join(parts)


def model_of(words: Sequence[str]) -> TokenBridge:
    """Return the model that a command of main_tokenbridge.py trains on KL-16's latents, without values (``meta``)."""
    args, defaults = (main_tokenbridge.get_args_parser().parse_args(typed) for typed in (words[1:], []))
    main_tokenbridge.check_args(args)
    tokenizer = Tokenizer(KL16_CONFIG, KL16_LATENT_FACTOR, args.vae_path)
    config = resolve(args, defaults, MODELS, sizes_of, tokenizer, Start())
    with torch.device("meta"):  # where the tables of linear levels cannot be checked
        return TokenBridge(**{**config, "quantizer": "gaussian"})


def training_hours(step: Step, assumed) -> float:
    """GPU-hours of a training on H100, as docs/scaling.md computes them."""
    epochs = main_tokenbridge.get_args_parser().parse_args(step.words[1:]).epochs
    return scaling.gpu_hours(model_of(step.words).training_flops(), scaling.GPUS["H100, H200"], assumed, epochs)


def head_sizes() -> str:
    """Return a table of the heads of Tables 2d and 2e: their flags, and parameters as the paper and this code count."""
    experiments, cells = Experiments(DEFAULT, "imagenet"), []
    shown = ("--model", "--quant_bits", "--head_dim", "--head_depth", "--channels_per_group")
    for table in ("table2d", "table2e"):
        steps = plan(experiments, [table], [0], "", "", "cuda")
        for row in experiments.rows(table):
            words = steps[f"seed0/{row.result.split('/')[0]}/training"].words
            flags = [f"{flag} {words[words.index(flag) + 1]}" for flag in shown if flag in words]
            head = sum(parameter.numel() for parameter in model_of(words).head.parameters())
            cells.append([table[5:], f"`{' '.join(flags)}`", row.paper_head, f"{head / 1e6:.1f}M"])
    return markdown(["table", "flags", "head: paper", "head: here"], cells)


def imagenet() -> str:
    """A table of what each table needs on ImageNet: trainings, samplings of 50,000 images, GPU-hours of training."""
    experiments, assumed = Experiments(DEFAULT, "imagenet"), scaling.get_args_parser().parse_args([])
    hours: dict[str, float] = {}
    cells = []
    for table, content in [*experiments.content["tables"].items(), ("all", {"title": "all, each training once"})]:
        names = [*experiments.content["tables"]] if table == "all" else [table]
        steps = plan(experiments, names, [0], "output/experiments/imagenet", "data/imagenet", "cuda")
        trainings = [name for name in steps if name.endswith("/training")]
        hours |= {name: training_hours(steps[name], assumed) for name in trainings if name not in hours}
        measured = sum(name.endswith("-sampling") or "/reconstruction/" in name for name in steps)
        spent = f"{sum(hours[name] for name in trainings):,.0f}" if trainings else None
        cells.append([f"`{table}`", content["title"], len(trainings), measured, spent])
    return markdown(["table", "what", "trainings", "evaluations", "H100 GPU-hours of training"], cells)


# --------------------------------------------------------------------------------------------------------------------
# Pages.


def values() -> dict[str, str]:
    """What pages quote, by the name of its place there."""
    places: dict[str, str] = {}
    for scale in SCALES:
        experiments, results = Experiments(DEFAULT, scale), Results(RESULTS, scale)
        places[scale] = "\n" + tables(scale)
        places[f"{scale}_findings"] = "\n" + finding_table(results, experiments)
        places[f"{scale}_heads"] = "\n" + short_table(results, experiments.rows("heads"))
    experiments, results = Experiments(DEFAULT, "digits"), Results(RESULTS, "digits")
    counts = [len(seeds) for result, seeds in results.found.items() if result != FLOOR]
    quoted = [row for row in experiments.rows("heads") if row.name in QUOTED]
    floor = results.values(FLOOR_ROW, "frechet", "images").values()
    return {
        **places,
        "quoted_heads": "\n" + short_table(results, quoted),
        "floor": f"{sum(floor) / len(floor):.1f}",
        "counts": ", ".join(f"{counts.count(n)} of {n} seed{'s' * (n > 1)}" for n in sorted({*counts})),
        "imagenet": "\n" + imagenet(),
        "head_sizes": "\n" + head_sizes(),
    }


def pages() -> dict[Path, str]:
    """The pages that quote results, filled in."""
    known, texts = values(), {path: path.read_text() for path in PAGES}
    for path, text in texts.items():
        for name in re.findall(r"<!-- (\w+) -->", text):
            text = fill(text, name, known[name]) if name in known else text
        texts[path] = text
    return texts


def main() -> None:
    """Writes everything."""
    for path, figure in plots().items():
        save_figure(figure, path)
    for path, text in pages().items():
        write_text(path, text)


if __name__ == "__main__":
    errors.run(main)
