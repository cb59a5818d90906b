"""Inception's features of images, computed on all ranks (torch-fidelity's network)."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from util import distributed
from util.checkpoint.files import read_checkpoint
from util.data.loaders import RankSampler, leave_signals_to_parent
from util.errors import UserError
from util.log import log, progress_bar, warn
from util.precision import exact_convolutions
from util.signals import StopSignals, until_stopped

#: Inception's layers: pooled features for FID, precision and recall; logits for the Inception Score.
POOL, LOGITS = "2048", "logits_unbiased"


INCEPTION_SHA256 = "6726825d"  # its first digits, which the name of the weights' file ends with


def inception_path() -> Path:
    """Return where torch-fidelity puts Inception's weights, in the folder of torch's hub."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


def find_inception_weights(path: str | None) -> Path:
    """Inception's weights: ``path``, or torch-fidelity's download, fetched if missing; UserError if that fails."""
    place = Path(path) if path else inception_path()
    if path is None and not place.is_file() and distributed.is_local_main_process():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(place), hash_prefix=INCEPTION_SHA256, progress=False
            )
        except Exception as error:  # a missing network shows as many types of errors
            log.debug("fetching Inception failed: %s", error)
    distributed.barrier()
    if not place.is_file():
        raise UserError(
            f"no Inception weights at {place}: fetch them with python -m tools.download inception, or put "
            f"{URL_INCEPTION_V3} there, or name their place with --inception_weights"
        )
    return place


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception-v3, in float32 throughout, whatever the precision of the run that measures."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with exact_convolutions():
            return super().forward(x)


def load_inception(path: str | None, device: torch.device) -> Inception:
    """torch-fidelity's Inception-v3 (the FID one); UserError if there are no weights, or not those of it."""
    path = find_inception_weights(path)
    weights = read_checkpoint(path)  # refuses code, which torch-fidelity would run
    if not all(value.isfinite().all() for value in weights.values() if isinstance(value, Tensor)):
        raise UserError(f"{path} is damaged: it holds NaN or infinity; fetch it again")
    try:
        return Inception("inception-v3-compat", [POOL, LOGITS], str(path)).to(device)
    except RuntimeError as error:
        what = f"the weights of torch-fidelity's Inception ({URL_INCEPTION_V3})"
        raise UserError(f"{path} does not hold {what}") from error


@torch.no_grad()
def extract_features(
    images: Dataset,
    inception: Inception,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    stop_signals: StopSignals | None = None,
) -> dict[str, Tensor]:
    """Both layers' features, ``[N, 2048]`` and ``[N, 1008]``, of all images in order, on the CPU.

    Each process computes those of its share of the images; all processes return those of all.

    Raises:
        Preempted: a process received one of the ``stop_signals``.
    """
    distributed.check_equal(
        {"the number of images": len(images)}, "all processes must see the same folder or file"
    )
    share = RankSampler(len(images), distributed.get_rank(), distributed.get_world_size())
    if len(images) < distributed.get_world_size():
        warn(
            "%d images for %d processes: some have nothing to do",
            len(images),
            distributed.get_world_size(),
        )
    options = {"num_workers": num_workers, "worker_init_fn": leave_signals_to_parent}
    loader = DataLoader(images, batch_size=batch_size, sampler=share, **options)
    batches: list[tuple[Tensor, Tensor]] = []
    with progress_bar(total=len(images), unit="img", desc="Inception") as bar:
        for batch in until_stopped(loader, stop_signals):
            batches.append(inception(batch.to(device, non_blocking=True)))
            bar.update(min(len(batch) * distributed.get_world_size(), len(images) - bar.n))
    return gather_features(batches, len(images), device)


def gather_features(
    batches: list[tuple[Tensor, Tensor]], total: int, device: torch.device
) -> dict[str, Tensor]:
    """Features of all ``total`` images by layer, on the CPU, from the batches of each process's share."""
    features = {}
    for i, (name, width) in enumerate({POOL: 2048, LOGITS: 1008}.items()):
        own = torch.cat(
            [torch.zeros(0, width, device=device), *(batch[i].to(device) for batch in batches)]
        )
        features[name] = distributed.gather_rows(own, total).cpu()
    return features
