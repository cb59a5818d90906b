"""Inception, torch-fidelity's network, whose features make a Frechet distance an FID."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from util import distributed
from util.checkpoint.files import read_checkpoint
from util.errors import UserError
from util.log import log
from util.metrics.networks import LOGITS, POOL, FeatureNetwork, Features, check_weights_finite
from util.precision import exact_convolutions

#: Torch-fidelity's names of the layers with features and logits.
LAYERS = ["2048", "logits_unbiased"]

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
            "--feature_weights"
        )
    return file


class Inception(FeatureNetwork):
    """torch-fidelity's Inception-v3, always in float32, regardless of the run's precision.

    Args:
        weights: see :func:`find_inception_weights`.

    Raises:
        UserError: the weights are missing, damaged, or of another network.
    """

    name = "inception"
    widths: Mapping[str, int] = {POOL: 2048, LOGITS: 1008}

    def __init__(self, weights: str | None = None):
        super().__init__()
        file = find_inception_weights(weights)
        # Refuses files that would run code. torch-fidelity does not.
        check_weights_finite(read_checkpoint(file), file)
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", LAYERS, str(file))
        except RuntimeError as error:
            raise UserError(
                f"{file} does not contain the weights of torch-fidelity's Inception "
                f"({URL_INCEPTION_V3})"
            ) from error

    def forward(self, images: Tensor) -> Features:
        with exact_convolutions():
            return Features(*self.network(images))
