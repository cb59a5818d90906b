"""Measuring a model: samples and their metrics, searches over guidance and temperature, held-out likelihood."""

import argparse
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from engine_tokenbridge import SampleSettings, evaluate, held_out_likelihood
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import checkpoint, misc
from util.checkpoint.load import fingerprint
from util.errors import NotFinite, Preempted, UserError
from util.files import check_shared, write_json
from util.metrics import TITLES, Evaluator, default_statistics, table
from util.plots import write_search
from util.provenance import provenance
from util.sample_folder import SampleFolder
from util.sources import read_image


@dataclass
class Run:
    """What sampling, measuring and training have in common."""

    args: argparse.Namespace
    device: torch.device
    vae: AutoencoderKL | None  # None where cached moments are enough
    latent_factor: float
    evaluator: Evaluator | None  # None for pictures alone
    held_out: DataLoader | None  # images or moments to measure likelihoods on, if asked for


def make_evaluator(args: argparse.Namespace, device: torch.device) -> Evaluator | None:
    """Everything that metrics need, loaded before the first image is made; None for pictures alone.

    Raises:
        UserError: some of it is missing, or the processes do not share the folder of the images.
    """
    if not (args.evaluate or args.online_eval):
        return None
    check_shared(args.output_dir)
    if args.no_metrics:
        return None
    if args.fid_stats is None and args.reference is None:
        args.fid_stats = default_statistics(args.img_size, args.class_num)
        if args.fid_stats is None:
            misc.warn("without FID: name what to compare with, by --fid_stats or --reference")

    def check_stats() -> None:
        if args.fid_stats is not None and not Path(args.fid_stats).is_file():
            raise UserError(
                f"no FID statistics at {args.fid_stats}: put ADM's for ImageNet 256 there, make others with "
                "main_metrics.py --save_stats and name them with --fid_stats, or pass --no_metrics for pictures alone"
            )

    misc.by_main_process(check_stats)
    how = device, args.eval_bsz, args.num_workers, args.num_images
    return Evaluator(args.inception_weights, args.fid_stats, args.reference, *how)


def sampling_settings(args: argparse.Namespace, cfg: float, temperature: float) -> SampleSettings:
    """The flags' settings at one guidance scale and temperature."""
    names = set(SampleSettings.__dataclass_fields__) - {"cfg", "temperature"}
    return SampleSettings(cfg=cfg, temperature=temperature, **{name: getattr(args, name) for name in names})


def identity(path: str | Path | None) -> dict[str, str] | None:
    """Return path and SHA-256 of a file, or of the names, sizes and times of a folder's files; None without a path."""
    if path is None:
        return None
    file = Path(path)
    if file.is_file():
        return {"file": str(path), "sha256": checkpoint.hub.digest(file)}
    status = [(str(each), each.stat()) for each in sorted(file.rglob("*")) if each.is_file()]
    listed = [(name, found.st_size, found.st_mtime_ns) for name, found in status]
    return {"file": str(path), "sha256": hashlib.sha256(repr(listed).encode()).hexdigest()}


def weights_identity(run: Run, model: TokenBridge) -> dict[str, str | bool]:
    """Return the SHA-256 of the weights of model and tokenizer, computed by rank 0; samples of others are replaced."""

    def identify() -> dict[str, str | bool]:
        assert run.vae is not None
        return {"ema": not run.args.no_ema, "model": fingerprint(model), "vae": fingerprint(run.vae)}

    return misc.by_main_process(identify)


def measured_against(args: argparse.Namespace) -> dict:
    """Identifies what samples are compared with: metrics against others are measured anew."""
    return {name: identity(getattr(args, name)) for name in ("fid_stats", "reference", "inception_weights")}


def sample_and_measure(
    run: Run,
    model: TokenBridge,
    path: Path,
    cfg: float,
    temperature: float,
    weights: dict,
    stop_signals: misc.StopSignals | None = None,
) -> dict[str, float]:
    """Samples into the folder ``path``, with a grid of some images beside it, and measures.

    Returns the metrics on the main process, nothing on others and without an evaluator.

    Raises:
        UserError, Preempted: see :func:`engine_tokenbridge.evaluate`.
    """
    args, settings = run.args, sampling_settings(run.args, cfg, temperature)
    assert run.vae is not None  # which is loaded wherever samples are asked for
    folder = evaluate(model, run.vae, run.latent_factor, path, settings, run.device, weights, stop_signals)
    images = misc.in_all_processes(lambda: folder.images(args.num_images))

    def write_images() -> None:
        folder.write_grid(images)
        if args.save_confidence:
            folder.confidence.write_grid(folder.confidence.images(args.num_images))
        if args.save_npz:
            folder.write_npz(images)

    misc.by_main_process(write_images)
    figures = {}
    if run.evaluator is not None:
        try:
            figures = run.evaluator.measure(run.evaluator.features(images, stop_signals))
        except Preempted:
            raise
        except BaseException:
            misc.log.error("measuring failed; the images are kept: python main_metrics.py --images %s", folder)
            raise

    def write_results() -> None:
        if figures:
            misc.log.info("%s", table(figures))
        made_with = {"settings": asdict(settings), "weights": weights, "args": vars(args)}
        if run.evaluator is not None:
            made_with["measured_against"] = measured_against(args)
        write_json(folder.results_path, {**figures, "seed": args.gen_seed, **made_with, **provenance()})
        if run.evaluator is not None and not args.keep_images:
            folder.remove_images()
        misc.log.info("sampled %d images; a grid of them is %s.png", args.num_images, folder)

    misc.by_main_process(write_results)
    return figures


def finished_before(run: Run, path: Path, cfg: float, temperature: float, weights: dict) -> dict[str, float]:
    """The metrics of this pair that an interrupted run by the same command has left; empty if there are none."""
    if run.evaluator is None:
        return {}

    def look() -> dict[str, float]:
        folder = SampleFolder(path)
        made_with = {"settings": asdict(sampling_settings(run.args, cfg, temperature)), "weights": weights}
        made_with |= {"measured_against": measured_against(run.args)}
        if not folder.is_of(made_with) or not Path(f"{folder}.png").exists():
            return {}
        before = folder.results()
        figures = {name: before[name] for name in ("images", *TITLES) if name in before}
        return figures if all(map(math.isfinite, figures.values())) else {}

    return misc.by_main_process(look)


def search(run: Run, model: TokenBridge, weights: dict) -> None:
    """Samples at every given guidance scale and temperature; more than one pair makes a table and a heat map."""
    args, out = run.args, Path(run.args.output_dir)
    pairs = list(product(args.cfg, args.temperature))
    paths = [out / ("samples" if len(pairs) == 1 else f"samples-cfg{cfg:g}-t{t:g}") for cfg, t in pairs]

    def check_folders() -> None:
        for path in paths:
            SampleFolder(path).check_own()

    misc.by_main_process(check_folders)  # all of them before the first image
    rows = []
    for (cfg, temperature), path in zip(pairs, paths, strict=True):
        figures = finished_before(run, path, cfg, temperature, weights) if len(pairs) > 1 else {}
        figures = figures or sample_and_measure(run, model, path, cfg, temperature, weights)
        rows.append({"cfg": cfg, "temperature": temperature, **figures})
    if len(pairs) > 1 and run.evaluator is not None and misc.is_main_process():
        write_search(rows, out)
        misc.log.info("wrote %s/search.md, search.json and search.png", out)


def measure_likelihood(run: Run, model: TokenBridge, stop_signals: misc.StopSignals | None = None) -> dict[str, float]:
    """See :func:`engine_tokenbridge.held_out_likelihood`, with the flags' options of the head; logged, too."""
    vae = None if run.args.use_cached else run.vae
    head_options = likelihood_options(run, model)
    assert run.held_out is not None
    how = run.latent_factor, run.held_out, run.device, run.args.precision
    figures = held_out_likelihood(model, vae, *how, head_options=head_options, stop_signals=stop_signals)
    text = "held-out cross-entropy over %d images: %.4f nats, %.4f bits a dimension"
    misc.log.info(text, *(figures[name] for name in ("images", "nats_per_dim", "bits_per_dim")))
    return figures


def likelihood_options(run: Run, model: TokenBridge) -> dict[str, Any]:
    """Return the flags' values of the head's options on which the likelihood depends."""
    return {name: getattr(run.args, name) for name in model.head.likelihood_options}


def likelihood_once(
    run: Run, model: TokenBridge, path: Path, weights: dict, stop_signals: misc.StopSignals
) -> dict[str, float]:
    """Return :func:`measure_likelihood`, or what ``path``.json holds of it for the same weights."""
    record = SampleFolder(path)
    made_with = {"weights": weights, "precision": run.args.precision, **likelihood_options(run, model)}
    figures = misc.by_main_process(lambda: record.results() if record.is_of(made_with) else None)
    if figures is None:
        figures = measure_likelihood(run, model, stop_signals)
        misc.by_main_process(lambda: write_json(record.results_path, {**figures, **made_with, **provenance()}))
    return figures


@contextmanager
def skipped_if_not_finite(epoch: int) -> Iterator[None]:
    """Warn of a measurement within the block that gives NaN, and go on behind it."""
    try:
        yield
    except NotFinite as error:
        misc.warn("NOT MEASURED after epoch %d: %s. Training goes on", epoch, error)


def evaluate_online(
    run: Run, model: TokenBridge, epoch: int, writer: SummaryWriter | None, stop_signals: misc.StopSignals
) -> None:
    """Measures after an epoch of training, into TensorBoard: without guidance and with, and likelihood.

    What ``online_eval/`` holds of the same weights and settings is taken from there: images, metrics, likelihood. What
    is not finite is left out, with a warning.

    Raises:
        UserError: files cannot be written or read.
        Preempted: a process received one of the ``stop_signals``.
    """
    args, scalars, out = run.args, {}, Path(run.args.output_dir) / "online_eval"
    if not (args.online_nll or args.online_eval):
        return
    parts = {"model": model, "vae": run.vae}
    checksums = {name: misc.checksum(part.parameters()) for name, part in parts.items() if part is not None}
    weights = {"epoch": epoch, "ema": not args.no_ema, **checksums}
    if args.online_nll:
        with skipped_if_not_finite(epoch):
            figures = likelihood_once(run, model, out / f"epoch{epoch:04d}-likelihood", weights, stop_signals)
            scalars |= {f"eval/{name}": figures[name] for name in ("nats_per_dim", "bits_per_dim")}
    for cfg, temperature in product(dict.fromkeys([1.0, *args.cfg]), args.temperature) if args.online_eval else ():
        name = f"cfg{cfg:g}" + (f"-t{temperature:g}" if len(args.temperature) > 1 else "")
        path = out / f"epoch{epoch:04d}-{name}"
        with skipped_if_not_finite(epoch):
            figures = finished_before(run, path, cfg, temperature, weights)
            figures = figures or sample_and_measure(run, model, path, cfg, temperature, weights, stop_signals)
            scalars |= {f"eval/{key}-{name}": value for key, value in figures.items() if key in TITLES}
            if writer is not None:
                writer.add_image(f"samples/{name}", np.asarray(read_image(f"{path}.png")), epoch + 1, dataformats="HWC")
    if writer is not None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, epoch + 1)
