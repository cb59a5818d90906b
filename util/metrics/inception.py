"""Extract Inception's features from images, on all ranks (torch-fidelity's network)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from util import distributed
from util.checkpoint.files import read_checkpoint
from util.data.loaders import RankSampler, WorkerLoader
from util.errors import UserError
from util.log import log, progress_bar, warn
from util.precision import exact_convolutions
from util.signals import StopSignals, until_stopped

#: Layers: pooled features for FID, precision and recall; logits for the Inception Score.
POOL, LOGITS = "2048", "logits_unbiased"

#: First digits of the SHA-256 of the weights, which are also at the end of the file name.
INCEPTION_SHA256 = "6726825d"


def inception_path() -> Path:
    """Return torch-fidelity's default path of Inception's weights, in the folder of torch.hub."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]


def find_inception_weights(path: str | None) -> Path:
    """Return ``path``, or the default path of the weights; download them there if missing.

    Raises:
        UserError: there is no such file, and the download fails.
    """
    file = Path(path) if path else inception_path()
    if path is None and not file.is_file() and distributed.is_local_main_process():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(file), hash_prefix=INCEPTION_SHA256, progress=False
            )
        except Exception as error:  # a missing network raises many types of errors
            log.debug("downloading Inception failed: %s", error)
    distributed.barrier()
    if not file.is_file():
        raise UserError(
            f"no Inception weights at {file}: download them with python -m tools.download "
            f"inception, or put {URL_INCEPTION_V3} there, or pass their path as "
            "--inception_weights"
        )
    return file


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception-v3, always in float32, regardless of the run's precision."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return both layers' features of images; see torch-fidelity."""
        with exact_convolutions():
            return super().forward(x)


def load_inception(path: str | None, device: torch.device) -> Inception:
    """Return torch-fidelity's Inception-v3, the version for FID.

    Raises:
        UserError: the weights are missing, damaged, or of another network.
    """
    file = find_inception_weights(path)
    # Refuses files that would run code. torch-fidelity does not.
    weights = read_checkpoint(file)
    if not all(value.isfinite().all() for value in weights.values() if isinstance(value, Tensor)):
        raise UserError(f"{file} is damaged: it contains NaN or infinity; download it again")
    try:
        return Inception("inception-v3-compat", [POOL, LOGITS], str(file)).to(device)
    except RuntimeError as error:
        raise UserError(
            f"{file} does not contain the weights of torch-fidelity's Inception "
            f"({URL_INCEPTION_V3})"
        ) from error


@torch.no_grad()
def extract_features(
    images: Dataset,
    inception: Inception,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    stop_signals: StopSignals | None = None,
) -> dict[str, Tensor]:
    """Return both layers' features of all images in order, ``[N, 2048]`` and ``[N, 1008]``.

    Each rank computes a share of the features. All ranks return the features of all images, on the
    CPU.

    Raises:
        Preempted: a rank received one of the ``stop_signals``.
    """
    count = len(images)  # type: ignore[arg-type]
    world_size = distributed.get_world_size()
    distributed.check_equal(
        {"the number of images": count}, "all processes must see the same folder or file"
    )
    if count < world_size:
        warn("%d images for %d processes: some processes are idle", count, world_size)
    loader = WorkerLoader(
        images,
        batch_size=batch_size,
        sampler=RankSampler(count, distributed.get_rank(), world_size),
        num_workers=num_workers,
    )
    batches: list[tuple[Tensor, ...]] = []
    with progress_bar(total=count, unit="img", desc="Inception") as bar:
        for batch in until_stopped(loader, stop_signals):
            batches.append(inception(batch.to(device, non_blocking=True)))
            bar.update(min(len(batch) * world_size, count - bar.n))
    return gather_features(batches, count, device)


def gather_features(
    batches: Sequence[tuple[Tensor, ...]], total: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the features of all ``total`` images by layer, on the CPU, on all ranks.

    Args:
        batches: both layers' features of this rank's share of the images.
    """
    features = {}
    for i, (name, width) in enumerate({POOL: 2048, LOGITS: 1008}.items()):
        own = torch.cat(
            [torch.zeros(0, width, device=device), *(batch[i].to(device) for batch in batches)]
        )
        features[name] = distributed.gather_rows(own, total).cpu()
    return features
