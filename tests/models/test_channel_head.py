"""The channel head: order and groups of channels, likelihood, and sampling against teacher forcing."""

import pytest
import torch
import torch.nn.functional as F

from models import channel_head
from models.channel_head import MAX_CLASSES
from models.tokenbridge import TokenBridge
from tests.conftest import FEW, HEADS, SMALL, filled, small, variant

# --------------------------------------------------------------------------------------------------------------------
# Teacher forcing.


@torch.no_grad()
def test_each_step_sees_only_the_channels_before_it(small_model):
    features, targets = torch.randn(5, 32), torch.randint(16, (5, 16))
    logits = small_model.head(features, targets)
    for step in (0, 3, 15):
        changed = targets.clone()
        changed[:, step] = (changed[:, step] + 1) % 16
        same = (small_model.head(features, changed) - logits).abs().amax(dim=(0, 2)) < 1e-6
        assert same[: step + 1].all() and not same[step + 1 :].any()


@torch.no_grad()
def test_the_joint_distribution_sums_to_one():
    model = filled(TokenBridge(**{**SMALL, "vae_embed_dim": 3, "quant_levels": 5}))
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)
    logp = F.log_softmax(model.head(torch.randn(1, 32).expand(125, -1), every), dim=-1)
    assert logp.gather(-1, every[..., None]).sum(dim=(1, 2)).exp().sum().item() == pytest.approx(
        1, abs=1e-5
    )


@torch.no_grad()
def test_a_parallel_head_does_not_look_at_the_targets():
    model = variant(head="parallel")
    features, mask = torch.randn(2, 16, 32), torch.ones(2, 16)
    a, b = (
        model.forward_channel_ar(features, torch.randint(16, (2, 16, 16)), mask) for _ in range(2)
    )
    assert torch.equal(a, b) and a.shape == (32, 16, 16)
    assert not any(
        "token_embeddings" in name or "channel_mask" in name for name in model.state_dict()
    )
    # Steps differ, and sampling is of these logits.
    assert not torch.allclose(a[:, 0], a[:, 1], atol=1e-2)
    levels, _ = model.head.sample(features.flatten(0, 1), 0.0, torch.rand(32, 16))
    assert torch.equal(levels[:, model.head.generation_order], a.argmax(-1))


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
    log_probs = (
        F.log_softmax(logits, dim=-1)
        .gather(-1, model.head.to_classes(every)[..., None])
        .sum(dim=(1, 2))
    )
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    # What sampling reports is the same number.
    uniform = torch.rand(200, model.head.channel_steps)
    levels, sampled = model.head.sample(features[:1, 0].expand(200, -1), 1.0, uniform)
    rank = (levels[:, model.head.generation_order] * torch.tensor([27, 9, 3, 1])).sum(-1)
    assert torch.allclose(sampled, log_probs[rank], atol=1e-4)


@torch.no_grad()
def test_a_grouped_step_sees_only_the_groups_before_it():
    model = variant(channels_per_group=2, quant_levels=4)
    features, mask = torch.randn(1, 16, 32), torch.zeros(1, 16)
    mask[0, 0] = 1
    targets = torch.randint(4, (1, 16, 16))
    logits = model.forward_channel_ar(features, targets, mask)
    for channel in (0, 5, 15):
        changed = targets.clone()
        changed[..., channel] = (changed[..., channel] + 1) % 4
        same = (model.forward_channel_ar(features, changed, mask) - logits).abs().amax(
            dim=(0, 2)
        ) < 1e-6
        step = channel // 2
        assert same[: step + 1].all() and not same[step + 1 :].any()


def test_levels_and_classes_are_one_to_one():
    head = variant(channels_per_group=4, quant_levels=5, vae_embed_dim=8).head
    levels = torch.randint(5, (300, 8))
    classes = head.to_classes(levels)
    assert classes.shape == (300, 2) and classes.max() < 5**4
    assert torch.equal(head.to_levels(classes), levels)
    assert head.to_classes(torch.tensor([0, 0, 0, 1, 1, 0, 0, 0])).tolist() == [1, 125]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels_per_group": 3}, "groups of 3 do not divide the 16 channels"),
        (
            {"channels_per_group": 4, "quant_levels": 64},
            r"16,777,216 joint classes.*2,147,483,648 parameters.*8 GiB",
        ),
        ({"channel_order": [0] * 16}, "each of 0 to 15 once"),
        ({"channel_order": ["a"] * 16}, "each of 0 to 15 once"),
        ({"head": "diffusion"}, "head is one of ar, parallel, masked"),
        ({"quantizer": "vq"}, "quantizer is one of"),
        ({"channel_mean": [0.0] * 16}, "mean and a standard deviation"),
        (
            {"channel_mean": [0.0] * 3, "channel_std": [1.0] * 3},
            "3 values of channel_mean for 16 channels",
        ),
        ({"channel_mean": [0.0] * 16, "channel_std": [0.0] * 16}, "above zero"),
        ({"channel_embed_dim": 30, "channel_heads": 4}, "30 is not a multiple of its 4"),
    ],
)
def test_variants_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TokenBridge(**{**SMALL, **options})
    assert MAX_CLASSES >= 16**4  # Table 2d


# --------------------------------------------------------------------------------------------------------------------
# Sampling.


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 2, 16])
def test_cached_steps_equal_teacher_forcing(channels, monkeypatch):
    head = filled(TokenBridge(**{**SMALL, "vae_embed_dim": channels})).head
    features, uniform, seen = torch.randn(7, 32), torch.rand(7, channels), []
    choose = channel_head.sample_categorical

    def listen(logits, *how):
        seen.append(logits)
        return choose(logits, *how)

    monkeypatch.setattr(channel_head, "sample_categorical", listen)
    levels = head.sample(features, 1.0, uniform)[0][:, head.generation_order]
    assert torch.allclose(torch.stack(seen, dim=1), head(features, levels), atol=1e-4)
    seen.clear()
    head.sample(features, 1.0, uniform, first_place="released")
    forced = head(features, levels)
    assert not torch.allclose(seen[0], forced[:, 0], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("head", [head for head in HEADS if head != "masked"])
def test_sampled_confidences_are_teacher_forcings(head):
    model = small(head)
    features = torch.randn(20, 32)
    levels, confidence = model.head.sample(features, 1.0, torch.rand(20, model.head.channel_steps))
    chosen = model.head.to_classes(levels[:, model.head.generation_order])
    forced = (
        F.log_softmax(model.head(features, chosen), dim=-1)
        .gather(-1, chosen[..., None])
        .sum(dim=(1, 2))
    )
    assert torch.allclose(forced, confidence, atol=1e-4 * model.head.channel_steps)
    # Given levels in the latents' own order, the loss is the mean of these.
    assert torch.allclose(
        model.head.loss(features, levels), -confidence.mean() / model.head.channel_steps, atol=1e-4
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_levels_are_drawn_from_the_tempered_softmax(temperature):
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, -50.0])
    levels = channel_head.sample_categorical(
        logits.expand(200_000, -1), temperature, torch.rand(200_000)
    )
    share = torch.bincount(levels, minlength=5) / len(levels)
    assert torch.allclose(share, (logits / temperature).softmax(0), atol=5e-3)


def test_the_ends_of_the_uniform_are_levels():
    logits = torch.randn(100, 64)
    for u in (0.0, 1 - 2**-24):
        levels = channel_head.sample_categorical(logits, 1.0, torch.full((100,), u))
        assert levels.min() >= 0 and levels.max() < 64
    assert torch.equal(
        channel_head.sample_categorical(logits, 0, torch.rand(100)), logits.argmax(-1)
    )
    never_first = torch.tensor([[-torch.inf, 0.0]])
    assert channel_head.sample_categorical(never_first, 1.0, torch.zeros(1)).item() == 1
