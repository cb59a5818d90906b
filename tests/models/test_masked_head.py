"""The masked head: loss, likelihood, and sampling against plain loops; what it knows and what it does not."""

import math
from itertools import pairwise, permutations, product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from evaluation import held_out_likelihood
from models.masked_head import HEAD_ORDERS, MaskedHead
from models.sampling import SamplingOptions
from models.tokenbridge import MODELS, SIZES, TokenBridge, sizes_of
from models.tokenizer import CachedMoments
from tests.conftest import FEW, NO_DROPOUT, SMALL, batch, variant


def masked(**options) -> TokenBridge:
    return variant(head="masked", **options)


def every_token(head: MaskedHead) -> torch.Tensor:
    """All tokens of few channels and levels, ``[K^C, C]``."""
    return torch.cartesian_prod(*[torch.arange(head.levels)] * head.channels)


def plain_logits(head: MaskedHead, feature: torch.Tensor, known: dict[int, int]) -> torch.Tensor:
    """Logits ``[S, K]`` of one token, written out; ``known`` are classes by their step."""
    size = head.classes + 1
    rows = [
        head.token_embeddings.weight[step * size + known.get(step, size - 1)]
        for step in range(head.channel_steps)
    ]
    condition = head.condition_proj(feature)
    x = condition + sum(rows) / math.sqrt(head.channel_steps)
    for block in head.masked_blocks:
        shift, scale, gate = block.adaLN_modulation(condition).chunk(3)
        x = x + gate * block.mlp(block.norm(x) * (1 + scale) + shift)
    scale, shift = head.masked_final.adaLN_modulation(condition).chunk(2)
    x = F.layer_norm(x, x.shape, eps=1e-6) * (1 + scale) + shift
    return head.channel_heads(x).view(head.channel_steps, head.classes)


# --------------------------------------------------------------------------------------------------------------------
# What it computes.


@torch.no_grad()
def test_unknown_channels_depend_on_known_ones_alone():
    head = masked().head
    conditions = head.conditions(torch.randn(3, 32))
    targets, uniform = torch.randint(16, (3, 16)), torch.rand(3, 17)
    seen = head.given(targets, uniform)[:, 1]
    logits = head.logits(conditions, seen)
    assert logits.shape == (3, 16, 16)
    for row, (step, channel) in product(range(3), enumerate(head.generation_order)):
        changed = targets.clone()
        changed[row, channel] = (changed[row, channel] + 1) % 16
        differs = (head.logits(conditions, head.given(changed, uniform)[:, 1]) - logits).abs().amax(
            dim=2
        ) > 1e-6
        assert differs[row].all() == differs[row].any() == (seen[row, step] < 16)
        assert differs.any(dim=1).sum() <= 1
    assert 0 < (seen < 16).float().mean() < 1


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 2])
def test_the_loss_is_a_plain_loops(group):
    head = masked(channels_per_group=group, quant_levels=4).head
    features, targets, steps = torch.randn(7, 32), torch.randint(4, (7, 16)), 16 // group
    uniform = torch.rand(7, steps + 1)
    uniform[0, steps], uniform[1, steps] = 0.0, 1 - 2**-24  # none known, and all but one
    losses, counts = [], []
    for feature, target, numbers in zip(features, targets, uniform, strict=True):
        levels = target[head.generation_order].view(steps, group).tolist()
        classes = [
            sum(level * 4 ** (group - 1 - i) for i, level in enumerate(each)) for each in levels
        ]
        count = int(numbers[steps] * steps)
        known = {int(step): classes[step] for step in numbers[:steps].argsort()[:count]}
        log_probs = plain_logits(head, feature, known).log_softmax(dim=-1)
        unknown = [step for step in range(steps) if step not in known]
        losses.append(-sum(log_probs[step, classes[step]] for step in unknown) / len(unknown))
        counts.append(len(unknown))
    assert counts[:2] == [steps, 1]
    assert torch.allclose(
        head.loss(features, targets, uniform), torch.stack(losses).mean(), atol=1e-5
    )


def test_sets_of_known_channels_are_uniform_in_size_and_then_in_kind():
    head = masked(**FEW).head
    classes, seen = head.given(torch.randint(3, (60_000, 4))).unbind(dim=1)
    known = seen < 3
    assert torch.equal(seen[known], classes[known]) and (seen[~known] == 3).all()
    shares = torch.bincount((known * torch.tensor([8, 4, 2, 1])).sum(dim=1), minlength=16) / len(
        known
    )
    expected = [
        0.25 / math.comb(4, sum(kind)) if sum(kind) < 4 else 0.0
        for kind in product((0, 1), repeat=4)
    ]
    assert torch.allclose(shares, torch.tensor(expected), atol=5e-3)


def test_the_loss_leaks_nothing_of_what_is_unknown():
    head = masked(**NO_DROPOUT).head
    features, targets = torch.randn(9, 32), torch.randint(16, (9, 16))
    head.summed_loss(
        features, head.given(targets, torch.zeros(9, 17))
    ).backward()  # nothing is known
    rows = head.token_embeddings.weight.grad.view(16, 17, 32)
    assert not rows[:, :16].any() and rows[:, 16].any(dim=1).all()


def test_every_block_starts_as_the_identity_and_every_parameter_learns():
    torch.manual_seed(1)
    model = TokenBridge(**SMALL, head="masked").train()
    modulations = {name: p for name, p in model.head.named_parameters() if "adaLN" in name}
    assert len(modulations) == 6 and not any(p.any() for p in modulations.values())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):  # gates open first
        optimizer.zero_grad()
        model(torch.randn(8, 16, 4, 4), torch.randint(4, (8,))).backward()
        optimizer.step()
    assert not [
        name for name, p in model.head.named_parameters() if p.grad is None or not p.grad.any()
    ]


def test_checkpointed_blocks_give_the_same_gradients_dropout_included():
    grads = []
    for checkpointing in (False, ["head"]):
        model = masked(grad_checkpointing=checkpointing).train()
        torch.manual_seed(3)
        model(torch.linspace(-2, 2, 1024).view(4, 16, 4, 4), torch.arange(4)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, atol=1e-5)


def test_sizes_and_operations():
    for name, smallest, largest in (
        ("base", 0.85, 1),
        ("large", 0.85, 1),
        ("huge", 0.85, 1),
        ("tiny", 1.5, 1.6),
    ):
        with torch.device("meta"):
            models = [
                MODELS[f"tokenbridge_{name}"](quant_levels=64, head=head)
                for head in ("masked", "ar")
            ]
        heads = [sum(p.numel() for p in model.head.parameters()) for model in models]
        assert smallest <= heads[0] / heads[1] <= largest, name
        assert models[0].head.depth == sizes_of(f"tokenbridge_{name}", "masked")["channel_depth"]
    assert models[1].head.depth == SIZES["tokenbridge_tiny"]["channel_depth"]
    model = masked()
    given = batch(model, 2)
    with FlopCounterMode(display=False) as counter:
        model(*given)
    assert 3 * counter.get_total_flops() / 2 == pytest.approx(
        model.training_flops(num_masked=13), rel=0.01
    )


# --------------------------------------------------------------------------------------------------------------------
# Likelihood.


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 2])
def test_the_likelihood_in_any_order_sums_to_one_and_is_the_chains_product(group):
    head = masked(**FEW, channels_per_group=group).head
    tokens, feature = every_token(head), torch.randn(1, 32)
    classes, found = head.given(tokens)[:, 0], []
    for order in permutations(range(4 // group)):
        found.append(head.log_likelihood(feature.expand(81, -1), tokens, order))
        assert found[-1].exp().sum().item() == pytest.approx(1, abs=1e-5)
        for row in (0, 40, 77):
            known, expected = {}, 0.0
            for step in order:
                expected += (
                    plain_logits(head, feature[0], known)
                    .log_softmax(dim=-1)[step, classes[row, step]]
                    .item()
                )
                known[step] = classes[row, step].item()
            assert found[-1][row].item() == pytest.approx(expected, abs=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert torch.equal(found[0], head.log_likelihood(feature.expand(81, -1), tokens))


@torch.no_grad()
def test_the_loss_is_an_unbiased_estimate_of_the_mean_over_orders():
    head = masked(**FEW).head
    feature, token = torch.randn(1, 32), torch.tensor([[2, 0, 1, 1]])
    exact = torch.stack(
        [head.log_likelihood(feature, token, order) for order in permutations(range(4))]
    ).mean()
    drawn = head.loss(feature.expand(40_000, -1), token.expand(40_000, -1))
    assert drawn.item() == pytest.approx(-exact.item() / 4, rel=0.02)


def test_held_out_likelihood_follows_the_images_own_draws():
    model = masked()
    moments = torch.cat([torch.randn(6, 16, 4, 4), torch.zeros(6, 16, 4, 4)], dim=1)
    values = []
    for size in (1, 4, 6):
        torch.manual_seed(size)
        loader = list(zip(moments.split(size), (torch.arange(6) % 4).split(size), strict=True))
        values.append(
            held_out_likelihood(model, CachedMoments(1.0), loader, torch.device("cpu"), "fp32")[
                "nats_per_dim"
            ]
        )
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-5)
    torch.nn.init.zeros_(model.head.channel_heads.weight)
    torch.nn.init.zeros_(model.head.channel_heads.bias)
    figures = held_out_likelihood(model, CachedMoments(1.0), loader, torch.device("cpu"), "fp32")
    assert figures["bits_per_dim"] == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize("group", [1, 2])
def test_held_out_likelihood_in_one_order_is_that_in_all_if_channels_ignore_each_other(group):
    model = masked(quant_levels=4, channels_per_group=group)
    moments = torch.cat([torch.randn(12, 16, 4, 4), torch.full((12, 16, 4, 4), -30.0)], dim=1)
    loader = [(moments, torch.arange(12) % 4)]

    def nats(**options: str) -> float:
        """Over masks and known channels of ten seeds."""
        how = model, CachedMoments(1.0), loader, torch.device("cpu"), "fp32"
        return (
            sum(held_out_likelihood(*how, seed, options)["nats_per_dim"] for seed in range(10)) / 10
        )

    assert abs(nats(head_order="frequency") - nats()) > 0.04
    torch.nn.init.zeros_(model.head.token_embeddings.weight)
    assert nats(head_order="frequency") == pytest.approx(nats(), abs=0.02)


def test_held_out_likelihood_of_one_step_is_exact():
    model = masked(quant_levels=2, channels_per_group=8, vae_embed_dim=8)
    loader = [
        (torch.cat([torch.randn(5, 8, 4, 4), torch.zeros(5, 8, 4, 4)], dim=1), torch.arange(5) % 4)
    ]
    how = model, CachedMoments(1.0), loader, torch.device("cpu"), "fp32"
    one, every = (
        held_out_likelihood(*how, head_options=options)["nats_per_dim"]
        for options in ({"head_order": "frequency"}, {})
    )
    assert one == pytest.approx(every, rel=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Sampling.


def chain(head: MaskedHead, feature: torch.Tensor, sets: list[tuple[int, ...]]) -> torch.Tensor:
    """Probabilities of :func:`every_token` where ``sets`` of channel steps are drawn one after the other."""
    classes = head.given(every_token(head))[:, 0]
    conditions, seen, log_probs = (
        head.conditions(feature),
        torch.full_like(classes, head.classes),
        0.0,
    )
    for wanted in map(list, sets):
        logits = head.logits(conditions, seen).log_softmax(dim=-1)
        log_probs = log_probs + logits.gather(-1, classes[..., None])[:, wanted, 0].sum(dim=1)
        seen = seen.clone()
        seen[:, wanted] = classes[:, wanted]
    return log_probs.exp()


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["random", "frequency"])
def test_tokens_are_drawn_from_the_product_of_their_steps(steps, order):
    head = masked(**FEW).head
    feature, count = torch.randn(1, 32), 60_000
    levels, log_probs = head.sample(
        feature.expand(count, -1), 1.0, torch.rand(count, 8), head_steps=steps, head_order=order
    )
    rank = (levels * torch.tensor([27, 9, 3, 1])).sum(dim=1)
    bounds = [4 * i // steps for i in range(steps + 1)]
    orders = list(permutations(range(4))) if order == "random" else [(0, 1, 2, 3)]
    sets = [[each[a:b] for a, b in pairwise(bounds)] for each in orders]
    expected = torch.stack([chain(head, feature, each) for each in sets])
    assert torch.allclose(
        torch.bincount(rank, minlength=81) / count, expected.mean(dim=0), atol=6e-3
    )
    # The joint log-probability is that in the token's own order.
    gaps = (expected[:, rank].log() - log_probs).abs().amin(dim=0)
    assert gaps.max() < 1e-4
    if steps == 1:
        assert torch.allclose(expected, expected[:1].expand_as(expected), atol=1e-6)


@torch.no_grad()
def test_one_step_draws_all_channels_independently():
    head = masked(**FEW).head
    feature = torch.randn(1, 32)
    alone = head.logits(head.conditions(feature), torch.full((1, 4), 3))[0].softmax(dim=-1)
    tokens = every_token(head)
    product_of_all = torch.stack([alone[step, tokens[:, step]] for step in range(4)]).prod(dim=0)
    assert torch.allclose(chain(head, feature, [(0, 1, 2, 3)]), product_of_all, atol=1e-6)


@torch.no_grad()
def test_by_confidence_the_surest_channels_come_first():
    head = masked(**FEW).head
    features = torch.randn(6, 32)
    levels, log_probs = head.sample(
        features, 0.0, torch.rand(6, 8), head_steps=4, head_order="confidence"
    )
    orders = set()
    for feature, token, total in zip(features, levels, log_probs, strict=True):
        known, expected = {}, 0.0
        while len(known) < 4:
            probs = plain_logits(head, feature, known).log_softmax(dim=-1)
            step = max(set(range(4)) - set(known), key=lambda each: probs[each].max().item())
            known[step] = int(probs[step].argmax())
            expected += probs[step].max().item()
        orders.add(tuple(known))
        assert [known[step] for step in range(4)] == token.tolist()
        assert total.item() == pytest.approx(expected, abs=1e-4)
    assert len(orders) > 1


@pytest.mark.parametrize("head_order", HEAD_ORDERS)
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_images_follow_their_seeds_alone(order, head_order):
    model = masked(channels_per_group=2, quant_levels=4)
    labels, seeds = torch.tensor([0, 1, 2, 3]), [5, 6, 7, 8]
    known, mask = (
        torch.randn(4, 16, 4, 4),
        torch.rand(4, 16) < torch.tensor([0, 0.2, 0.5, 0.9])[:, None],
    )
    options = {
        "num_iter": 3,
        "cfg": 2.0,
        "temperature": 0.9,
        "order": order,
        "head_order": head_order,
        "head_steps": 3,
    }

    def images(rows: list[int]) -> torch.Tensor:
        given = {
            "known_latents": known[rows],
            "known_mask": mask[rows],
            "seeds": [seeds[row] for row in rows],
        }
        return model.sample_tokens(len(rows), labels=labels[rows], **given, **options)

    torch.manual_seed(1)
    together = images([0, 1, 2, 3])
    torch.manual_seed(2)
    assert torch.allclose(together, torch.cat([images([row]) for row in range(4)]), atol=1e-5)
    other = model.sample_tokens(4, labels=labels, seeds=seeds, **{**options, "head_steps": 8})
    assert not torch.allclose(together, other, atol=1e-2)


def test_four_steps_in_random_order_are_the_default():
    options = {"bsz": 2, "num_iter": 2, "seeds": [1, 2]}
    for model, steps in ((masked(), 4), (masked(channels_per_group=8, quant_levels=2), 2)):
        plain = model.sample_tokens(**options)
        assert torch.equal(
            plain, model.sample_tokens(**options, head_steps=steps, head_order="random")
        )
        assert not torch.equal(plain, model.sample_tokens(**options, head_steps=1))


def test_options_that_do_not_fit_are_named():
    for options in ({"head_steps": 2}, {"head_order": "random"}):
        with pytest.raises(
            ValueError, match=f"--{next(iter(options))} only applies to --head masked"
        ):
            variant(head="parallel").sample_tokens(1, 1, **options)
    for steps in (0, 9):
        with pytest.raises(ValueError, match=f"head_steps {steps}: choose 1 to 8"):
            masked(channels_per_group=2, quant_levels=4).sample_tokens(1, 1, head_steps=steps)
    with pytest.raises(ValueError, match="head_order is one of"):
        SamplingOptions(head_order="spiral")
    assert not hasattr(
        masked(channel_heads=5).head, "channel_blocks"
    )  # it has no attention whose heads must fit
