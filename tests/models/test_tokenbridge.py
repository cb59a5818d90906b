"""The model against the published one, against brute force, and as properties."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import truncnorm
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.flop_counter import FlopCounterMode

from models.published import from_published, to_published
from models.tokenbridge import KL16_CHANNEL_ORDER, MODELS, TokenBridge, tokenbridge_tiny
from tests.conftest import (
    FEW,
    HEADS,
    SMALL,
    batch,
    filled,
    manifest,
    published_parameters,
    published_state,
    reference,
    same,
    same_states,
    small,
    variant,
)
from util.training_state import add_weight_decay

# --------------------------------------------------------------------------------------------------------------------
# The published model.


@pytest.fixture(scope="module")
def published():
    config, vectors = reference("forward")
    return filled(TokenBridge(**config)), vectors


@torch.no_grad()
def test_tokens_features_logits_and_loss_are_the_published_models(published):
    model, v = published
    indices, dequantized = model.quantize(model.patchify(v["latents"]))
    assert torch.equal(indices, v["indices"])
    assert torch.allclose(dequantized, v["dequantized"], atol=1e-5)
    encoded = model.forward_mae_encoder(dequantized, v["mask"], model.class_emb(v["labels"]))
    features = model.forward_mae_decoder(encoded, v["mask"])
    assert torch.allclose(features, v["features"], atol=1e-4)
    targets = indices[..., list(KL16_CHANNEL_ORDER)]
    assert torch.allclose(
        model.forward_channel_ar(features, targets, v["mask"]), v["logits"], atol=1e-4
    )
    assert torch.allclose(model(v["latents"], v["labels"], v["mask"]), v["loss"], atol=1e-4)


@torch.no_grad()
def test_loss_is_the_mean_over_masked_tokens_and_channels(published):
    model, v = published
    logits, targets = v["logits"], v["indices"][..., list(KL16_CHANNEL_ORDER)][v["mask"].bool()]
    logp = F.log_softmax(logits.double(), dim=-1).gather(-1, targets[..., None])
    assert model(v["latents"], v["labels"], v["mask"]).item() == pytest.approx(
        -logp.mean().item(), abs=1e-5
    )


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_names_shapes_order_and_count_are_the_published_ones(size):
    expected = manifest(size)
    with torch.device("meta"):  # huge has 1.2 billion parameters
        model = MODELS[f"tokenbridge_{size}"](quant_levels=64)
    assert {name: list(value.shape) for name, value in published_state(model).items()} == expected[
        "shapes"
    ]
    assert list(published_parameters(model)) == expected["parameter_order"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]


def test_state_dicts_go_both_ways(small_model):
    state = small_model.state_dict()
    for names in (state, to_published(state)):
        other = TokenBridge(**SMALL)
        assert not torch.equal(other.backbone.z_proj.weight, small_model.backbone.z_proj.weight)
        other.load_state_dict(names)
        assert same_states(small_model, other)
    wrapper = torch.nn.ModuleDict({"module": other})  # as inside DDP
    wrapper.load_state_dict(
        {f"module.{name}": value for name, value in published_state(small_model).items()}
    )
    missing = {name: value for name, value in state.items() if name != "backbone.z_proj.weight"}
    with pytest.raises(RuntimeError, match=r"z_proj\.weight"):
        other.load_state_dict(missing)


@pytest.mark.parametrize("head", HEADS)
def test_names_are_addresses(head):
    model = small(head)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert set(model.state_dict()) - set(buffers) == set(parameters)
    assert all(model.get_parameter(name) is value for name, value in parameters.items())
    # Files have every entry once, under another name, and come back.
    state = model.state_dict()
    assert len(to_published(state)) == len(state) and not set(to_published(state)) & set(state)
    assert from_published(to_published(state)).keys() == state.keys()


def test_the_model_can_be_called_with_other_weights(small_model):
    latents, labels, mask = batch(small_model)
    doubled = {name: 2 * value for name, value in small_model.named_parameters()}
    other = TokenBridge(**SMALL).eval()
    other.load_state_dict(doubled, strict=False)
    loss = torch.func.functional_call(small_model, doubled, (latents, labels, mask))
    assert torch.equal(loss, other(latents, labels, mask))


def test_distributed_checkpoints_hold_model_and_optimizer(small_model):
    optimizer = torch.optim.AdamW(add_weight_decay(small_model.train(), 0.02), lr=1e-3)
    small_model(*batch(small_model)).backward()
    optimizer.step()
    weights, moments = get_state_dict(small_model, optimizer)
    assert set(weights) == set(small_model.state_dict())
    assert set(moments["state"]) == {name for name, _ in small_model.named_parameters()}
    other = TokenBridge(**SMALL)
    again = torch.optim.AdamW(add_weight_decay(other, 0.02), lr=1e-3)
    set_state_dict(other, again, model_state_dict=weights, optim_state_dict=moments)
    assert same_states(small_model, other)
    assert same(optimizer.state_dict()["state"], again.state_dict()["state"])


def test_optimizer_groups_spare_vectors_and_biases(small_model):
    spared, decayed = add_weight_decay(small_model, 0.02)
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)
    names = {id(p): name for name, p in to_published(dict(small_model.named_parameters())).items()}
    for name in (names[id(p)] for p in spared["params"]):
        assert name.endswith(".bias") or "norm" in name or name == "z_proj_ln.weight", name
    decayed_names = [names[id(p)] for p in decayed["params"]]
    assert {"fake_latent", "mask_token", "class_emb.weight", "channel_embed"} <= set(decayed_names)
    assert len(spared["params"]) + len(decayed["params"]) == len(names)


def test_optimizer_groups_are_in_published_order():
    order = manifest("base")["parameter_order"]
    with torch.device("meta"):
        model = MODELS["tokenbridge_base"](quant_levels=64)
    names = {id(p): name for name, p in to_published(dict(model.named_parameters())).items()}
    for group in add_weight_decay(model, 0.02):
        places = [order.index(names[id(p)]) for p in group["params"]]
        assert places == sorted(places)


def test_initial_weights():
    model = tokenbridge_tiny(img_size=64)
    state = published_state(model)
    for name in (
        "fake_latent",
        "mask_token",
        "encoder_pos_embed_learned",
        "channel_embed",
        "class_emb.weight",
    ):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.3), name
    assert state["token_embeddings.0.weight"].std().item() == pytest.approx(1, rel=0.1)
    for name, value in state.items():
        if "adaLN_modulation" in name or name.endswith(".bias"):
            assert not value.any(), name
    fan_in_out = sum(state["encoder_blocks.0.mlp.fc1.weight"].shape)
    assert state["encoder_blocks.0.mlp.fc1.weight"].abs().max() <= math.sqrt(6 / fan_in_out)
    assert state["encoder_blocks.0.mlp.fc1.weight"].abs().max() > 0.9 * math.sqrt(6 / fan_in_out)


# --------------------------------------------------------------------------------------------------------------------
# Tokens, masks, labels.


@pytest.mark.parametrize("patch_size", [1, 2])
def test_patchify_is_row_major_and_inverted(patch_size):
    model = TokenBridge(**{**SMALL, "patch_size": patch_size, "vae_embed_dim": 3})
    x = torch.randn(2, 3, 4, 4)
    tokens = model.patchify(x)
    assert tokens.shape == (2, 16 // patch_size**2, 3 * patch_size**2)
    assert torch.equal(model.unpatchify(tokens), x)
    assert torch.equal(
        tokens[:, 1, 0], x[:, 0, 0, patch_size]
    )  # the second token is the first one's right neighbour


def test_masks_follow_the_truncated_normal():
    model = TokenBridge(**{**SMALL, "img_size": 512})  # 1024 tokens: little rounding
    counts = torch.tensor([model.draw_num_masked() for _ in range(4000)]) / model.seq_len
    expected = truncnorm(-0.3 / 0.25, 0, loc=1, scale=0.25)
    assert counts.min() >= 0.7 and counts.max() <= 1
    for q in (0.1, 0.5, 0.9):
        assert counts.quantile(q).item() == pytest.approx(expected.ppf(q), abs=0.01)


def test_balanced_masks_have_the_same_distribution_and_almost_equal_work(monkeypatch):
    """Counts of masked tokens of both halves; the maximum over 32 ranks, which all of them wait for."""
    model = TokenBridge(**{**SMALL, "img_size": 256}, balanced_masks=True).train()
    counts = []
    monkeypatch.setattr(
        model, "masked_tokens", lambda latents, labels, count: counts.append(count) or [latents]
    )
    monkeypatch.setattr(model.head, "loss", lambda latents: latents.mean())
    latents, labels = torch.randn(4, 16, 16, 16), torch.zeros(4, dtype=torch.long)
    for _ in range(3200):
        loss = model(latents, labels)
    assert loss.item() == pytest.approx(latents.mean().item(), abs=1e-6)
    shares = torch.tensor(counts).view(-1, 2) / 256
    expected = truncnorm(-0.3 / 0.25, 0, loc=1, scale=0.25)
    for half in shares.T:
        for q in (0.1, 0.5, 0.9):
            assert half.quantile(q).item() == pytest.approx(expected.ppf(q), abs=0.015)
    for work, bound in ((shares.mean(1), 1.01), (shares[:, 0], 1.2)):
        slowest = work.view(-1, 32).amax(1).mean() / work.mean()
        assert slowest < bound and (bound < 1.1 or slowest > 1.08)


def test_a_balanced_loss_is_the_mean_of_its_halves():
    model = filled(TokenBridge(**SMALL, balanced_masks=True)).train()
    latents, labels = torch.randn(3, 16, 4, 4), torch.tensor([0, 1, 2])
    torch.manual_seed(5)
    loss = model(latents, labels)
    loss.backward()
    torch.manual_seed(5)
    quantile = torch.rand((), dtype=torch.float64).item()
    parts = [
        model.head.loss(*model.masked_tokens(latents[rows], labels[rows], model.num_masked_at(q)))
        for rows, q in ((slice(0, 2), quantile), (slice(2, 3), 1 - quantile))
    ]
    assert torch.allclose(loss, (2 * parts[0] + parts[1]) / 3, atol=1e-6)
    assert all(p.grad is not None for p in model.head.parameters())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**31))
def test_orders_are_permutations_and_masks_their_heads(bsz, side, ratio, seed):
    torch.manual_seed(seed)
    model = TokenBridge(**{**SMALL, "img_size": 16 * side, "mask_ratio_min": ratio})
    length = side**2
    orders = model.sample_orders(bsz)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(length).expand(bsz, length))
    mask = model.random_masking(torch.zeros(bsz, length, 16), orders)
    count = int(mask[0].sum())
    assert math.ceil(length * ratio) <= count <= length
    heads = torch.zeros(bsz, length).scatter(1, orders[:, :count], 1.0)
    assert torch.equal(mask, heads)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_patches_come_back_from_every_size(bsz, channels, patch_size, side):
    sizes = {
        "img_size": 16 * patch_size * side,
        "patch_size": patch_size,
        "vae_embed_dim": channels,
    }
    model = TokenBridge(**{**SMALL, **sizes})
    size = patch_size * side
    x = torch.arange(bsz * channels * size**2).view(bsz, channels, size, size)
    tokens = model.patchify(x)
    assert torch.equal(model.unpatchify(tokens), x)
    for row in range(side):
        for column in range(side):
            patch = x[:, :, row * patch_size :, column * patch_size :][
                :, :, :patch_size, :patch_size
            ]
            assert torch.equal(tokens[:, row * side + column], patch.flatten(1))


def test_orders_and_masks(small_model):
    orders = small_model.sample_orders(64)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(64, 16))
    assert len({tuple(order.tolist()) for order in orders}) > 60
    mask = small_model.random_masking(torch.zeros(64, 16, 16), orders)
    count = int(mask[0].sum())
    assert 12 <= count <= 16 and (mask.sum(dim=1) == count).all()
    assert (mask.gather(1, orders[:, :count]) == 1).all()


def test_bad_input_is_named(small_model):
    latents, labels = torch.randn(2, 16, 4, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"latents are \[16, 8, 8\]"):
        small_model(torch.randn(2, 16, 8, 8), labels)
    with pytest.raises(ValueError, match=r"labels run from 0 to 4.*class_num 4"):
        small_model(latents, torch.tensor([0, 4]))
    uneven = torch.zeros(2, 16)
    uneven[0, :3] = 1
    with pytest.raises(ValueError, match=r"same number of masked tokens, got \[3, 0\]"):
        small_model(latents, labels, uneven)
    with pytest.raises(ValueError, match="once"):
        TokenBridge(**SMALL, channel_order=[0] * 16)
    with pytest.raises(ValueError, match="multiple"):
        TokenBridge(**{**SMALL, "img_size": 65})
    with pytest.raises(ValueError, match="mask_ratio_min"):
        TokenBridge(**SMALL, mask_ratio_min=1.5)


def test_channel_orders():
    assert TokenBridge(**SMALL).config["channel_order"] == list(KL16_CHANNEL_ORDER)
    assert TokenBridge(**SMALL, vae_embed_dim=4).config["channel_order"] == [0, 1, 2, 3]
    assert TokenBridge(**{**SMALL, "vae_embed_dim": 4, "patch_size": 2}).config[
        "channel_order"
    ] == list(range(16))
    model = filled(TokenBridge(**{**SMALL, "vae_embed_dim": 3, "channel_order": [2, 0, 1]}))
    latents = model.sample_tokens(2, num_iter=2, seeds=[1, 2])
    assert torch.equal(model.unpatchify(model.quantize(model.patchify(latents))[1]), latents)


# --------------------------------------------------------------------------------------------------------------------
# Training.


def test_checkpointing_changes_memory_not_gradients(small_model):
    latents, labels, mask = torch.randn(2, 16, 4, 4), torch.tensor([0, 1]), torch.zeros(2, 16)
    mask[:, :12] = 1
    other = TokenBridge(**SMALL, grad_checkpointing=True)
    other.load_state_dict(small_model.state_dict())
    saved = {}
    for name, model in {"plain": small_model, "checkpointed": other.eval()}.items():
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(latents, labels, mask)
        loss.backward()
        saved[name] = count
    assert saved["checkpointed"] < saved["plain"] / 2
    for (name, a), (_, b) in zip(
        small_model.named_parameters(), other.named_parameters(), strict=True
    ):
        if name != "backbone.fake_latent":  # used in training mode only
            assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_every_parameter_learns(small_model):
    model = small_model.train()
    torch.manual_seed(1)
    for _ in range(8):  # labels dropped and masks of all tokens included
        model(torch.randn(8, 16, 4, 4), torch.randint(4, (8,))).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_bf16_stays_near_fp32(small_model):
    latents, labels, mask = torch.randn(4, 16, 4, 4), torch.arange(4), torch.zeros(4, 16)
    mask[:, :12] = 1
    with torch.no_grad():
        exact = small_model(latents, labels, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = small_model(latents, labels, mask)
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.02)


def test_flops_are_those_a_counter_counts():
    model = filled(TokenBridge(**SMALL))
    mask = torch.zeros(2, 16)
    mask[:, :12] = 1
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 16, 4, 4), torch.tensor([0, 1]), mask)
    assert 3 * counter.get_total_flops() / 2 == pytest.approx(
        model.training_flops(num_masked=12), rel=0.01
    )
    assert model.training_flops(12) < model.training_flops() < model.training_flops(16)


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
