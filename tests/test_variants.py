"""Every variant of the paper: heads, orders, groups, quantizers, calibration, orders of tokens, and the figures."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models import sampling
from models.quantizer import GaussianQuantizer, LinearQuantizer
from models.tokenbridge import MAX_CLASSES, TokenBridge
from models.vae import AutoencoderKL
from reconstruction import post_training_quantize
from tests.conftest import SHORT, SMALL, TINY, filled
from tools import channel_order
from util import checkpoint
from util.config import check_config
from util.errors import UserError
from util.loader import CachedFolder

FEW = {"vae_embed_dim": 4, "quant_levels": 3}  # 81 tokens: all can be enumerated


def variant(**options) -> TokenBridge:
    return filled(TokenBridge(**{**SMALL, **options}))


# --------------------------------------------------------------------------------------------------------------------
# Heads and groups.


@torch.no_grad()
def test_a_parallel_head_does_not_look_at_the_targets():
    model = variant(head="parallel")
    features, mask = torch.randn(2, 16, 32), torch.ones(2, 16)
    a, b = (model.forward_channel_ar(features, torch.randint(16, (2, 16, 16)), mask) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (32, 16, 16)
    assert not any("token_embeddings" in name or "channel_mask" in name for name in model.state_dict())
    # Places differ, and sampling is of these logits.
    assert not torch.allclose(a[:, 0], a[:, 1], atol=1e-2)
    chosen = model.head.sample(features.flatten(0, 1), lambda logits, place: logits.argmax(-1))
    assert torch.equal(chosen, a.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("head", ["ar", "parallel"])
def test_the_joint_likelihood_of_every_head_sums_to_one(head, group):
    model = variant(**FEW, head=head, channels_per_group=group)
    every = torch.cartesian_prod(*[torch.arange(3)] * 4)
    mask = torch.zeros(81, 16)
    mask[:, 5] = 1
    features = torch.randn(1, 1, 32).expand(81, 16, 32)
    logits = model.forward_channel_ar(features, every[:, None].expand(-1, 16, -1), mask)
    assert logits.shape == (81, 4 // group, 3**group)
    log_probs = F.log_softmax(logits, dim=-1).gather(-1, model.to_classes(every)[..., None]).sum(dim=(1, 2))
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    # What sampling reports is the same number.
    uniform = torch.rand(200, model.head.places)
    chosen, sampled = sampling.sample_classes(model.head, features[:1, 0].expand(200, -1), 1.0, uniform, "trained")
    rank = (model.to_levels(chosen) * torch.tensor([27, 9, 3, 1])).sum(-1)
    assert torch.allclose(sampled, log_probs[rank], atol=1e-4)


@torch.no_grad()
def test_a_grouped_place_sees_only_the_groups_before_it():
    model = variant(channels_per_group=2, quant_levels=4)
    features, mask = torch.randn(1, 16, 32), torch.zeros(1, 16)
    mask[0, 0] = 1
    targets = torch.randint(4, (1, 16, 16))
    logits = model.forward_channel_ar(features, targets, mask)
    for channel in (0, 5, 15):
        changed = targets.clone()
        changed[..., channel] = (changed[..., channel] + 1) % 4
        same = (model.forward_channel_ar(features, changed, mask) - logits).abs().amax(dim=(0, 2)) < 1e-6
        place = channel // 2
        assert same[: place + 1].all() and not same[place + 1 :].any()


def test_levels_and_classes_are_one_to_one():
    model = variant(channels_per_group=4, quant_levels=5, vae_embed_dim=8)
    levels = torch.randint(5, (300, 8))
    classes = model.to_classes(levels)
    assert classes.shape == (300, 2) and classes.max() < 5**4
    assert torch.equal(model.to_levels(classes), levels)
    assert model.to_classes(torch.tensor([0, 0, 0, 1, 1, 0, 0, 0])).tolist() == [1, 125]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels_per_group": 3}, "groups of 3 do not divide the 16 channels"),
        ({"channels_per_group": 4, "quant_levels": 64}, r"16,777,216 joint classes.*3,758,096,384 parameters.*14 GiB"),
        ({"channel_order": [0] * 16}, "each of 0 to 15 once"),
        ({"channel_order": ["a"] * 16}, "each of 0 to 15 once"),
        ({"head": "diffusion"}, '"ar" or "parallel"'),
        ({"quantizer": "vq"}, "quantizer one of"),
        ({"channel_mean": [0.0] * 16}, "mean and a deviation"),
        ({"channel_mean": [0.0] * 3, "channel_std": [1.0] * 3}, "3 values of channel_mean for 16 channels"),
        ({"channel_mean": [0.0] * 16, "channel_std": [0.0] * 16}, "above zero"),
        ({"channel_embed_dim": 30, "channel_heads": 4}, "30 is not a multiple of its 4"),
    ],
)
def test_variants_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TokenBridge(**{**SMALL, **options})
    assert MAX_CLASSES >= 16**4  # Table 2d


def test_flops_follow_the_head():
    plain, grouped = variant(quant_levels=4), variant(quant_levels=4, channels_per_group=4)
    assert grouped.training_flops() < plain.training_flops()


def test_a_model_is_rebuilt_from_its_config():
    model = variant(
        **{**FEW, "head": "parallel", "channels_per_group": 2, "channel_order": [3, 1, 0, 2], "quantizer": "linear"},
        channel_mean=[0.0, 1.0, 2.0, 3.0], channel_std=[1.0, 2.0, 3.0, 4.0],
    )  # fmt: skip
    config = json.loads(json.dumps(model.config))  # plain types
    again = TokenBridge.from_config({**config, "latent_factor": 0.3})
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    seeds = {"bsz": 2, "num_iter": 3, "seeds": [1, 2]}
    assert torch.equal(again.eval().sample_tokens(**seeds), model.sample_tokens(**seeds))


# --------------------------------------------------------------------------------------------------------------------
# Quantizers.


def test_linear_levels_are_the_centres_of_equal_bins():
    quantizer = LinearQuantizer(8, -4.0, 4.0)
    assert torch.allclose(quantizer.dequantize(torch.arange(8)), torch.arange(-3.5, 4), atol=1e-6)
    assert (LinearQuantizer(64)(torch.randn(200_000))[1].std() - 1).abs() < 0.01


def test_linear_levels_on_a_normal_have_the_known_error():
    x = torch.randn(500_000)
    error = post_training_quantize(x, 6, -5.0, 5.0, quantizer="linear")[1].sub(x).square().mean().item()
    assert error == pytest.approx((10 / 64) ** 2 / 12, rel=0.02)
    assert GaussianQuantizer(64)(x)[1].sub(x).square().mean().item() < 0.5 * error


def error_of(latents: torch.Tensor, **options) -> float:
    return post_training_quantize(latents, 6, -5.0, 5.0, **options)[1].sub(latents).square().mean().item()


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
    quantized = post_training_quantize(unequal, 6, 0.0, 1.0, channel_mean=means, channel_std=deviations)[1]
    relative = (quantized - unequal).square().mean(dim=(0, 2, 3)) / deviations**2
    assert torch.allclose(relative, torch.full((8,), 0.00067), atol=5e-5)


def test_calibration_of_patches_repeats_each_channels():
    calibration = {"channel_mean": [0.0, 10.0], "channel_std": [1.0, 2.0]}
    model = variant(vae_embed_dim=2, vae_stride=8, patch_size=2, **calibration)
    latents = (
        torch.randn(3, 2, 8, 8) * torch.tensor([1.0, 2.0])[:, None, None] + torch.tensor([0.0, 10.0])[:, None, None]
    )
    quantized = model.unpatchify(model.quantize(model.patchify(latents))[1])
    expected = post_training_quantize(latents, 4, 0.0, 1.0, **calibration)[1]
    assert torch.allclose(quantized, expected, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Orders of tokens.


@torch.no_grad()
def plain_confidence(model: TokenBridge, labels: torch.Tensor, num_iter: int, cfg: float) -> tuple[torch.Tensor, list]:
    """Order by confidence at temperature 0, one image after the other, without cache, gathers or sorting."""
    latents, order = [], []
    for label in labels:
        tokens, unknown, taken = torch.zeros(1, 16, 16), set(range(16)), []
        schedule = [*sampling.mask_schedule(num_iter, 16)[:-1], 0]
        for left in schedule:
            known = torch.tensor([sorted(set(range(16)) - unknown)], dtype=torch.long)
            scale = 1 + (cfg - 1) * (16 - max(left, 1)) / 16
            conditional = model.backbone(tokens, known, model.class_emb(label[None]))
            unconditional = model.backbone(tokens, known, model.backbone.fake_latent)
            features = unconditional + scale * (conditional - unconditional)
            found = {}
            for position in unknown:
                chosen, log_prob = torch.zeros(1, 16, dtype=torch.long), 0.0
                for place in range(16):
                    logits = model.head(features[:, position], chosen)[0, place].log_softmax(0)
                    chosen[0, place] = logits.argmax()
                    log_prob += logits.max().item()
                found[position] = (log_prob, chosen)
            best = sorted(found, key=lambda position: found[position][0], reverse=True)[: len(unknown) - left]
            for position in best:
                levels = found[position][1][0, model.from_generation_order]
                tokens[0, position] = model.quantizer.dequantize(levels)
                unknown.remove(position)
            taken.append(sorted(best))
        latents.append(model.unpatchify(tokens))
        order.append(taken)
    return torch.cat(latents), order


def test_order_by_confidence_takes_the_most_confident_tokens(small_model):
    labels = torch.tensor([2, 0])
    sampled = small_model.sample_tokens(2, 5, 2.0, labels=labels, temperature=0, order="confidence")
    expected, order = plain_confidence(small_model, labels, 5, 2.0)
    assert torch.allclose(sampled, expected, atol=1e-4)
    assert order[0] != order[1]  # each image has its own


def test_confidence_is_what_the_head_says(small_model):
    latents, confidence = small_model.sample_tokens(1, 1, temperature=0, seeds=[1], return_confidence=True)
    features = small_model.backbone(
        torch.zeros(1, 16, 16), torch.zeros(1, 0, dtype=torch.long), small_model.backbone.fake_latent
    )
    levels = small_model.quantize(small_model.patchify(latents))[0][..., small_model.generation_order]
    logits = small_model.forward_channel_ar(features, levels, torch.ones(1, 16)).log_softmax(-1)
    assert torch.allclose(logits.gather(-1, levels[0][..., None]).sum(dim=(1, 2)), confidence[0], atol=1e-4)


def test_noise_makes_orders_by_confidence_differ(small_model):
    options = {"bsz": 3, "num_iter": 6, "order": "confidence", "temperature": 0, "return_confidence": True}
    plain = small_model.sample_tokens(**options, seeds=[1, 2, 3])[1]
    assert torch.allclose(plain[:1].expand(3, -1), plain, atol=1e-5)  # at temperature 0 nothing is drawn
    noisy = small_model.sample_tokens(**options, seeds=[1, 2, 3], confidence_noise=50.0)[1]
    assert not torch.allclose(noisy[0], noisy[1], atol=1e-2)
    assert torch.equal(noisy, small_model.sample_tokens(**options, seeds=[1, 2, 3], confidence_noise=50.0)[1])


def test_raster_order_goes_row_by_row(small_model):
    reversed_rows = torch.arange(15, -1, -1).expand(2, -1)
    options = {"bsz": 2, "num_iter": 16, "temperature": 0, "labels": torch.tensor([0, 1])}
    expected = small_model.sample_tokens(**options, orders=reversed_rows)
    assert torch.equal(small_model.sample_tokens(**options, order="raster"), expected)


@pytest.mark.parametrize("order", sampling.ORDERS)
def test_known_tokens_stay_a_different_number_in_each_image(small_model, order):
    known = torch.randn(4, 16, 4, 4)
    mask = torch.rand(4, 16).argsort(dim=1) < torch.tensor([0, 3, 9, 16])[:, None]
    options = {"num_iter": 4, "cfg": 2.0, "order": order}
    labels, seeds = torch.tensor([0, 1, 2, 3]), [4, 5, 6, 7]
    together, confidence = small_model.sample_tokens(
        4, **options, labels=labels, seeds=seeds, known_latents=known, known_mask=mask, return_confidence=True
    )
    alone = [
        small_model.sample_tokens(
            1, **options, labels=labels[i : i + 1], seeds=seeds[i : i + 1],
            known_latents=known[i : i + 1], known_mask=mask[i : i + 1],
        )
        for i in range(4)
    ]  # fmt: skip
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    tokens, kept = small_model.patchify(together), small_model.quantize(small_model.patchify(known))[1]
    assert torch.allclose(tokens[mask], kept[mask], atol=1e-6)
    assert ((tokens - kept)[~mask].abs() > 1e-3).any(dim=-1).float().mean() > 0.9
    assert (confidence[mask] == 0).all() and (confidence[~mask] < 0).all()
    # Without known tokens nothing changes.
    plain = small_model.sample_tokens(1, **options, labels=labels[:1], seeds=seeds[:1])
    assert torch.allclose(plain, together[:1], atol=1e-4)


def test_bad_orders_and_known_tokens_are_named(small_model):
    latents, mask = torch.zeros(2, 16, 4, 4), torch.zeros(2, 16)
    for message, options in {
        "order is one of": {"order": "spiral"},
        "leave orders out": {"order": "confidence", "orders": small_model.sample_orders(2)},
        "must not be negative": {"confidence_noise": -1.0},
        "go together": {"known_mask": mask},
        r"expected \[2, 16, 4, 4\] and \[2, 16\]": {"known_latents": latents[:1], "known_mask": mask},
    }.items():
        with pytest.raises(ValueError, match=message):
            small_model.sample_tokens(2, **options)


# --------------------------------------------------------------------------------------------------------------------
# The order of channels.


def maps_with_share(shares: list[float], images: int = 40, side: int = 16) -> torch.Tensor:
    """Maps ``[N, C, side, side]`` whose expected energy lies by ``shares`` inside the low frequencies."""
    low = channel_order.low_frequencies(side, side, 0.5)
    low[0, 0] = False
    high = ~low
    high[0, 0] = False
    spectrum = torch.fft.fft2(torch.randn(images, len(shares), side, side))
    for channel, share in enumerate(shares):
        spectrum[:, channel] *= low * math.sqrt(share / low.sum()) + high * math.sqrt((1 - share) / high.sum())
    return torch.fft.ifft2(spectrum).real


def test_energy_shares_are_those_the_maps_were_made_with():
    shares = [0.1, 0.9, 0.5, 0.7, 0.3]
    maps = maps_with_share(shares)
    maps[:, 0] += 1000  # an offset that all images share is nothing
    low = channel_order.low_frequencies(16, 16, 0.5)
    measured = channel_order.low_shares(channel_order.energies(maps, low), len(maps))
    assert torch.allclose(measured, torch.tensor(shares).double(), atol=0.05)
    assert channel_order.frequency_order(measured) == [1, 3, 2, 4, 0]
    # What differs from image to image is.
    maps[:, 0] += 50 * torch.randn(len(maps), 1, 1)
    assert channel_order.low_shares(channel_order.energies(maps, low), len(maps))[0] > 0.99


def write_moments(root, maps: torch.Tensor, metadata: dict) -> None:
    moments = torch.cat([maps, torch.full_like(maps, -10.0)], dim=1).float().numpy()
    for number, each in enumerate(moments):
        path = root / str(number % 4) / f"{number}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, moments=each, moments_flip=each[..., ::-1])
    (root / "cache.json").write_text(json.dumps({"images": len(maps), "complete": True, **metadata}))


def test_the_order_is_measured_drawn_and_trained_with(run, refused, tmp_path):
    shares = [0.1, 0.8, 0.5, 0.3]
    vae = {"embed_dim": 4, "ch_mult": [1, 1, 2]}
    write_moments(tmp_path / "cache", maps_with_share(shares), {"vae": vae, "latent_factor": 0.5, "img_size": 64})
    cache = f"--cached_path {tmp_path}/cache --num_workers 0"
    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/order")
    written = json.loads((tmp_path / "order" / "channel_order.json").read_text())
    assert written["order"] == [1, 2, 3, 0] and written["images"] == 40
    assert written["shares"] == pytest.approx(shares, abs=0.06)
    with Image.open(tmp_path / "order" / "channel_order.png") as picture:
        assert min(picture.size) > 100

    tiny = TINY.replace("--img_size 16", "--img_size 64") + f" {SHORT} --epochs 1 --use_cached {cache}"
    by_file = f"--channel_order {tmp_path}/order/channel_order.json"
    run("main_tokenbridge", f"{tiny} --output_dir {tmp_path}/run {by_file}")
    assert checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")["config"]["channel_order"] == [1, 2, 3, 0]
    assert "neither frequency" in refused("main_tokenbridge", f"{tiny} --output_dir {tmp_path}/x --channel_order best")
    assert "0 to 3 once" in refused("main_tokenbridge", f"{tiny} --output_dir {tmp_path}/x --channel_order 0,1,2,2")
    line = refused("main_tokenbridge", f"{tiny} --output_dir {tmp_path}/x --channel_order frequency")
    assert "channel_order.py" in line

    run("tools.channel_order", f"{cache} --output_dir {tmp_path}/patches --patch_size 2")
    assert sorted(json.loads((tmp_path / "patches" / "channel_order.json").read_text())["order"]) == list(range(16))
    assert "too few" in refused("tools.channel_order", f"{cache} --patch_size 8")
    assert "--cached_path" in refused("tools.channel_order", "--num_workers 0")


def test_only_the_published_tokenizer_has_its_order(run, images, tmp_path):
    vae = AutoencoderKL(16, (1, 1, 2), ch=8, num_res_blocks=1)
    checkpoint.save_vae(tmp_path / "vae.ckpt", filled(vae), 0.5)
    command = f"{TINY} {SHORT} --epochs 1 --vae_path {tmp_path}/vae.ckpt --data_path {images} --resume {tmp_path}/run"
    run("main_tokenbridge", f"{command} --output_dir {tmp_path}/run")
    content = checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")
    assert content["config"]["channel_order"] == list(range(16))
    assert content["config"]["class_names"] == [f"class{label}" for label in range(4)]


# --------------------------------------------------------------------------------------------------------------------
# As commands.

VARIANTS = {
    "parallel": ("--head parallel", {"head": "parallel"}),
    "sequential": ("--channel_order sequential", {"channel_order": list(range(8))}),
    "order": ("--channel_order 7,6,5,4,3,2,1,0", {"channel_order": list(range(7, -1, -1))}),
    "pairs": ("--channels_per_group 2", {"channels_per_group": 2}),
    "fours": ("--channels_per_group 4 --head parallel", {"channels_per_group": 4, "head": "parallel"}),
    "small": (
        "--head_dim 64 --head_depth 1 --head_heads 2",
        {"channel_embed_dim": 64, "channel_depth": 1, "channel_heads": 2},
    ),
    "linear": ("--quantizer linear", {"quantizer": "linear"}),
    "calibrated": ("--quant_calibrate", {"quantizer": "gaussian"}),
    "patches": ("--patch_size 2 --quant_calibrate", {"patch_size": 2}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_saves_resumes_and_samples(run, cached, vae_path, tmp_path, name):
    flags, expected = VARIANTS[name]
    out = f"--output_dir {tmp_path}/run"
    train = f"{TINY} {SHORT} --use_cached --cached_path {cached} {out}"
    run("main_tokenbridge", f"{train} {flags} --epochs 1")
    content = checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")
    assert {key: content["config"][key] for key in expected} == expected
    if "calibrate" in flags:
        cache = CachedFolder(cached, mirror=False)
        mean, logvar = torch.stack([moments for moments, _ in cache]).chunk(2, dim=1)
        assert content["config"]["channel_mean"] == pytest.approx((0.5 * mean.mean(dim=(0, 2, 3))).tolist(), abs=0.15)
        deviation = 0.5 * (mean.var(dim=(0, 2, 3)) + logvar.exp().mean(dim=(0, 2, 3))).sqrt()
        assert content["config"]["channel_std"] == pytest.approx(deviation.tolist(), rel=0.2)
    # What the checkpoint tells need not be typed again; sizes of tokens must.
    patch = "--patch_size 2" if name == "patches" else ""
    run("main_tokenbridge", f"{train} {patch} --epochs 2 --resume {tmp_path}/run")
    assert checkpoint.read(tmp_path / "run" / "checkpoint-last.pth")["epoch"] == 1
    run(
        "main_tokenbridge",
        f"{TINY} {patch} --evaluate --resume {tmp_path}/run {out} --vae_path {vae_path} --num_images 4 --num_iter 3 "
        "--cfg 2 --no_metrics --order confidence --confidence_noise 1 --save_confidence",
    )
    for folder in ("samples", "samples-confidence"):
        assert len(list((tmp_path / "run" / folder).glob("*.png"))) == 4
        with Image.open(tmp_path / "run" / f"{folder}.png") as picture:
            assert min(picture.size) > 60
    settings = json.loads((tmp_path / "run" / "samples.json").read_text())["settings"]
    assert settings["order"] == "confidence" and settings["confidence_noise"] == 1


def test_another_variant_than_the_checkpoints_is_refused(run, refused, cached, trained, tmp_path):
    resume = f"{TINY} {SHORT} --epochs 3 --use_cached --cached_path {cached} --output_dir {tmp_path}/x"
    for flags, sides in {
        "--head parallel": "head is ar there, parallel here (--head)",
        "--channel_order 7,6,5,4,3,2,1,0": "channel_order is [0, 1, 2, 3, 4, 5, 6, 7] there, [7, 6, 5, 4, 3, 2, 1, 0]",
        "--channels_per_group 2": "channels_per_group is 1 there, 2 here",
        "--quantizer linear": "quantizer is gaussian there, linear here",
        "--head_dim 64": "channel_embed_dim is 128 there, 64 here (--head_dim",
        "--quant_calibrate": "without calibration there, with --quant_calibrate here",
    }.items():
        assert sides in refused("main_tokenbridge", f"{resume} --resume {trained} {flags}")
    run("main_tokenbridge", f"{TINY} {SHORT} --epochs 1 --use_cached --cached_path {cached} --channels_per_group 4 "
        f"--output_dir {tmp_path}/fours")  # fmt: skip
    fours = resume.replace("--quant_bits 3", "--quant_bits 6") + f" --resume {tmp_path}/fours"
    assert "quant_levels is 8 there, 64 here (--quant_bits)" in refused("main_tokenbridge", fours)
    for flags, message in {
        "--seed -1": "--seed -1",
        "--num_workers -1": "--num_workers -1",
        "--channels_per_group 3": "groups of 3 do not divide",
        "--channels_per_group 8 --quant_bits 6": "joint classes",
        "--head_heads 7": "not a multiple",
        "--head_dim 0": "above zero",
    }.items():
        assert message in refused("main_tokenbridge", f"{resume} {flags}")


def test_a_published_checkpoint_is_what_it_is(small_model):
    parallel = TokenBridge(**SMALL, head="parallel")
    with pytest.raises(UserError, match="head is ar there, parallel here"):
        check_config({}, {**parallel.config, "latent_factor": 0.2325}, "published.pth")
    with pytest.raises(UserError, match="channel_order is"):
        check_config(
            {}, {**TokenBridge(**SMALL, channel_order=range(16)).config, "latent_factor": 0.2325}, "published.pth"
        )
    check_config({}, {**small_model.config, "latent_factor": 0.2325}, "published.pth")


def test_reconstruction_with_other_quantizers(run, refused, images, vae_path, tmp_path):
    common = f"--img_size 16 --num_workers 0 --vae_path {vae_path} --image_dir {images} --no_metrics"
    errors = {}
    for flags in ("", "--quantizer linear", "--quant_calibrate"):
        run("reconstruction", f"{common} --output_dir {tmp_path}/out {flags}")
    for path in (tmp_path / "out").glob("*/results.json"):
        errors[path.parent.name] = json.loads(path.read_text())["latent_mse"]
    assert set(errors) == {"quant_b6_r5.0_n50", "linear_b6_r5.0_n50", "quant_b6_calibrated_n50"}
    # The small tokenizer's channels deviate little: levels that know it lie closer.
    assert errors["quant_b6_calibrated_n50"] < errors["quant_b6_r5.0_n50"]
    assert "--sweep is Table 1" in refused("reconstruction", f"{common} --sweep --quantizer linear")


# --------------------------------------------------------------------------------------------------------------------
# Figures.


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_figures_are_commands(run, refused, cached, trained, vae_path, tmp_path):
    train = f"{TINY} {SHORT} --use_cached --cached_path {cached} --epochs 1 --head parallel"
    run("main_tokenbridge", f"{train} --output_dir {tmp_path}/parallel")
    common = f"--vae_path {vae_path} --num_iter 2 --resume {trained}"
    run("tools.figures", f"samples {common} --classes class2 1 --per_class 3 --output {tmp_path}/samples.png")
    run("tools.figures", f"parallel {common} --resume_parallel {tmp_path}/parallel --output {tmp_path}/parallel.png")
    run("tools.figures", f"confidence {common} --output {tmp_path}/confidence.png")
    for flags in ("", "--quant_calibrate", "--quantizer linear --quant_bits 3"):
        run("tools.figures", f"levels --cached_path {cached} --num_workers 0 --output {tmp_path}/levels.png {flags}")
        assert pixels(tmp_path / "levels.png").shape[0] > 300
    # Cells of 128 pixels with 2 between them, 16 above for titles: 2 classes by 3, 4 classes by 2, 4 classes by 3.
    sizes = {"samples": (2, 3), "parallel": (4, 2), "confidence": (4, 3)}
    for name, (columns, rows) in sizes.items():
        assert pixels(tmp_path / f"{name}.png").shape == (16 + 2 + 130 * rows, 2 + 130 * columns, 3)
    for bad, message in {
        f"samples {common} --classes klass2": "did you mean class2",
        f"samples {common} --classes 9": "there are 4",
        f"samples --vae_path {vae_path}": "--resume is missing",
        f"parallel {common} --resume_parallel {trained}": "--resume_parallel needs a model of --head parallel",
        f"samples {common} --output x.jpg": ".png",
        "levels": "--cached_path is missing",
        f"samples {common} --temperature -1": "--temperature -1",
        f"samples {common} --gen_seed -1": "--gen_seed -1",
    }.items():
        assert message in refused("tools.figures", bad)


def test_imagenet_classes_have_names():
    from tools import figures

    names = figures.readable([str(label) for label in range(1000)])
    assert figures.find_classes(["golden retriever", "980", "Tench"], names) == [207, 980, 0]
    assert figures.readable(["n01440764", "mine"]) == ["tench, Tinca tinca", "mine"]
    assert figures.find_classes(None, names[:3]) == [0, 1, 2]
