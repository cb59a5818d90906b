"""Measure a model: metrics of its samples, held-out likelihood, search over guidance scales."""

import argparse
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.sampling import SamplingOptions
from models.tokenbridge import TokenBridge
from models.tokenizer import LatentEncoder, Tokenizer
from util import distributed
from util.checkpoint import hub
from util.checksums import checksum, fingerprint
from util.dashboards import RunLog
from util.data.images import confidence_maps
from util.data.sources import read_image
from util.devices import to_device
from util.errors import NotFinite, Preempted, UserError
from util.files import FileWriter, check_shared, write_json
from util.log import log, progress_bar, warn
from util.metrics.sample_folder import SampleFolder, label_of
from util.metrics.tables import METRIC_TITLES, default_statistics, metric_names, metrics_table
from util.precision import autocast, check_finite, double, extremes
from util.provenance import provenance
from util.rng import image_seeds, numbered_draws
from util.signals import StopSignals, until_stopped

if TYPE_CHECKING:  # importing it loads torch_fidelity and torchvision, which takes seconds
    from util.metrics.compute import Evaluator

# --------------------------------------------------------------------------------------------------
# Sampling images


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplingOptions):
    """Settings of an evaluation; two runs of equal settings and weights sample equal images."""

    num_images: int
    eval_bsz: int
    gen_seed: int
    precision: str
    save_confidence: bool = False
    vae_precision: str | None = None  # by default that of the model


@torch.no_grad()
def evaluate(
    model: TokenBridge,
    tokenizer: Tokenizer,
    folder: str | Path,
    settings: SampleSettings,
    device: torch.device,
    weights: dict,
    stop_signals: StopSignals | None = None,
) -> SampleFolder:
    """Sample ``settings.num_images`` images to ``folder/NNNNN.png``, and return the folder.

    The numbers of images of two classes differ by one at most. Image n shows class
    ``n * class_num // num_images`` and has its own seed. Each rank takes whole chunks of
    ``eval_bsz`` consecutive images, so the number of ranks never changes an image. An interrupted
    run continues where it stopped.

    Args:
        folder: on a disk that all ranks share (:func:`util.files.check_shared`).
        weights: identifies the weights; images sampled from other weights are replaced.
        stop_signals: end sampling after the chunk in which a rank received one.

    Raises:
        UserError: the folder cannot be written or holds other images.
        NotFinite: model or tokenizer overflow. Like a UserError, on all ranks after the same chunk.
        Preempted: a signal was received.
    """
    folder = SampleFolder(folder)
    distributed.on_rank_0(
        lambda: folder.prepare({"settings": asdict(settings), "weights": weights})
    )
    total = settings.num_images
    rank = distributed.get_rank()
    world = distributed.get_world_size()
    chunks = chunks_of(total, settings.eval_bsz)
    if len(chunks) < world:
        text = "%d chunks of %d images for %d ranks: some ranks are idle"
        warn(text, len(chunks), settings.eval_bsz, world)

    def find_missing() -> list[range]:
        finished = folder.numbers()
        if settings.save_confidence:
            finished &= folder.confidence.numbers()
        return [chunk for chunk in chunks if not finished.issuperset(chunk)]

    writer = FileWriter()

    def sample_chunks(own_chunks: Sequence[range]) -> None:
        for chunk in own_chunks:
            images, confidence = sample_chunk(model, tokenizer, chunk, settings, device)
            writer.finish()  # the previous chunk
            folder.save(writer, images, chunk)
            if settings.save_confidence:
                maps = confidence_maps(confidence, images.shape[-1])
                folder.confidence.save(writer, maps, chunk)

    # Rank 0 distributes the missing chunks: a rank whose images were lost gets no more than others
    missing = distributed.on_rank_0(find_missing)
    bar = progress_bar(total=total, unit="img", desc=f"sampling, guidance {settings.cfg:g}")
    with bar, writer:
        bar.update(total - sum(map(len, missing)))
        for first in range(0, len(missing), world):
            # A chunk for each rank; the last turn may have fewer
            turn = missing[first : first + world]
            distributed.on_all_ranks(partial(sample_chunks, turn[rank : rank + 1]))
            bar.update(sum(map(len, turn)))
            if stop_signals is not None:
                stop_signals.check()
        distributed.on_all_ranks(writer.finish)
    return folder


def chunks_of(total: int, size: int) -> list[range]:
    """Divide ``total`` image numbers into chunks of at most ``size``.

    The chunks do not depend on the number of ranks, so that images do not. More than
    :data:`EQUAL_RANKS` chunks are made a multiple of it, of equal sizes up to one: then no rank
    waits for the last chunks of others.
    """
    if total <= EQUAL_RANKS * size:
        return [range(i, min(i + size, total)) for i in range(0, total, size)]
    count = -(-total // (EQUAL_RANKS * size)) * EQUAL_RANKS
    return [range(total * i // count, total * (i + 1) // count) for i in range(count)]


#: Numbers of ranks that divide this, up to 32 in powers of two, sample equally many images.
EQUAL_RANKS = 32


def sample_chunk(
    model: TokenBridge,
    tokenizer: Tokenizer,
    numbers: Sequence[int],
    settings: SampleSettings,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Sample the images of the given ``numbers``.

    Returns:
        images (uint8 ``[N, 3, H, W]``) and the confidence of their tokens ``[N, h, w]``, on the
        CPU.

    Raises:
        NotFinite: the transformer or the tokenizer's decoder overflows.
    """
    total = settings.num_images
    labels = torch.tensor([label_of(number, total, model.class_num) for number in numbers])
    options = {name: getattr(settings, name) for name in SamplingOptions.__dataclass_fields__}
    options |= {"seeds": image_seeds(settings.gen_seed, numbers), "return_confidence": True}
    with autocast(device, settings.precision):
        latents, confidence = model.sample_tokens(len(numbers), labels=labels, **options)
    precision = settings.vae_precision or settings.precision
    images = tokenizer.decode_images(latents, precision, "--vae_precision")
    confidence = confidence.cpu()
    # Sampled levels are always finite, also if the logits were NaN: check the confidence
    check_finite(confidence, "the transformer", settings.precision)
    return images, confidence.unflatten(1, (model.grid_size, -1))


def check_num_images(num_images: int, class_num: int) -> None:
    """Raise UserError unless every class gets the same number of images, as metrics require."""
    if num_images <= 0 or num_images % class_num:
        multiple = max(class_num, round(num_images / class_num) * class_num)
        raise UserError(
            f"--num_images {num_images} cannot be shared evenly by {class_num} classes; use a "
            f"multiple, such as {multiple}, or --no_metrics for images without metrics"
        )


# --------------------------------------------------------------------------------------------------
# Held-out likelihood

LIKELIHOOD_MASKS = 4  # mask ratios at which each image is measured


@torch.no_grad()
def held_out_likelihood(
    model: TokenBridge,
    tokenizer: LatentEncoder,
    loader: DataLoader,
    device: torch.device,
    precision: str,
    seed: int = 0,
    head_options: Mapping[str, Any] | None = None,
    stop_signals: StopSignals | None = None,
) -> dict[str, float]:
    """Measure the cross-entropy per latent dimension of held-out images.

    Each image is measured at :data:`LIKELIHOOD_MASKS` mask ratios, quantiles of the training
    distribution. Its masks and posterior sample follow from ``seed`` and its number, so results do
    not depend on batch size or ranks. So do the random numbers of the head's loss, if it takes any.

    Args:
        tokenizer: encodes the batches.
        loader: batches of images or cached moments, from a :class:`util.data.loaders.RankSampler`.
        head_options: arguments of the head's ``loss``.
        stop_signals: end measuring after the batch in which a rank received one.

    Returns:
        ``nats_per_dim``, ``bits_per_dim`` and ``images``.

    Raises:
        NotFinite: the tokenizer's encoder or the transformer overflows.
        Preempted: a signal was received.
    """
    training = model.training
    model.eval()
    sums = double(torch.zeros(2, device=device))  # cross-entropy, images
    limits = double(torch.zeros(2, device=device))  # extremes of the latents
    rank = distributed.get_rank()
    world = distributed.get_world_size()
    done = 0  # images of this rank
    counts = [model.num_masked_at((i + 0.5) / LIKELIHOOD_MASKS) for i in range(LIKELIHOOD_MASKS)]
    for batch, labels in until_stopped(loader, stop_signals):
        numbers = [rank + world * (done + i) for i in range(len(batch))]
        done += len(batch)
        batch, labels = (x.to(device, non_blocking=True) for x in (batch, labels))
        posterior = tokenizer.encode(batch)
        draws = numbered_draws(seed, numbers)
        latents = posterior.sample(to_device(draws.normal(*posterior.shape[1:]), device))
        limits += extremes(latents)
        orders = draws.uniform(LIKELIHOOD_MASKS, model.seq_len).argsort(dim=-1)  # [B, masks, L]
        head_numbers: list[tuple[Tensor, ...]] = [()] * LIKELIHOOD_MASKS
        if model.head.loss_numbers:
            uniform = draws.uniform(LIKELIHOOD_MASKS, model.seq_len, model.head.loss_numbers)
            head_numbers = [(numbers,) for numbers in to_device(uniform, device).unbind(1)]
        for i, count in enumerate(counts):
            mask = torch.zeros(len(batch), model.seq_len).scatter(1, orders[:, i, :count], 1.0)
            with autocast(device, precision):
                nats = model(latents, labels, mask, *head_numbers[i], **(head_options or {}))
            sums[0] += double(nats * len(batch) / len(counts))
        sums[1] += len(batch)
    model.train(training)
    sums[0] /= model.head.channels_per_group  # a group's cross-entropy is that of all its channels
    totals = (distributed.all_reduce_mean(torch.cat([sums, limits])) * world).cpu()

    def check() -> None:
        check_finite(totals[2:], "the tokenizer's encoder", "fp32")  # encodes without autocast
        check_finite(totals, "the transformer's likelihood", precision)

    distributed.on_rank_0(check)
    total, images = totals[:2].tolist()
    return {
        "nats_per_dim": total / images,
        "bits_per_dim": total / images / math.log(2),
        "images": round(images),
    }


# --------------------------------------------------------------------------------------------------
# Metrics, searches, measurements during training


@dataclass
class Run:
    """Objects that sampling, measuring and training share."""

    args: argparse.Namespace
    device: torch.device
    tokenizer: Tokenizer | None  # None if cached moments are enough
    encoder: (
        LatentEncoder  # of training and held-out batches: the tokenizer, or that of cached moments
    )
    evaluator: "Evaluator | None"  # None without metrics
    held_out: DataLoader | None  # images or moments to measure the likelihood of; None without it


def make_evaluator(args: argparse.Namespace, device: torch.device) -> "Evaluator | None":
    """Return the network and the reference of the metrics, before an image is sampled.

    Returns:
        None without ``--evaluate`` and ``--online_eval``, or with ``--no_metrics``.

    Raises:
        UserError: a file is missing or damaged, or the ranks do not share ``--output_dir``.
    """
    if not (args.evaluate or args.online_eval):
        return None
    from util.metrics.compute import Evaluator  # loads torch_fidelity, which --help must not

    check_shared(args.output_dir)
    if args.no_metrics:
        return None
    if args.fid_stats is None and args.reference is None:
        args.fid_stats = default_statistics(args.img_size, args.class_num, args.features)
        if args.fid_stats is None:
            text = "%s is not measured: name a reference with --fid_stats or --reference"
            warn(text, METRIC_TITLES[metric_names(args.features)["frechet"]])

    def check_stats() -> None:
        if args.fid_stats is not None and not Path(args.fid_stats).is_file():
            raise UserError(
                f"no FID statistics at {args.fid_stats}: save ADM's for ImageNet 256 as this file, "
                "or compute others with main_metrics.py --save_stats and name them with "
                "--fid_stats, or pass --no_metrics for images without metrics"
            )

    distributed.on_rank_0(check_stats)
    return Evaluator(
        args.features,
        args.feature_weights,
        args.fid_stats,
        args.reference,
        device,
        args.eval_bsz,
        args.num_workers,
        args.num_images,
    )


def sampling_settings(args: argparse.Namespace, cfg: float, temperature: float) -> SampleSettings:
    """Return the settings that flags describe, at one guidance scale and temperature."""
    names = set(SampleSettings.__dataclass_fields__) - {"cfg", "temperature"}
    return SampleSettings(
        cfg=cfg, temperature=temperature, **{name: getattr(args, name) for name in names}
    )


def path_identity(path: str | Path | None) -> dict[str, str] | None:
    """Return path and SHA-256 of a file or folder; None without a path.

    The SHA-256 of a folder is that of the names, sizes and modification times of its files.
    """
    if path is None:
        return None
    if Path(path).is_file():
        return {"file": str(path), "sha256": hub.digest(Path(path))}
    files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
    status = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"file": str(path), "sha256": hashlib.sha256(repr(status).encode()).hexdigest()}


def weights_identity(run: Run, model: TokenBridge) -> dict[str, str | bool]:
    """Return the SHA-256 of the weights of model and tokenizer, computed by rank 0.

    Samples with another identity are replaced.
    """

    def identify() -> dict[str, str | bool]:
        assert run.tokenizer is not None
        return {
            "ema": not run.args.no_ema,
            "model": fingerprint(model),
            "vae": run.tokenizer.fingerprint,
        }

    return distributed.on_rank_0(identify)


def reference_identity(args: argparse.Namespace) -> dict:
    """Return the identity of the files that samples are compared with.

    Metrics with another identity are measured again.
    """
    names = ("fid_stats", "reference", "feature_weights")
    files = {name: path_identity(getattr(args, name)) for name in names}
    return {"features": args.features, **files}


def sample_and_measure(
    run: Run,
    model: TokenBridge,
    path: Path,
    cfg: float,
    temperature: float,
    weights: dict,
    stop_signals: StopSignals | None = None,
) -> dict[str, float]:
    """Sample into the folder ``path``, write a grid of some images beside it, and measure metrics.

    Returns:
        the metrics on rank 0; nothing on other ranks or without an evaluator.

    Raises:
        UserError, Preempted: see :func:`evaluate`.
    """
    args = run.args
    settings = sampling_settings(args, cfg, temperature)
    assert run.tokenizer is not None  # loaded with --evaluate and --online_eval
    folder = evaluate(model, run.tokenizer, path, settings, run.device, weights, stop_signals)
    images = distributed.on_all_ranks(lambda: folder.images(args.num_images))

    def write_images() -> None:
        folder.write_grid(images, model.class_names)
        if args.save_confidence:
            folder.confidence.write_grid(folder.confidence.images(args.num_images))
        if args.save_npz:
            folder.write_npz(images)

    distributed.on_rank_0(write_images)
    metrics = {}
    if run.evaluator is not None:
        try:
            metrics = run.evaluator.measure(run.evaluator.features(images, stop_signals))
        except Preempted:
            raise
        except BaseException:
            log.error(
                "measuring failed; the images are kept: measure them with "
                "python main_metrics.py --images %s",
                folder,
            )
            raise

    def write_results() -> None:
        if metrics:
            log.info("%s", metrics_table(metrics))
        # The model's flags as in its checkpoint
        flags = {name: model.config.get(name, value) for name, value in vars(args).items()}
        made_with = {"settings": asdict(settings), "weights": weights, "args": flags}
        if run.evaluator is not None:
            made_with["measured_against"] = reference_identity(args)
        write_json(
            folder.results_path, {**metrics, "seed": args.gen_seed, **made_with, **provenance()}
        )
        if run.evaluator is not None and not args.keep_images:
            folder.remove_images()
        log.info("sampled %d images; see %s.png", args.num_images, folder)

    distributed.on_rank_0(write_results)
    return metrics


def finished_before(
    run: Run, path: Path, cfg: float, temperature: float, weights: dict
) -> dict[str, float]:
    """Return the metrics that an interrupted run of the same command stored for ``path``.

    Returns:
        empty if there are none, or they are of other settings, weights or references.
    """
    if run.evaluator is None:
        return {}

    def read_metrics() -> dict[str, float]:
        folder = SampleFolder(path)
        made_with = {
            "settings": asdict(sampling_settings(run.args, cfg, temperature)),
            "weights": weights,
        }
        made_with |= {"measured_against": reference_identity(run.args)}
        if not folder.is_of(made_with) or not Path(f"{folder}.png").exists():
            return {}
        results = folder.results()
        metrics = {name: results[name] for name in ("images", *METRIC_TITLES) if name in results}
        return metrics if all(map(math.isfinite, metrics.values())) else {}

    return distributed.on_rank_0(read_metrics)


def search(run: Run, model: TokenBridge, weights: dict) -> None:
    """Sample and measure at every given guidance scale and temperature.

    For more than one pair, write a table and a heat map of the metrics.
    """
    args = run.args
    output_dir = Path(args.output_dir)
    pairs = list(product(args.cfg, args.temperature))
    names = [f"samples-cfg{cfg:g}-t{t:g}" for cfg, t in pairs] if len(pairs) > 1 else ["samples"]
    paths = [output_dir / name for name in names]

    def check_folders() -> None:
        for path in paths:
            SampleFolder(path).check_own()

    distributed.on_rank_0(check_folders)  # all folders before the first image
    rows = []
    for (cfg, temperature), path in zip(pairs, paths, strict=True):
        metrics = finished_before(run, path, cfg, temperature, weights) if len(pairs) > 1 else {}
        metrics = metrics or sample_and_measure(run, model, path, cfg, temperature, weights)
        rows.append({"cfg": cfg, "temperature": temperature, **metrics})
    if len(pairs) > 1 and run.evaluator is not None and distributed.is_main_process():
        from util.metrics.plots import write_search  # loads matplotlib

        write_search(rows, output_dir)
        log.info("wrote %s/search.md, search.json and search.png", output_dir)


def measure_likelihood(
    run: Run, model: TokenBridge, stop_signals: StopSignals | None = None
) -> dict[str, float]:
    """Return :func:`held_out_likelihood` with the head's options that flags set; log it."""
    assert run.held_out is not None
    metrics = held_out_likelihood(
        model, run.encoder, run.held_out, run.device, run.args.precision,
        head_options=likelihood_options(run, model), stop_signals=stop_signals,
    )  # fmt: skip
    text = "held-out cross-entropy over %d images: %.4f nats, %.4f bits a dimension"
    log.info(text, *(metrics[name] for name in ("images", "nats_per_dim", "bits_per_dim")))
    return metrics


def likelihood_options(run: Run, model: TokenBridge) -> dict[str, Any]:
    """Return the flags' values of the head's options on which the likelihood depends."""
    return {name: getattr(run.args, name) for name in model.head.likelihood_options}


def likelihood_once(
    run: Run, model: TokenBridge, path: Path, weights: dict, stop_signals: StopSignals
) -> dict[str, float]:
    """Return :func:`measure_likelihood`, read from ``path``.json if stored for the same weights."""
    record = SampleFolder(path)
    made_with = {
        "weights": weights,
        "precision": run.args.precision,
        **likelihood_options(run, model),
    }
    metrics = distributed.on_rank_0(lambda: record.results() if record.is_of(made_with) else None)
    if metrics is None:
        metrics = measure_likelihood(run, model, stop_signals)
        distributed.on_rank_0(
            lambda: write_json(record.results_path, {**metrics, **made_with, **provenance()})
        )
    return metrics


@contextmanager
def skipped_if_not_finite(epoch: int) -> Iterator[None]:
    """Leave the block, with a warning, if a measurement in it is NaN or infinite."""
    try:
        yield
    except NotFinite as error:
        warn("NOT MEASURED after epoch %d: %s. Training continues", epoch, error)


def evaluate_online(
    run: Run,
    model: TokenBridge,
    epoch: int,
    step: int,
    writer: RunLog | None,
    stop_signals: StopSignals,
) -> None:
    """Measure samples and likelihood after an epoch of training, and write them to the dashboard.

    Samples are measured without guidance and at every ``--cfg``. Images, metrics and likelihood in
    ``online_eval/`` that have the same weights and settings are read, not computed again. A
    measurement that is NaN or infinite is skipped, with a warning.

    Args:
        step: steps of the run so far.
        writer: the dashboard, on rank 0.

    Raises:
        UserError: files cannot be written or read.
        Preempted: a rank received one of the ``stop_signals``.
    """
    args = run.args
    if not (args.online_nll or args.online_eval):
        return
    log.info("measuring after epoch %d", epoch)
    folder = Path(args.output_dir) / "online_eval"
    scalars: dict[str, float] = {}
    parts = {"model": model, "vae": run.tokenizer and run.tokenizer.vae}
    checksums = {
        name: checksum(part.parameters()) for name, part in parts.items() if part is not None
    }
    weights = {"epoch": epoch, "ema": not args.no_ema, **checksums}

    # Likelihood
    if args.online_nll:
        path = folder / f"epoch{epoch:04d}-likelihood"
        with skipped_if_not_finite(epoch):
            metrics = likelihood_once(run, model, path, weights, stop_signals)
            scalars |= {f"eval/{name}": metrics[name] for name in ("nats_per_dim", "bits_per_dim")}

    # Samples
    guidance_scales = list(dict.fromkeys([1.0, *args.cfg])) if args.online_eval else []
    for cfg, temperature in product(guidance_scales, args.temperature):
        name = f"cfg{cfg:g}" + (f"-t{temperature:g}" if len(args.temperature) > 1 else "")
        path = folder / f"epoch{epoch:04d}-{name}"
        with skipped_if_not_finite(epoch):
            metrics = finished_before(run, path, cfg, temperature, weights)
            metrics = metrics or sample_and_measure(
                run, model, path, cfg, temperature, weights, stop_signals
            )
            scalars |= {
                f"eval/{key}-{name}": value
                for key, value in metrics.items()
                if key in METRIC_TITLES
            }
            if writer is not None:
                grid = np.asarray(read_image(f"{path}.png"))
                writer.add_image(f"samples/{name}", grid, step)
    if writer is not None:
        writer.add_scalars(scalars, step)
