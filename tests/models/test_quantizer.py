"""The quantizer against the published tables, a plain argmin, and theory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from models.quantizer import GaussianQuantizer, LinearQuantizer, gaussian_tables
from reconstruction import post_training_quantize
from tests.conftest import reference, variant


@pytest.mark.parametrize("levels", [8, 16, 32, 64])
def test_tables_are_the_published_ones(levels):
    _, tables = reference("quantizer")
    boundaries, values = gaussian_tables(levels)
    assert torch.equal(boundaries, tables[f"boundaries_{levels}"])
    # torch.exp rounds four of the 65 densities otherwise on some CPUs; a value is a quotient of small differences.
    assert torch.allclose(values, tables[f"reconstruction_values_{levels}"], rtol=0, atol=3e-6)


def test_inner_bins_are_equiprobable_and_values_are_their_means():
    boundaries, values = gaussian_tables(64)
    mass = norm.cdf(boundaries.double()[1:-1])
    assert torch.allclose(
        torch.from_numpy(mass).diff(), torch.full((62,), 1 / 64, dtype=torch.float64), atol=1e-6
    )
    draws = torch.randn(2_000_000, dtype=torch.float64)
    for i in (5, 31, 50):
        inside = draws[(draws >= boundaries[i]) & (draws < boundaries[i + 1])]
        assert abs(inside.mean() - values[i]) < 3e-3


@pytest.mark.parametrize("levels", [2, 3, 8, 64, 500])
@pytest.mark.parametrize("bound", [3.0, 5.0])
def test_bucketized_indices_are_the_argmin(levels, bound):
    quantizer = GaussianQuantizer(levels, -bound, bound)
    values = quantizer.reconstruction_values
    # Everywhere, around zero where float32 is finest, and on and beside every threshold.
    x = torch.cat(
        [3 * torch.randn(20000), torch.linspace(-1e-7, 1e-7, 1001), torch.linspace(-9, 9, 5001)]
    )
    beside = torch.cat(
        [torch.nextafter(quantizer.thresholds, torch.tensor(s)) for s in (-9.0, 9.0)]
    )
    x = torch.cat([x, quantizer.thresholds * bound / 3, beside * bound / 3])
    distances = (quantizer.normalize(x)[:, None] - values).abs()
    indices, dequantized = quantizer(x)
    assert torch.equal(indices, distances.argmin(dim=1))  # argmin takes the lower of equals
    assert torch.allclose(dequantized, (values[indices] + 3) / 6 * 2 * bound - bound, atol=1e-6)


@pytest.mark.parametrize("bounds", [(-5.0, 5.0), (-3.0, 3.0), (-1.5, 4.25)])
def test_comparing_latents_is_comparing_normalized_ones(bounds):
    quantizer = GaussianQuantizer(64, *bounds)
    edges = quantizer.latent_thresholds
    beside = [
        torch.nextafter(edges, torch.full_like(edges, side)) for side in (-torch.inf, torch.inf)
    ]
    x = torch.cat(
        [edges, *beside, torch.tensor([-100.0, 100.0, *bounds]), 3 * torch.randn(100_000)]
    )
    distance = (quantizer.normalize(x)[:, None] - quantizer.reconstruction_values).abs()
    indices, values = quantizer(x)
    assert torch.equal(indices, distance.argmin(dim=1)) and torch.equal(
        values, quantizer.dequantize(indices)
    )


def test_ties_go_to_the_lower_level():
    quantizer = GaussianQuantizer(2, -3, 3)  # values -a and a: zero is exactly between
    assert quantizer(torch.tensor([0.0]))[0].item() == 0


def test_errors_on_a_normal_are_the_known_ones():
    x = torch.randn(1_000_000)
    for bound, mse in {2: 0.0338, 3: 0.0039, 4: 0.0009, 5: 0.00066, 6: 0.00072}.items():
        error = (GaussianQuantizer(64, -bound, bound)(x)[1] - x).square().mean().item()
        assert error == pytest.approx(mse, rel=0.06), bound


def test_a_table_from_a_checkpoint_decides():
    quantizer, other = GaussianQuantizer(8), GaussianQuantizer(8, std_range=2.0)
    quantizer.load_state_dict(other.state_dict())
    assert torch.equal(quantizer.thresholds, other.thresholds)


@pytest.mark.parametrize("levels", [1024, 2048])
def test_levels_that_leave_bins_empty_are_refused(levels):
    with pytest.raises(ValueError, match="too many"):
        GaussianQuantizer(levels)
    GaussianQuantizer(512)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        GaussianQuantizer(1)
    with pytest.raises(ValueError, match="empty"):
        GaussianQuantizer(8, 5, 5)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    st.integers(1, 9),
    st.floats(0.5, 8),
    st.floats(0, 4),
)
def test_quantizing_is_monotone_idempotent_and_stays_in_range(values, bits, width, shift):
    quantizer = GaussianQuantizer(2**bits, shift - width, shift + width)
    x = torch.tensor(sorted(values))
    indices, dequantized = quantizer(x)
    assert (indices.diff() >= 0).all() and indices.min() >= 0 and indices.max() < 2**bits
    assert (dequantized >= shift - width - 1e-4).all() and (
        dequantized <= shift + width + 1e-4
    ).all()
    assert torch.equal(quantizer(dequantized)[0], indices)


def test_post_training_quantize():
    x = torch.randn(2, 16, 4, 4)
    indices, dequantized = post_training_quantize(x, 6, -5.0, 5.0)
    expected = GaussianQuantizer(64)(x)
    assert torch.equal(indices, expected[0]) and torch.equal(dequantized, expected[1])
    assert indices.shape == x.shape and indices.dtype == torch.int64
    indices, continuous = post_training_quantize(x, -1, -5.0, 5.0)
    assert indices is None and continuous is x


# --------------------------------------------------------------------------------------------------------------------
# Other quantizers, and calibration.


def test_linear_levels_are_the_centres_of_equal_bins():
    quantizer = LinearQuantizer(8, -4.0, 4.0)
    assert torch.allclose(quantizer.dequantize(torch.arange(8)), torch.arange(-3.5, 4), atol=1e-6)
    assert (LinearQuantizer(64)(torch.randn(200_000))[1].std() - 1).abs() < 0.01


def test_linear_levels_on_a_normal_have_the_known_error():
    x = torch.randn(500_000)
    error = (
        post_training_quantize(x, 6, -5.0, 5.0, quantizer="linear")[1].sub(x).square().mean().item()
    )
    assert error == pytest.approx((10 / 64) ** 2 / 12, rel=0.02)
    assert GaussianQuantizer(64)(x)[1].sub(x).square().mean().item() < 0.5 * error


def error_of(latents: torch.Tensor, **options) -> float:
    return (
        post_training_quantize(latents, 6, -5.0, 5.0, **options)[1]
        .sub(latents)
        .square()
        .mean()
        .item()
    )


def test_calibrated_levels_beat_plain_ones_where_deviations_differ_and_equal_them_where_not():
    equal = torch.randn(4, 8, 64, 64)
    deviations = torch.tensor([0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    means = torch.linspace(-2, 2, 8)
    unequal = equal * deviations[:, None, None] + means[:, None, None]
    for latents, ratio in ((unequal, 0.25), (equal, 1.05)):
        calibration = {
            "channel_mean": latents.mean(dim=(0, 2, 3)).tolist(),
            "channel_std": latents.std(dim=(0, 2, 3)).tolist(),
        }
        assert error_of(latents, **calibration) < ratio * error_of(latents)
        if latents is equal:
            assert error_of(latents) < 1.05 * error_of(latents, **calibration)
    # A channel's error grows with its variance and nothing else: the relative error is that of unit latents.
    quantized = post_training_quantize(
        unequal, 6, 0.0, 1.0, channel_mean=means, channel_std=deviations
    )[1]
    relative = (quantized - unequal).square().mean(dim=(0, 2, 3)) / deviations**2
    assert torch.allclose(relative, torch.full((8,), 0.00067), atol=5e-5)


def test_calibration_of_patches_repeats_each_channels():
    calibration = {"channel_mean": [0.0, 10.0], "channel_std": [1.0, 2.0]}
    model = variant(vae_embed_dim=2, vae_stride=8, patch_size=2, **calibration)
    latents = (
        torch.randn(3, 2, 8, 8) * torch.tensor([1.0, 2.0])[:, None, None]
        + torch.tensor([0.0, 10.0])[:, None, None]
    )
    quantized = model.unpatchify(model.quantize(model.patchify(latents))[1])
    expected = post_training_quantize(latents, 4, 0.0, 1.0, **calibration)[1]
    assert torch.allclose(quantized, expected, atol=1e-6)
