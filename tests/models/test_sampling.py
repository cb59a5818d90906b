"""Generation against the published sampler's results, plain loops, and as properties."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import sampling
from models.sampling import SamplingOptions
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
def plain_sampler(model, labels, orders, num_iter, cfg, interval=(0, 1), reuse=1):
    """Greedy sampling with the public training methods only: one pass a half, one head pass a channel."""
    bsz, seq_len = orders.shape
    tokens, mask = torch.zeros(bsz, seq_len, model.token_dim), torch.ones(bsz, seq_len)
    order = model.head.generation_order
    left, guided_steps = seq_len, 0
    for step in range(num_iter):
        left_after = max(
            1, min(left - 1, math.floor(seq_len * math.cos(math.pi / 2 * (step + 1) / num_iter)))
        )
        guidance = 1 + (cfg - 1) * (seq_len - left_after) / seq_len
        left_after = 0 if step == num_iter - 1 else left_after
        if not interval[0] <= (seq_len - left) / seq_len < interval[1]:
            guidance = 1
        halves = []
        for classes in (model.class_emb(labels), model.backbone.fake_latent.expand(bsz, -1)):
            halves.append(
                model.forward_mae_decoder(model.forward_mae_encoder(tokens, mask, classes), mask)
            )
        if guidance != 1:
            if guided_steps % reuse == 0:
                difference = halves[0] - halves[1]
            guided_steps += 1
        z = halves[0] if guidance == 1 else halves[0] + (guidance - 1) * difference
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


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8), (0.5, 1.0)])
@pytest.mark.parametrize("reuse", [1, 2, 3])
def test_guidance_in_some_steps_equals_a_plain_loop(small_model, monkeypatch, interval, reuse):
    labels, orders = torch.tensor([3, 1, 0]), small_model.sample_orders(3)
    passes = []
    forward = type(small_model.backbone).forward
    monkeypatch.setattr(
        type(small_model.backbone),
        "forward",
        lambda self, tokens, *rest: passes.append(len(tokens)) or forward(self, tokens, *rest),
    )
    sampled = small_model.sample_tokens(
        3, 8, 2.5, "linear", labels, temperature=0, orders=orders,
        cfg_interval=interval, cfg_reuse=reuse,
    )  # fmt: skip
    count = {length: passes.count(length) for length in passes}
    monkeypatch.undo()
    expected = plain_sampler(small_model, labels, orders, 8, 2.5, interval, reuse)
    assert torch.allclose(sampled, expected, atol=1e-5)
    plan = sampling.sampling_plan(SamplingOptions(8, 2.5, cfg_interval=interval), 16)
    guided = sum(step.guidance != 1 for step in plan)
    assert count[6] == -(-guided // reuse) and sum(count.values()) == len(plan)


def test_operations_follow_the_plan(small_model):
    def flops(**options) -> float:
        return small_model.sampling_flops(SamplingOptions(16, **options))

    head = 16 * small_model.head.sampling_flops()
    plain = flops() - head
    assert flops(cfg=3.0) - head == 2 * plain
    assert plain < flops(cfg=3.0, cfg_reuse=4) - head < 1.4 * plain
    assert flops(cfg=3.0, cfg_interval=(0.0, 1e-6)) - head < 1.1 * plain  # the first step only
    assert flops(order="confidence") - plain > 5 * head


@pytest.mark.parametrize("order", ["halton", "two-stage"])
def test_orders_that_spread_tokens(small_model, order):
    options = {"step_schedule": order} if order == "two-stage" else {"order": order}
    draws = sampling.ImageDraws(20, torch.device("cpu"), range(20))
    two_stage = order == "two-stage"
    orders = (sampling.checkerboard_order if two_stage else sampling.ORDERS[order])(draws, 64)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(64).expand(20, -1))
    assert len({tuple(row.tolist()) for row in orders}) > 10
    first = orders[:, 32:]  # tokens are taken from the end
    if order == "two-stage":
        colors = (first // 8 + first % 8) % 2
        assert (colors == colors[:, :1]).all()
    quarters = (first // 32) * 2 + (first % 8) // 4
    counts = torch.stack([(quarters == quarter).sum(1) for quarter in range(4)])
    assert (counts - 8).abs().max() <= 3
    sampled = small_model.sample_tokens(2, 8, labels=torch.tensor([0, 1]), seeds=[0, 1], **options)
    assert sampled.isfinite().all()


def test_the_two_stage_schedule():
    assert sampling.two_stage_schedule(8, 64) == [59, 54, 48, 43, 38, 32, 16, 1]
    assert sampling.two_stage_schedule(2, 16) == [8, 1]
    assert sampling.two_stage_schedule(1, 16) == sampling.two_stage_schedule(1, 1) == [1]
    assert sampling.two_stage_schedule(8, 3)[-1] == 1  # of an edit with three unknown tokens
    plan = sampling.sampling_plan(SamplingOptions(8, step_schedule="two-stage"), 64)
    assert plan[-1].left == 0 and [step.masked for step in plan[:2]] == [64, 59]


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_plan_takes_every_token_once(num_iter, seq_len):
    plan = sampling.sampling_plan(SamplingOptions(num_iter, 3.0, "linear"), seq_len)
    assert plan[0].masked == seq_len and plan[-1].left == 0
    assert all(a.left == b.masked for a, b in pairwise(plan))
    assert all(step.left < step.masked for step in plan) and len(plan) <= num_iter
    scales = [step.guidance for step in plan]
    assert scales == sorted(scales) and scales[-1] == pytest.approx(1 + 2 * (seq_len - 1) / seq_len)
    constant = sampling.sampling_plan(SamplingOptions(num_iter, 3.0, "constant"), seq_len)
    assert {step.guidance for step in constant} == {3.0}


def test_the_cosine_schedule():
    assert sampling.cosine_schedule(4, 16) == [14, 11, 6, 1]
    assert sampling.cosine_schedule(20, 4) == [3, 2, 1] + [1] * 17


def test_images_follow_their_seeds_alone(small_model):
    labels, seeds = torch.tensor([0, 1, 2, 3]), [5, 6, 7, 8]
    torch.manual_seed(1)
    together = small_model.sample_tokens(4, 5, 2.0, labels=labels, seeds=seeds)
    torch.manual_seed(2)
    alone = torch.cat(
        [
            small_model.sample_tokens(1, 5, 2.0, labels=labels[i : i + 1], seeds=seeds[i : i + 1])
            for i in range(4)
        ]
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
    assert not torch.allclose(
        small_model.sample_tokens(**common, labels=labels), unconditional, atol=1e-2
    )
    small_model.train()
    assert torch.equal(small_model.sample_tokens(**common), unconditional) and small_model.training


def test_the_head_in_parts_changes_nothing(small_model, monkeypatch):
    labels, seeds = torch.tensor([0, 1]), [1, 2]
    whole = small_model.sample_tokens(2, 3, 2.0, labels=labels, seeds=seeds)
    monkeypatch.setattr("models.fast.MODULATION_BUDGET", 20000)
    assert 20000 // small_model.head.elements_per_token() == 2
    assert torch.allclose(
        small_model.sample_tokens(2, 3, 2.0, labels=labels, seeds=seeds), whole, atol=1e-5
    )


def test_bad_arguments_are_named(small_model):
    for message, options in {
        "num_iter=0": {"num_iter": 0},
        "cfg_schedule is one of": {"cfg_schedule": "unknown"},
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


# --------------------------------------------------------------------------------------------------------------------
# Orders of tokens, and tokens that are given.


@torch.no_grad()
def plain_confidence(
    model: TokenBridge, labels: torch.Tensor, num_iter: int, cfg: float
) -> tuple[torch.Tensor, list]:
    """Order by confidence at temperature 0, one image after the other, without cache, gathers or sorting."""
    latents, order = [], []
    for label in labels:
        tokens, unknown, taken = torch.zeros(1, 16, 16), set(range(16)), []
        schedule = [*sampling.cosine_schedule(num_iter, 16)[:-1], 0]
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
            best = sorted(found, key=lambda position: found[position][0], reverse=True)[
                : len(unknown) - left
            ]
            for position in best:
                levels = found[position][1][0, model.head.from_generation_order]
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
    latents, confidence = small_model.sample_tokens(
        1, 1, temperature=0, seeds=[1], return_confidence=True
    )
    features = small_model.backbone(
        torch.zeros(1, 16, 16),
        torch.zeros(1, 0, dtype=torch.long),
        small_model.backbone.fake_latent,
    )
    levels = small_model.quantize(small_model.patchify(latents))[0][
        ..., small_model.head.generation_order
    ]
    logits = small_model.forward_channel_ar(features, levels, torch.ones(1, 16)).log_softmax(-1)
    assert torch.allclose(
        logits.gather(-1, levels[0][..., None]).sum(dim=(1, 2)), confidence[0], atol=1e-4
    )


def test_noise_makes_orders_by_confidence_differ(small_model):
    options = {
        "bsz": 3,
        "num_iter": 6,
        "order": "confidence",
        "temperature": 0,
        "return_confidence": True,
    }
    plain = small_model.sample_tokens(**options, seeds=[1, 2, 3])[1]
    assert torch.allclose(
        plain[:1].expand(3, -1), plain, atol=1e-5
    )  # at temperature 0 nothing is drawn
    noisy = small_model.sample_tokens(**options, seeds=[1, 2, 3], confidence_noise=50.0)[1]
    assert not torch.allclose(noisy[0], noisy[1], atol=1e-2)
    assert torch.equal(
        noisy, small_model.sample_tokens(**options, seeds=[1, 2, 3], confidence_noise=50.0)[1]
    )


def test_raster_order_goes_row_by_row(small_model):
    reversed_rows = torch.arange(15, -1, -1).expand(2, -1)
    options = {"bsz": 2, "num_iter": 16, "temperature": 0, "labels": torch.tensor([0, 1])}
    expected = small_model.sample_tokens(**options, orders=reversed_rows)
    assert torch.equal(small_model.sample_tokens(**options, order="raster"), expected)


@pytest.mark.parametrize("order", sampling.ORDERS.values())
def test_orders_have_every_position_once(order):
    orders = order(sampling.ImageDraws(3, torch.device("cpu"), range(3)), 16)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(3, -1))


def test_all_orders_and_schedules_differ(small_model):
    options = {"labels": torch.tensor([0, 1]), "seeds": [0, 1]}
    choices = [{"order": order} for order in sampling.ORDERS]
    choices += [{"step_schedule": name} for name in sampling.STEP_SCHEDULES if name != "cosine"]
    choices += [{"cfg_schedule": name, "cfg": 3.0} for name in sampling.SCHEDULES]
    sampled = [small_model.sample_tokens(2, 4, **options, **choice) for choice in choices]
    for one, other in combinations(sampled, 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("order", sampling.ORDERS)
def test_known_tokens_stay_a_different_number_in_each_image(small_model, order):
    known = torch.randn(4, 16, 4, 4)
    mask = torch.rand(4, 16).argsort(dim=1) < torch.tensor([0, 3, 9, 16])[:, None]
    options = {"num_iter": 4, "cfg": 2.0, "order": order}
    labels, seeds = torch.tensor([0, 1, 2, 3]), [4, 5, 6, 7]
    together, confidence = small_model.sample_tokens(
        4,
        **options,
        labels=labels,
        seeds=seeds,
        known_latents=known,
        known_mask=mask,
        return_confidence=True,
    )
    alone = [
        small_model.sample_tokens(
            1, **options, labels=labels[i : i + 1], seeds=seeds[i : i + 1],
            known_latents=known[i : i + 1], known_mask=mask[i : i + 1],
        )
        for i in range(4)
    ]  # fmt: skip
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    tokens, kept = (
        small_model.patchify(together),
        small_model.quantize(small_model.patchify(known))[1],
    )
    assert torch.allclose(tokens[mask], kept[mask], atol=1e-6)
    assert ((tokens - kept)[~mask].abs() > 1e-3).any(dim=-1).float().mean() > 0.9
    assert (confidence[mask] == 0).all() and (confidence[~mask] < 0).all()
    # Without known tokens nothing changes.
    plain = small_model.sample_tokens(1, **options, labels=labels[:1], seeds=seeds[:1])
    assert torch.allclose(plain, together[:1], atol=1e-4)


@pytest.mark.parametrize("order", sampling.ORDERS)
def test_each_step_is_told(small_model, order):
    steps = []
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3:6] = True
    options = {
        "seeds": [1, 2],
        "order": order,
        "known_latents": torch.randn(2, 16, 4, 4),
        "known_mask": mask,
    }
    latents = small_model.sample_tokens(2, 5, **options, on_step=lambda *step: steps.append(step))
    assert torch.equal(latents, small_model.sample_tokens(2, 5, **options))
    assert [step[:2] for step in steps] == [(number, 5) for number in range(1, 6)]
    final, left, known = small_model.patchify(latents), [], mask
    for _, _, tokens, unknown in steps:
        is_unknown = torch.zeros(2, 16, dtype=torch.bool).scatter(1, unknown, True)
        assert torch.equal(tokens, final.masked_fill(is_unknown[..., None], 0.0))
        assert not (known & is_unknown).any()
        known = ~is_unknown
        left.append(unknown.shape[1])
    assert left == [step.left for step in sampling.sampling_plan(SamplingOptions(5), 16, 13)]


def test_bad_orders_and_known_tokens_are_named(small_model):
    latents, mask = torch.zeros(2, 16, 4, 4), torch.zeros(2, 16)
    for message, options in {
        "order is one of": {"order": "unknown"},
        "first_place is one of": {"first_place": "last"},
        "do not pass orders": {"order": "confidence", "orders": small_model.sample_orders(2)},
        "'halton' chooses its own": {"order": "halton", "orders": small_model.sample_orders(2)},
        "'raster' chooses its own": {"order": "raster", "orders": small_model.sample_orders(2)},
        "confidence_noise only applies to": {"confidence_noise": 1.0},
        "0 <= LOW < HIGH <= 1": {"cfg_interval": (0.5, 0.5)},
        "cfg_interval is 0 to 1.5": {"cfg_interval": (0, 1.5)},
        "cfg_reuse is a number of steps": {"cfg_reuse": 0},
        "remove --order halton": {"step_schedule": "two-stage", "order": "halton"},
        "at most 16 steps, the number of tokens, not 20": {
            "step_schedule": "two-stage",
            "num_iter": 20,
        },
        "must not be negative": {"confidence_noise": -1.0},
        "go together": {"known_mask": mask},
        r"expected \[2, 16, 4, 4\] and \[2, 16\]": {
            "known_latents": latents[:1],
            "known_mask": mask,
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            small_model.sample_tokens(2, **options)


def test_noise_on_confidences_falls_to_nothing_over_the_steps():
    model = filled(TokenBridge(**{**SMALL, "vae_embed_dim": 4}))
    options = {"temperature": 0, "order": "confidence", "return_confidence": True}
    ((confidence,),) = [model.sample_tokens(1, 1, **options)[1]]
    # Of two steps the first takes 5 of 16 tokens; those of the second have seen them, and have other confidences.
    noisy = model.sample_tokens(200, 2, **options, confidence_noise=2.0)[1]
    first = (noisy - confidence).abs() < 1e-4
    assert (first.sum(dim=1) == 5).all()
    gumbel = -torch.log(-torch.log(torch.rand(20_000, 16)))

    def distance(scale: float) -> float:
        """How far shares of images that take a token first are from those that noise of this scale gives."""
        chosen = (confidence + scale * gumbel).topk(5).indices
        expected = torch.zeros(20_000, 16).scatter(1, chosen, 1.0).mean(dim=0)
        return (first.float().mean(dim=0) - expected).abs().mean().item()

    # Half of the noise at the first of two steps, as none is left at the second.
    assert distance(1.0) < 0.03 < min(distance(2.0), distance(0.0))
