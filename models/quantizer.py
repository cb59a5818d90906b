"""Post-training quantization of latents, one dimension at a time (section 3.1 of the paper, equations 1 to 5)."""

import math

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------------------------
# Tables: boundaries of equal probability (Eq. 2) and the mean of each bin (Eq. 3).


def gaussian_tables(levels: int, std_range: float = 3.0) -> tuple[Tensor, Tensor]:
    """Boundaries and reconstruction values of ``levels`` equiprobable bins of a standard normal.

    The outer boundaries are clamped to ``[-std_range, std_range]`` *before* the means are taken, as in the published
    tables, and the means are computed in float32, as there: in float64 they differ by up to 6e-6.

    Args:
        levels: number of bins K, at least 2.
        std_range: half-width r of the normalized range, in standard deviations.

    Returns:
        boundaries ``[K + 1]`` and reconstruction values ``[K]``, float32, ascending.

    Raises:
        ValueError: fewer than 2 levels, or so many that clamping leaves the outer bins empty (1024 at r = 3).
    """
    if levels < 2:
        raise ValueError(f"a quantizer needs at least 2 levels, got {levels}")
    quantiles = norm.ppf(np.linspace(0, 1, levels + 1))  # Eq. 2, from -inf to inf
    boundaries = torch.from_numpy(quantiles).float().clamp(-std_range, std_range)
    if not (boundaries.diff() > 0).all():
        raise ValueError(
            f"{levels} levels are too many for a range of {std_range} standard deviations: "
            "the outer bins lie wholly outside it (at 3 deviations, use 512 levels, 9 bits, at most)"
        )
    density = torch.exp(-(boundaries**2) / 2) / math.sqrt(2 * math.pi)
    cdf = (1 + torch.erf(boundaries / math.sqrt(2))) / 2
    values = (density[:-1] - density[1:]) / (cdf[1:] - cdf[:-1])  # Eq. 3: E[xi | b_i <= xi < b_i+1]
    return boundaries, values


def nearest_thresholds(values: Tensor) -> Tensor:
    """The largest float32 that is still nearest to each value rather than to the next one, ties to the lower.

    ``torch.bucketize(x, thresholds)`` is then Eq. 4's argmin over ``|x - value|``, bit for bit, at a cost that does
    not grow with levels times elements. The plain midpoint is not enough: in float32 the two distances of an ``x``
    beside it may round to the same number.

    Args:
        values: ascending reconstruction values ``[K]``.

    Returns:
        thresholds ``[K - 1]``.
    """
    below, above = values[:-1], values[1:]
    lower_wins, upper_wins = below.clone(), above.clone()
    while True:  # bisection: both distances are monotone in x, rounding included
        middle = lower_wins + (upper_wins - lower_wins) / 2
        if (~(middle > lower_wins) | ~(middle < upper_wins)).all():
            return lower_wins
        lower = (middle - below) <= (above - middle)
        lower_wins = torch.where(lower, middle, lower_wins)
        upper_wins = torch.where(lower, upper_wins, middle)


# --------------------------------------------------------------------------------------------------------------------
# The quantizer.


class GaussianQuantizer(nn.Module):
    """Maps each latent dimension to one of K levels and back (Eq. 1, 4 and 5).

    Squeezing ``[quant_min, quant_max]`` into ``[-std_range, std_range]`` spreads the levels as a normal of deviation
    ``(quant_max - quant_min) / (2 std_range)``, 5/3 by default. For unit-variance latents that is close to the sqrt(3)
    which Panter and Dite's rule (density of levels ~ p^(1/3)) gives as optimal, although the levels then do not look
    equiprobable for the data.

    Args:
        levels: number of levels K.
        quant_min, quant_max: bounds alpha_min, alpha_max of the latents, clamped to.
        std_range: half-width r of the normalized range, in standard deviations.

    Raises:
        ValueError: see :func:`gaussian_tables`; or an empty range.
    """

    def __init__(self, levels: int, quant_min: float = -5.0, quant_max: float = 5.0, std_range: float = 3.0):
        super().__init__()
        if not quant_min < quant_max:
            raise ValueError(f"the quantizer's range is empty: [{quant_min}, {quant_max}]")
        self.levels, self.quant_min, self.quant_max, self.std_range = levels, quant_min, quant_max, std_range
        boundaries, values = gaussian_tables(levels, std_range)
        self.register_buffer("reconstruction_values", values)
        self.register_buffer("boundaries", boundaries)
        self.register_buffer("thresholds", nearest_thresholds(values), persistent=False)
        # Thresholds follow whatever table a checkpoint brings.
        self.register_load_state_dict_post_hook(lambda module, _: module._update_thresholds())

    def _update_thresholds(self) -> None:
        if not (self.reconstruction_values.diff() > 0).all():
            raise ValueError("a quantizer's reconstruction values must ascend")
        self.thresholds.copy_(nearest_thresholds(self.reconstruction_values.float().cpu()))

    def normalize(self, x: Tensor) -> Tensor:
        """Eq. 1: latents to ``[-std_range, std_range]``, clamped; any shape."""
        r = self.std_range
        return (2 * r * (x.float() - self.quant_min) / (self.quant_max - self.quant_min) - r).clamp(-r, r)

    def dequantize(self, indices: Tensor) -> Tensor:
        """Eq. 5: indices in ``[0, K)``, any shape, to latents of that shape, float32."""
        scale = (self.quant_max - self.quant_min) / (2 * self.std_range)
        return (self.reconstruction_values[indices] + self.std_range) * scale + self.quant_min

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of any shape to ``(indices, dequantized)`` of that shape, int64 and float32 (Eq. 4, 5)."""
        indices = torch.bucketize(self.normalize(x).contiguous(), self.thresholds)
        return indices, self.dequantize(indices)
