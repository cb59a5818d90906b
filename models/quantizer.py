"""Post-training quantization of latents, one dimension at a time (section 3.1, Eq. 1 to 5)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import models.location  # noqa: F401, before packages of the same names

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn

from util.model_config import ModelConfig

# --------------------------------------------------------------------------------------------------
# Tables: boundaries of equal probability (Eq. 2) and the mean of each bin (Eq. 3).


def gaussian_tables(levels: int, std_range: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return boundaries and values of ``levels`` equiprobable bins of a standard normal.

    The outer boundaries are clamped to ``[-std_range, std_range]`` *before* the means are taken, as
    in the published tables, and the means are computed in float32, as there: in float64 they differ
    by up to 6e-6.

    Args:
        levels: number of bins K, at least 2.
        std_range: half-width r of the normalized range, in standard deviations.

    Returns:
        boundaries ``[K + 1]`` and reconstruction values ``[K]``, float32, ascending.

    Raises:
        ValueError: so many levels that clamping leaves the outer bins empty (1024 at r = 3).
    """
    quantiles = ndtri(np.linspace(0, 1, levels + 1))  # Eq. 2, from -inf to inf
    boundaries = torch.from_numpy(quantiles).float().clamp(-std_range, std_range)
    if not (boundaries.diff() > 0).all():
        raise ValueError(
            f"{levels} levels are too many for a range of {std_range} standard deviations: "
            "the outer bins lie outside of it (for 3 standard deviations use at most 512 levels)"
        )
    density = torch.exp(-(boundaries**2) / 2) / math.sqrt(2 * math.pi)
    cdf = (1 + torch.erf(boundaries / math.sqrt(2))) / 2
    values = (density[:-1] - density[1:]) / (cdf[1:] - cdf[:-1])  # Eq. 3: E[xi | b_i <= xi < b_i+1]
    return boundaries, values


def linear_tables(levels: int, std_range: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return tables as :func:`gaussian_tables`, of bins of equal width (section 3.1, remark)."""
    boundaries = torch.linspace(-std_range, std_range, levels + 1)
    return boundaries, (boundaries[:-1] + boundaries[1:]) / 2


def bisect(low: Tensor, high: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the largest float32 in [low, high], elementwise, for which ``holds`` is true.

    Args:
        holds: true up to some number, then false.
    """
    while True:
        middle = low + (high - low) / 2
        if (~(middle > low) | ~(middle < high)).all():
            return low
        true = holds(middle)
        low, high = torch.where(true, middle, low), torch.where(true, high, middle)


def nearest_thresholds(values: Tensor) -> Tensor:
    """Return the largest float32 nearer to each of K values than to the next one: ``[K - 1]``.

    ``torch.bucketize(x, thresholds)`` is then Eq. 4's argmin over ``|x - value|``, bit for bit,
    with ties to the lower level, at a cost that does not grow with levels times elements. The
    midpoint would not be exact: in float32 the two distances of an ``x`` beside it may round to the
    same number.
    """
    below, above = values[:-1], values[1:]
    return bisect(
        below, above, lambda x: x - below <= above - x
    )  # monotone in x, rounding included


# --------------------------------------------------------------------------------------------------
# The quantizer.


class ScalarQuantizer(nn.Module):
    """Maps each latent dimension to one of K levels and back (Eq. 1, 4 and 5).

    Mapping ``[quant_min, quant_max]`` to ``[-std_range, std_range]`` spreads Gaussian levels as a
    normal of standard deviation ``(quant_max - quant_min) / (2 std_range)``, 5/3 by default. For
    unit-variance latents that is close to the optimum sqrt(3) of Panter and Dite's rule (density of
    levels ~ p^(1/3)), although the levels are then not equiprobable for the data. The same rule
    calibrates channels whose mean and std are known: the range of each is ``mean +- std_range
    sqrt(3) std``.

    Args:
        levels: number of levels K.
        quant_min, quant_max: bounds alpha_min, alpha_max, to which latents are clamped.
        std_range: half-width r of the normalized range, in standard deviations.
        channel_mean, channel_std: mean and standard deviation of each channel's latents, which set
            that channel's bounds in place of the two above; the channels are then the last
            dimension of what is quantized.

    Raises:
        ValueError: too few or too many levels, an empty range, or see :func:`calibrated_bounds`.
    """

    tables: Callable[[int, float], tuple[Tensor, Tensor]]
    reconstruction_values: Tensor
    boundaries: Tensor
    thresholds: Tensor
    latent_thresholds: Tensor
    channel_min: Tensor
    channel_max: Tensor

    def __init__(
        self,
        levels: int,
        quant_min: float = -5.0,
        quant_max: float = 5.0,
        std_range: float = 3.0,
        channel_mean: Sequence[float] | None = None,
        channel_std: Sequence[float] | None = None,
    ):
        super().__init__()
        if levels < 2:
            raise ValueError(f"a quantizer needs at least 2 levels, got {levels}")
        if not quant_min < quant_max:
            raise ValueError(f"the quantizer's range is empty: [{quant_min}, {quant_max}]")
        self.levels, self.quant_min, self.quant_max, self.std_range = (
            levels,
            quant_min,
            quant_max,
            std_range,
        )
        boundaries, values = self.tables(levels, std_range)
        sizes = [list(table.shape) for table in (boundaries, values)]
        if sizes != [[levels + 1], [levels]] or not values.isfinite().all():
            raise ValueError(
                f"{levels} levels need {levels + 1} boundaries and {levels} finite values, got "
                f"shapes {sizes}"
            )
        self.register_buffer("reconstruction_values", values)
        self.register_buffer("boundaries", boundaries)  # for published checkpoints only
        self.register_buffer("thresholds", torch.zeros(levels - 1), persistent=False)
        self.register_buffer("latent_thresholds", torch.zeros(levels - 1), persistent=False)
        self.calibrated = channel_mean is not None or channel_std is not None
        if self.calibrated:
            low, high = calibrated_bounds(channel_mean, channel_std, std_range)
            self.register_buffer("channel_min", low, persistent=False)
            self.register_buffer("channel_max", high, persistent=False)
        self._update_thresholds()
        # A checkpoint may hold other tables, from which other thresholds follow.
        self.register_load_state_dict_post_hook(lambda module, _: module._update_thresholds())

    def _update_thresholds(self) -> None:
        """Compute the thresholds between levels, for normalized latents and for latents."""
        if not (self.reconstruction_values.diff() > 0).all():
            raise ValueError("a quantizer's reconstruction values must ascend")
        limits = nearest_thresholds(self.reconstruction_values.float().cpu())
        self.thresholds.copy_(limits)
        if not self.calibrated:
            # The largest latents that Eq. 1 maps to a threshold or below: comparing with them skips
            # Eq. 1.
            margin = 1.0 + abs(self.quant_min) + abs(self.quant_max)
            low = torch.full_like(limits, self.quant_min - margin)
            high = torch.full_like(limits, self.quant_max + margin)
            self.latent_thresholds.copy_(bisect(low, high, lambda x: self.normalize(x) <= limits))

    def bounds(self) -> tuple[float | Tensor, float | Tensor]:
        """Return alpha_min and alpha_max: numbers, or ``[C]`` each if channels are calibrated."""
        return (
            (self.channel_min, self.channel_max)
            if self.calibrated
            else (self.quant_min, self.quant_max)
        )

    def normalize(self, x: Tensor) -> Tensor:
        """Map latents of any shape to ``[-std_range, std_range]``, clamped (Eq. 1)."""
        r, (low, high) = self.std_range, self.bounds()
        return (2 * r * (x.float() - low) / (high - low) - r).clamp(-r, r)

    def dequantize(self, indices: Tensor) -> Tensor:
        """Map indices in ``[0, K)``, of any shape, to float32 latents of that shape (Eq. 5)."""
        low, high = self.bounds()
        scale = (high - low) / (2 * self.std_range)
        return (self.reconstruction_values[indices] + self.std_range) * scale + low

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return int64 indices and float32 values of latents of any shape (Eq. 4, 5)."""
        if self.calibrated:
            indices = torch.bucketize(self.normalize(x).contiguous(), self.thresholds)
            return indices, self.dequantize(indices)
        indices = torch.bucketize(x.float().contiguous(), self.latent_thresholds)
        return indices, self.dequantize(torch.arange(self.levels, device=x.device))[indices]


def calibrated_bounds(
    channel_mean: Sequence[float] | None, channel_std: Sequence[float] | None, std_range: float
) -> tuple[Tensor, Tensor]:
    """Return the bounds ``mean -+ std_range sqrt(3) std`` of each channel: ``[C]`` each.

    Raises:
        ValueError: means or stds are missing, of different numbers, not finite, or stds not above
            0.
    """
    if channel_mean is None or channel_std is None or len(channel_mean) != len(channel_std):
        raise ValueError("calibration needs a mean and a standard deviation for each channel")
    mean = torch.tensor(channel_mean, dtype=torch.float32)
    std = torch.tensor(channel_std, dtype=torch.float32)
    if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        raise ValueError("means of channels must be finite, standard deviations above zero")
    half = std_range * math.sqrt(3) * std
    return mean - half, mean + half


class GaussianQuantizer(ScalarQuantizer):
    """Levels of equal probability under a normal (Eq. 2 and 3)."""

    tables = staticmethod(gaussian_tables)


class LinearQuantizer(ScalarQuantizer):
    """Levels of equal distance (section 3.1, remark)."""

    tables = staticmethod(linear_tables)


#: Values of ``--quantizer``.
QUANTIZERS = {"gaussian": GaussianQuantizer, "linear": LinearQuantizer}


def build_quantizer(config: ModelConfig) -> ScalarQuantizer:
    """Return the quantizer of tokens ``[B, L, C]`` that ``config`` describes.

    Raises:
        ValueError: there is no such quantizer, or see :class:`ScalarQuantizer`.
    """
    if config.quantizer not in QUANTIZERS:
        raise ValueError(f"quantizer is one of {', '.join(QUANTIZERS)}, not {config.quantizer!r}")
    calibration: dict[str, Any] = {
        "channel_mean": config.channel_mean,
        "channel_std": config.channel_std,
    }
    for name, values in calibration.items():
        if values is not None:
            if len(values) != config.vae_embed_dim:
                raise ValueError(
                    f"{len(values)} values of {name} for {config.vae_embed_dim} channels"
                )
            # The entries of one channel of a patch lie side by side in its token.
            calibration[name] = np.repeat(values, config.patch_size**2)
    ranges = config.quant_levels, config.quant_min, config.quant_max, config.std_range
    return QUANTIZERS[config.quantizer](*ranges, **calibration)
