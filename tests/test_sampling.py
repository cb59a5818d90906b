"""Generation against the published sampler's results, a plain loop, and as properties."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import sampling
from models.tokenbridge import TokenBridge
from tests.conftest import SMALL, filled, reference


@pytest.mark.parametrize("name", ["cfg1_linear", "cfg2_constant", "cfg3_linear"])
def test_the_releases_way_gives_the_published_latents(name):
    config, vectors = reference(f"sample_{name}")
    how = {key: config.pop(key) for key in ("cfg", "cfg_schedule", "num_iter", "temperature")}
    model = filled(TokenBridge(**config))
    given_orders = {"labels": vectors["labels"], "orders": vectors["orders"]}
    latents = model.sample_tokens(2, **given_orders, **how, first_place="released")
    assert torch.allclose(latents, vectors["latents"], atol=1e-5)
    assert not torch.allclose(model.sample_tokens(2, **given_orders, **how), latents, atol=1e-2)


@torch.no_grad()
def plain_sampler(model, labels, orders, num_iter, cfg):
    """Greedy sampling with the public training methods only: one pass a half, one head pass a channel."""
    bsz, seq_len = orders.shape
    tokens, mask = torch.zeros(bsz, seq_len, model.token_dim), torch.ones(bsz, seq_len)
    order = model.generation_order
    left = seq_len
    for step in range(num_iter):
        left_after = max(1, min(left - 1, math.floor(seq_len * math.cos(math.pi / 2 * (step + 1) / num_iter))))
        guidance = 1 + (cfg - 1) * (seq_len - left_after) / seq_len
        left_after = 0 if step == num_iter - 1 else left_after
        halves = []
        for classes in (model.class_emb(labels), model.backbone.fake_latent.expand(bsz, -1)):
            halves.append(model.forward_mae_decoder(model.forward_mae_encoder(tokens, mask, classes), mask))
        z = halves[1] + guidance * (halves[0] - halves[1])
        wanted = torch.zeros(bsz, seq_len).scatter(1, orders[:, left_after:left], 1.0)
        targets = torch.zeros(bsz, seq_len, model.token_dim, dtype=torch.long)
        for place in range(model.token_dim):
            logits = model.forward_channel_ar(z, targets, wanted)
            known = targets[..., place].masked_scatter(wanted.bool(), logits[:, place].argmax(-1))
            targets[..., place] = known
        new = model.quantizer.dequantize(targets[..., order.argsort()])
        tokens = torch.where(wanted.bool()[..., None], new, tokens)
        mask, left = mask - wanted, left_after
    return model.unpatchify(tokens)


def test_sampling_equals_a_plain_loop(small_model):
    labels, orders = torch.tensor([3, 1, 0]), small_model.sample_orders(3)
    sampled = small_model.sample_tokens(3, 6, 2.5, "linear", labels, temperature=0, orders=orders)
    assert torch.allclose(sampled, plain_sampler(small_model, labels, orders, 6, 2.5), atol=1e-5)


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_plan_takes_every_token_once(num_iter, seq_len):
    plan = sampling.sampling_plan(num_iter, seq_len, 3.0, "linear")
    assert plan[0].masked == seq_len and plan[-1].left == 0
    assert all(a.left == b.masked for a, b in pairwise(plan))
    assert all(step.left < step.masked for step in plan) and len(plan) <= num_iter
    scales = [step.guidance for step in plan]
    assert scales == sorted(scales) and scales[-1] == pytest.approx(1 + 2 * (seq_len - 1) / seq_len)
    assert {step.guidance for step in sampling.sampling_plan(num_iter, seq_len, 3.0, "constant")} == {3.0}


def test_the_cosine_schedule():
    assert sampling.mask_schedule(4, 16) == [14, 11, 6, 1]
    assert sampling.mask_schedule(20, 4) == [3, 2, 1] + [1] * 17


def test_images_follow_their_seeds_alone(small_model):
    labels, seeds = torch.tensor([0, 1, 2, 3]), [5, 6, 7, 8]
    torch.manual_seed(1)
    together = small_model.sample_tokens(4, 5, 2.0, labels=labels, seeds=seeds)
    torch.manual_seed(2)
    alone = torch.cat(
        [small_model.sample_tokens(1, 5, 2.0, labels=labels[i : i + 1], seeds=seeds[i : i + 1]) for i in range(4)]
    )
    assert torch.allclose(together, alone, atol=1e-5)
    other = small_model.sample_tokens(4, 5, 2.0, labels=labels, seeds=[9, 10, 11, 12])
    assert not torch.allclose(together, other, atol=1e-2)


def test_without_seeds_the_global_generator_decides(small_model):
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(small_model.sample_tokens(2, 4, labels=torch.tensor([0, 1])))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_guidance_labels_and_modes(small_model):
    orders, labels = small_model.sample_orders(2), torch.tensor([0, 1])
    common = {"bsz": 2, "num_iter": 4, "temperature": 0, "orders": orders}
    unconditional = small_model.sample_tokens(**common)
    assert torch.equal(small_model.sample_tokens(**common, cfg=4.0), unconditional)
    # At scale 0 only the unconditional half counts.
    zero = small_model.sample_tokens(**common, labels=labels, cfg=0.0, cfg_schedule="constant")
    assert torch.allclose(zero, unconditional, atol=1e-5)
    assert not torch.allclose(small_model.sample_tokens(**common, labels=labels), unconditional, atol=1e-2)
    small_model.train()
    assert torch.equal(small_model.sample_tokens(**common), unconditional) and small_model.training


def test_the_head_in_parts_changes_nothing(small_model, monkeypatch):
    labels, seeds = torch.tensor([0, 1]), [1, 2]
    whole = small_model.sample_tokens(2, 3, 2.0, labels=labels, seeds=seeds)
    monkeypatch.setattr("models.channel_head.MODULATION_BUDGET", 20000)
    assert small_model.head.rows_at_once() == 2
    assert torch.allclose(small_model.sample_tokens(2, 3, 2.0, labels=labels, seeds=seeds), whole, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_levels_are_drawn_from_the_tempered_softmax(temperature):
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, -50.0])
    levels = sampling.sample_categorical(logits.expand(200_000, -1), temperature, torch.rand(200_000))
    share = torch.bincount(levels, minlength=5) / len(levels)
    assert torch.allclose(share, (logits / temperature).softmax(0), atol=5e-3)


def test_the_ends_of_the_uniform_are_levels():
    logits = torch.randn(100, 64)
    for u in (0.0, 1 - 2**-24):
        levels = sampling.sample_categorical(logits, 1.0, torch.full((100,), u))
        assert levels.min() >= 0 and levels.max() < 64
    assert torch.equal(sampling.sample_categorical(logits, 0, torch.rand(100)), logits.argmax(-1))
    never_first = torch.tensor([[-torch.inf, 0.0]])
    assert sampling.sample_categorical(never_first, 1.0, torch.zeros(1)).item() == 1


def test_bad_arguments_are_named(small_model):
    for message, options in {
        "num_iter=0": {"num_iter": 0},
        "linear": {"cfg_schedule": "cosine"},
        "negative": {"temperature": -1.0},
        "labels run from 4 to 4": {"labels": torch.tensor([4, 4])},
        "3 labels for 2": {"labels": torch.tensor([1, 1, 1])},
        "1 seeds for 2": {"seeds": [1]},
    }.items():
        with pytest.raises(ValueError, match=message):
            small_model.sample_tokens(2, **options)


def test_patches_sample_too():
    model = filled(TokenBridge(**{**SMALL, "vae_stride": 8, "patch_size": 2, "vae_embed_dim": 4}))
    assert model.sample_tokens(2, 4, seeds=[1, 2]).shape == (2, 4, 8, 8)
