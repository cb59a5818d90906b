"""Every fast path equals the plain one: in float32 to rounding, in bfloat16 to bfloat16's own distance."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from timm.models import vision_transformer

from benchmarks.baselines import plain_kernels
from models import fast, layers
from models.channel_head import ChannelHead
from models.fast import Recordings
from models.layers import Block, Dropout, dropout
from models.tokenbridge import TokenBridge
from tests.conftest import HEADS, NO_DROPOUT, SMALL, batch, small
from util.model_config import ModelConfig


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# --------------------------------------------------------------------------------------------------------------------
# Training.


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_in_parts_is_the_loss(head, monkeypatch):
    model = small(head, **NO_DROPOUT).train()
    given, results = batch(model), []
    for budget in (
        2**30,
        7 * model.head.sequence_length * model.head.dim,
    ):  # all 52 tokens; 7 at once, the last part smaller
        monkeypatch.setitem(fast.TRAINING_BUDGET, "cpu", budget)
        model.zero_grad()
        torch.manual_seed(1)  # of what a masked head is given
        loss = 3 * model(*given)  # scaled, as accumulation does
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (whole, expected), (parts, found) = results
    assert torch.allclose(whole, parts, atol=1e-5)
    for name, grad in expected.items():
        assert torch.allclose(grad, found[name], atol=1e-4 * max(1.0, grad.abs().max().item())), (
            name
        )


@pytest.mark.parametrize("frozen", ["head", "backbone", "head.channel_blocks"])
def test_frozen_parts_get_no_gradients_and_the_rest_the_same_ones(monkeypatch, frozen):
    model = small("ar", **NO_DROPOUT).train()
    model.get_submodule(frozen).requires_grad_(False)
    given, results, parts = batch(model), [], []
    forward = fast.LossInParts.forward
    monkeypatch.setattr(
        fast.LossInParts, "forward", lambda ctx, *rest: (parts.append(1), forward(ctx, *rest))[1]
    )
    for budget in (2**30, 7 * 16 * 32):
        monkeypatch.setitem(fast.TRAINING_BUDGET, "cpu", budget)
        model.zero_grad()
        (3 * model(*given)).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    whole, found = results
    expected = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(parts) == 1 and set(whole) == set(found) <= set(expected) and whole
    for name, grad in whole.items():
        assert torch.allclose(grad, found[name], atol=1e-4 * max(1.0, grad.abs().max().item())), (
            name
        )


@pytest.mark.parametrize("budget", [2**30, 7 * 16 * 32])
def test_bf16_gradients_stay_as_near_to_fp32_whatever_the_parts(monkeypatch, budget):
    model = small("ar", **NO_DROPOUT).train()
    given, grads = batch(model), {}
    for precision, size in (("fp32", 2**30), ("plain", 2**30), ("fast", budget)):
        monkeypatch.setitem(fast.TRAINING_BUDGET, "cpu", size)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            loss = model(*given)
        loss.backward()
        grads[precision] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (
        distance(grads["fast"], grads["fp32"]) < 1.2 * distance(grads["plain"], grads["fp32"]) < 0.1
    )


def gradients(
    model: TokenBridge, given: tuple, scale: float, precision: torch.dtype
) -> torch.Tensor:
    """Gradients of ``scale`` times the loss, divided by it again, as a scaler does."""
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss = scale * model(*given)
    loss.backward()
    return (
        torch.cat(
            [p.grad.flatten() for part in (model.backbone, model.head) for p in part.parameters()]
        )
        / scale
    )


@pytest.fixture
def in_parts(monkeypatch) -> list:
    """Lets a small model's head train 7 tokens at a time; a list that grows with each loss in parts."""
    monkeypatch.setitem(fast.TRAINING_BUDGET, "cpu", 7 * 16 * 32)
    calls, forward = [], fast.LossInParts.forward
    monkeypatch.setattr(
        fast.LossInParts, "forward", lambda ctx, *rest: (calls.append(1), forward(ctx, *rest))[1]
    )
    return calls


def test_fp16_gradients_in_parts_are_as_near_to_fp32_and_do_not_underflow(monkeypatch, in_parts):
    model = small("ar", **NO_DROPOUT).train()
    given = batch(model)
    exact = gradients(model, given, 1.0, torch.float32)
    found = [gradients(model, given, scale, torch.float16) for scale in (2.0**8, 2.0**-14)]
    assert len(in_parts) == 3
    monkeypatch.setitem(fast.TRAINING_BUDGET, "cpu", 2**30)
    plain, underflown = (
        gradients(model, given, scale, torch.float16) for scale in (2.0**8, 2.0**-14)
    )
    assert distance(found[0], exact) < 1.2 * distance(plain, exact) < 0.01
    # The head's gradients do not depend on the scale: only those of the backbone do.
    head = slice(-sum(p.numel() for p in model.head.parameters()), None)
    assert (
        distance(found[1][head], exact[head]) < 0.01 < 0.1 < distance(underflown[head], exact[head])
    )


def test_fp16_gradients_that_overflow_in_a_part_are_not_finite(in_parts):
    model = small("ar", **NO_DROPOUT).train()
    given = batch(model)
    with (
        torch.no_grad()
    ):  # features so large that their products with gradients overflow, but no activation does
        model.backbone.output_pos_embed.fill_(3e4)
        model.head.condition_proj.weight.mul_(1e-5)
    assert not gradients(model, given, 1.0, torch.float16).isfinite().all() and in_parts
    assert gradients(model, given, 1.0, torch.float32).isfinite().all()


def test_the_losss_backward_passes_run_without_autocast(monkeypatch, in_parts):
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(("forward", torch.is_autocast_enabled("cpu")))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(("backward", torch.is_autocast_enabled("cpu")))
            return grad

    classify = ChannelHead.classify
    monkeypatch.setattr(ChannelHead, "classify", lambda self, x: classify(self, Probe.apply(x)))
    model = small("ar", **NO_DROPOUT).train()
    given, results = batch(model), []
    for within in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*given)
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            loss.backward()
        results.append([p.grad for p in model.head.parameters()])
    assert set(seen) == {("forward", True), ("backward", False)} and len(in_parts) == 2
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_what_it_should_and_scales_the_rest(p):
    x = torch.ones(300_001, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, p)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / len(x)) ** 0.5)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert y[y != 0].unique().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # gradients pass where values did
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p), y) and not torch.equal(dropout(x, p), y)
    # Neighbours, which share random words, do not drop together.
    dropped = (y == 0).float()
    for lag in (1, 2, 3, 4):
        together = (dropped[lag:] * dropped[:-lag]).mean().item()
        assert together == pytest.approx(p * p, abs=4 * p / len(x) ** 0.5)
    assert not dropout(x, 1.0).any() and not dropout(x, 1 - 1e-9).any()
    module = Dropout(p)
    assert (module(x) == 0).any() and torch.equal(module.eval()(x), x)


@pytest.mark.parametrize("head", HEADS)
def test_fast_models_have_the_losses_and_gradients_of_plain_ones(head, monkeypatch):
    model, results = small(head, **NO_DROPOUT).train(), []
    given = batch(model)
    monkeypatch.setitem(
        fast.TRAINING_BUDGET, "cpu", 7 * model.head.sequence_length * model.head.dim
    )
    for kernels in (plain_kernels(), nullcontext()):
        model.zero_grad()
        torch.manual_seed(1)
        with kernels:
            loss = model(*given)
            loss.backward()
        results.append(
            (
                loss.detach(),
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            )
        )
    (loss, expected), (quick, found) = results
    assert torch.allclose(loss, quick, atol=1e-5) and set(expected) <= set(found)
    for name, grad in expected.items():
        assert torch.allclose(grad, found[name], atol=1e-4 * max(1.0, grad.abs().max().item())), (
            name
        )


@torch.no_grad()
def test_a_block_is_timms():
    block, x = (
        Block(32, 2, ModelConfig(norm_layer=torch.nn.LayerNorm)).eval(),
        torch.randn(3, 16, 32),
    )
    theirs = vision_transformer.Block(32, 2, qkv_bias=True).eval()
    theirs.load_state_dict(block.state_dict())
    assert torch.allclose(block(x), theirs(x), atol=1e-5)
    rows = torch.rand(3, 16).argsort(dim=1)[:, :5]
    assert torch.allclose(block.at(x, rows), layers.gather_tokens(theirs(x), rows), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_kernel_gets_no_more_rows_than_a_launch_may_have(monkeypatch, causal):
    q, k, v = (torch.randn(50, 4, 16, 8, requires_grad=True) for _ in range(3))
    kernel, sizes = torch.nn.functional.scaled_dot_product_attention, []

    def counted(q, *args, **options):
        sizes.append(q.shape[0] * q.shape[1])
        return kernel(q, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    results = []
    for limit in (layers.LAUNCH_ROWS, 63):  # 15 rows of 4 heads
        monkeypatch.setattr(layers, "LAUNCH_ROWS", limit)
        results.append(
            torch.autograd.grad(
                (out := layers.fused(q, k, v, causal, 0.0)).square().sum(), (q, k, v)
            )
        )
        assert torch.allclose(
            out,
            layers.attend(q, k, v, torch.full((16, 16), -torch.inf).triu(1) if causal else None),
            atol=1e-5,
        )
    assert sizes == [200, 60, 60, 60, 20] and layers.LAUNCH_ROWS < 2**16
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_no_dropout_of_the_model_is_pytorchs():
    model = TokenBridge(**SMALL)
    kinds = [type(module) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert set(kinds) == {Dropout} and len(kinds) >= 8


@pytest.mark.parametrize("parts", [True, ["head"], ["encoder", "decoder"]])
def test_checkpointed_blocks_give_the_same_gradients_dropout_included(parts):
    grads = []
    for checkpointing in (False, parts):
        model = small("ar", grad_checkpointing=checkpointing).train()
        torch.manual_seed(3)
        model(
            *[torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(4)]
        ).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(grads[0], grads[1], atol=1e-5)
    with pytest.raises(ValueError, match="grad_checkpointing takes encoder, decoder, head"):
        TokenBridge(**SMALL, grad_checkpointing=["tail"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("head", ["ar", "parallel", "masked"])
def test_compiled_blocks_give_the_same_gradients_and_images_for_every_number_of_tokens(
    head, monkeypatch
):
    model = small(head, **NO_DROPOUT).train()
    given = [batch(model)[:2] for _ in range(3)]
    masks = [(torch.rand(4, 16).argsort(dim=1) < count).float() for count in (12, 14, 16)]
    monkeypatch.setitem(fast.TRAINING_BUDGET, "cpu", 20 * model.head.sequence_length * 32)
    results, sampled = [], []
    for compiled in (False, True):
        torch.manual_seed(1)
        if compiled:
            model.compile_blocks()
        for (latents, labels), mask in zip(given, masks, strict=True):
            model.zero_grad()
            model(latents, labels, mask).backward()
            results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        sampled.append(
            model.sample_tokens(2, num_iter=5, cfg=2.0, labels=torch.arange(2), seeds=[1, 2])
        )
    assert torch.equal(*sampled)
    # A copy computes with its own weights.
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.head.parameters():
            parameter.mul_(0.5)
    plain = small(head, **NO_DROPOUT)
    plain.load_state_dict(changed.state_dict())
    options = {"num_iter": 5, "labels": torch.arange(2), "seeds": [1, 2]}
    assert torch.equal(changed.sample_tokens(2, **options), plain.sample_tokens(2, **options))
    for plain, found in zip(results[:3], results[3:], strict=True):
        assert torch.allclose(plain, found, atol=1e-4 * plain.abs().max().item())


# --------------------------------------------------------------------------------------------------------------------
# Sampling.


@pytest.mark.skipif(not fast.can_pack(torch.bfloat16), reason="oneDNN does not multiply in bf16")
@pytest.mark.parametrize("head", HEADS)
def test_packed_weights_multiply_as_those_of_autocast(head, monkeypatch):
    model = small(head).requires_grad_(False)
    options = {"num_iter": 5, "cfg": 2.0, "labels": torch.arange(3), "seeds": [1, 2, 3]}
    with torch.autocast("cpu", torch.bfloat16):
        packed = model.sample_tokens(3, **options)
        monkeypatch.setattr(fast, "can_pack", lambda dtype: False)
        assert torch.equal(model.sample_tokens(3, **options), packed)


@pytest.mark.skipif(not fast.can_pack(torch.float32), reason="no oneDNN")
def test_layers_read_their_weights_again_after_sampling():
    model = small("ar").requires_grad_(False)
    layer = model.backbone.z_proj
    x = torch.randn(3, layer.in_features)
    with fast.prepared_weights(model, torch.device("cpu")):
        before = layer(x)
        layer.weight.zero_()
        assert torch.equal(layer(x), before)  # the packed copy
    assert torch.equal(layer(x), layer.bias.expand(3, -1))


def test_threads_may_sample_from_one_model():
    model = small("ar").requires_grad_(False)
    options = {"num_iter": 5, "cfg": 2.0, "labels": torch.arange(3), "seeds": [1, 2, 3]}
    expected = model.sample_tokens(3, **options)
    with ThreadPoolExecutor(4) as pool:
        sampled = list(pool.map(lambda _: model.sample_tokens(3, **options), range(8)))
    assert all(torch.allclose(each, expected, atol=1e-5) for each in sampled)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_fast_models_sample_what_plain_ones_do(head, order, monkeypatch):
    model = small(head)
    options = {
        "num_iter": 5,
        "cfg": 2.0,
        "labels": torch.arange(3),
        "seeds": [1, 2, 3],
        "return_confidence": True,
    }
    with plain_kernels():
        expected = model.sample_tokens(3, **options, order=order)
    for budget in (2**28, 20000):  # all tokens at once, and in parts
        monkeypatch.setattr(fast, "MODULATION_BUDGET", budget)
        found = model.sample_tokens(3, **options, order=order)
        assert torch.allclose(found[0], expected[0], atol=1e-5) and torch.allclose(
            found[1], expected[1], atol=1e-3
        )


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_features_of_wanted_positions_are_those_of_all(head):
    model = small(head)
    tokens, positions = torch.randn(3, 16, model.token_dim), torch.rand(3, 16).argsort(dim=1)
    known, wanted = positions[:, :5], positions[:, 9:]
    classes = model.class_emb(torch.tensor([0, 1, 2]))
    every = model.backbone(tokens, known, classes)
    some = model.backbone(tokens, known, classes, wanted)
    assert torch.allclose(some, every.gather(1, wanted[..., None].expand(-1, -1, 32)), atol=1e-5)
    bf16 = []
    for positions in (None, wanted):
        with torch.autocast("cpu", torch.bfloat16):
            found = model.backbone(tokens, known, classes, positions)
        bf16.append(
            found
            if positions is not None
            else found.gather(1, wanted[..., None].expand(-1, -1, 32))
        )
    assert distance(bf16[1], some) < 1.2 * distance(bf16[0], some) < 0.05


def rerun(work, pool):
    """Stands in for a CUDA graph where there is none: a replay reads the same inputs, writes the same outputs."""
    outputs = work()

    def replay():
        for output, new in zip(outputs, work(), strict=True):
            output.copy_(new)

    return replay, outputs


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_recorded_sampling_is_sampling(head):
    model = small(head)
    options = {
        "num_iter": 5,
        "cfg": 2.0,
        "labels": torch.arange(3),
        "seeds": [1, 2, 3],
        "return_confidence": True,
    }
    plain = [
        model.sample_tokens(3, **options, temperature=temperature) for temperature in (1.0, 0.7)
    ]
    recordings = model.head.recordings = Recordings(rerun)
    for temperature, (latents, confidence) in zip((1.0, 0.7, 1.0), [*plain, plain[0]], strict=True):
        found = model.sample_tokens(3, **options, temperature=temperature)
        assert torch.equal(found[0], latents) and torch.allclose(found[1], confidence, atol=1e-4)
    # Steps of 3, 9, 12, 12 and 12 tokens: powers of two, at each temperature.
    assert sorted(key[0] for key in recordings.kept) == [4, 4, 16, 16]
    assert not copy.deepcopy(model).head.recordings.kept
    with torch.inference_mode():
        assert torch.equal(model.sample_tokens(3, **options)[0], plain[0][0])
    model.float()
    assert not recordings.kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_graphs_on_cuda_sample_what_kernels_do(head, precision):
    model = small(head).cuda().requires_grad_(False)
    options = {
        "num_iter": 5,
        "cfg": 2.0,
        "labels": torch.arange(3),
        "seeds": [1, 2, 3],
        "return_confidence": True,
    }
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        latents, confidence = model.sample_tokens(3, **options)
        model.head.recordings = Recordings()
        for _ in range(2):
            found = model.sample_tokens(3, **options)
            assert (found[0] != latents).float().mean() < 0.01 and distance(
                found[1], confidence
            ) < 0.05


def test_autocast_keeps_copies_of_frozen_weights_for_the_length_of_a_call():
    model = small("ar").requires_grad_(False)
    seen = []
    hook = model.head.condition_proj.register_forward_pre_hook(
        lambda module, _: seen.append(module.weight.requires_grad)
    )
    options = {"bsz": 2, "num_iter": 3, "seeds": [1, 2], "temperature": 0}
    with torch.autocast("cpu", torch.bfloat16):
        fast = model.sample_tokens(**options)
    assert seen == [True] * 3 and not any(p.requires_grad for p in model.parameters())
    plain = small("ar")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain.sample_tokens(**options), fast)
    seen.clear()
    model.sample_tokens(**options)
    assert seen == [False] * 3
    hook.remove()
