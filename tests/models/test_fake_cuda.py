"""What runs on CUDA leaves nothing on the host, and has the host wait for the device only where a test says so."""

from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

import engine_tokenbridge as engine
import evaluation
import main_vae
import models.tokenizer
import reconstruction
from models import fast
from models.fast import Recordings
from models.masked_head import HEAD_ORDERS
from models.pipeline import TokenBridgePipeline
from models.tokenbridge import TokenBridge
from models.tokenizer import CachedMoments, Tokenizer
from models.vae import AutoencoderKL
from tests.conftest import HEADS, batch, new_trainer, variant
from tests.fake_cuda import DEVICE, FakeCuda, HiddenWait, WrongPlace, gradients, site
from tests.models.test_fast import rerun
from util.precision import autocast, double
from util.signals import StopSignals

pytestmark = pytest.mark.skipif(
    not (torch.backends.cuda.is_built() and hasattr(torch._C, "_ensureCUDADeviceGuardSet")),
    reason="torch's CUDA wheel is needed (no GPU is), whose fake tensors do without a driver (not 2.6's)",
)

#: Heads, tokens and quantizers of every kind, with few channels: here operations cost time by their number, and by that
#: of different shapes, not by their size.
KINDS = {
    **HEADS,
    "patches": {"vae_stride": 8, "patch_size": 2, "vae_embed_dim": 1},
    "linear": {"quantizer": "linear"},
    "calibrated": {"channel_mean": [0.1] * 4, "channel_std": [0.9] * 4},
}


def model_of(kind: str, **options) -> TokenBridge:
    return variant(**{"vae_embed_dim": 4, "channel_depth": 1, **KINDS[kind], **options})


def tokenizer(cuda: FakeCuda) -> Tokenizer:
    return Tokenizer(cuda.put(AutoencoderKL(4, (1, 1, 2), ch=8, num_res_blocks=1).eval()), 0.5)


def loaded(model: TokenBridge, images: bool = False) -> tuple[Tensor, Tensor]:
    """A batch as the loader gives it, of moments or images: on the host, in pinned memory."""
    shape = (3, 16, 16) if images else (2 * model.vae_embed_dim, *model.latent_shape[1:])
    return torch.randn(2, *shape).pin_memory(), torch.arange(2).pin_memory()


# --------------------------------------------------------------------------------------------------------------------
# The device itself.

FAULTS = {
    "a tensor made on the host": (WrongPlace, lambda x: x + torch.arange(4)),
    "a mask of the host": (WrongPlace, lambda x: torch.where(torch.ones(4).bool(), x, 0)),
    "a table on the host": (WrongPlace, lambda x: torch.bucketize(x, torch.arange(4.0))),
    "positions on the host": (WrongPlace, lambda x: x.gather(0, torch.arange(2))),
    "a list of rows": (HiddenWait, lambda x: x[[0, 1]]),
    "a number read": (HiddenWait, lambda x: x.sum().item()),
    "a list read": (HiddenWait, lambda x: x.tolist()),
    "a condition": (HiddenWait, lambda x: bool((x > 0).any())),
    "a comparison": (HiddenWait, lambda x: torch.equal(x, x)),
    "a Boolean index": (HiddenWait, lambda x: x[x > 0]),
    "a Boolean index to write": (HiddenWait, lambda x: x.__setitem__(x > 0, x)),
    "nonzero": (HiddenWait, lambda x: x.nonzero()),
    "levels counted": (HiddenWait, lambda x: torch.bincount(x.long())),
    "a copy to the host": (HiddenWait, lambda x: x.cpu()),
    "a copy to the device": (HiddenWait, lambda x: torch.ones(4).to(x.device)),
    "a copy from pageable memory": (
        HiddenWait,
        lambda x: torch.ones(4).to(x.device, non_blocking=True),
    ),
    "a copy into the device": (HiddenWait, lambda x: x.copy_(torch.ones(4))),
    "numbers made on the device": (HiddenWait, lambda x: torch.tensor([1.0, 2.0], device=x.device)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_raises(fault):
    kind, work = FAULTS[fault]
    with FakeCuda() as cuda, pytest.raises(kind):
        work(cuda.tensor(torch.ones(4)))


def test_what_does_not_wait_passes_and_announced_waits_must_come():
    with FakeCuda("the test", "the test") as cuda:
        x = cuda.tensor(torch.ones(4, dtype=torch.long))
        x[0] = int(torch.rand(2).argmax())  # a number known on the host
        x[1] += torch.tensor(1) + torch.arange(4, device=x.device)[x].sum()
        assert x.tolist() == [1, 1, 1, 1] and x.cpu().dtype == torch.long
    with pytest.raises(HiddenWait, match="no wait in somewhere"), FakeCuda("somewhere"):
        pass


def test_gradients_are_those_of_the_engine(monkeypatch):
    model = model_of(
        "ar", attn_dropout=0.0, proj_dropout=0.0, grad_checkpointing=["decoder"]
    ).train()
    monkeypatch.setitem(fast.TRAINING_BUDGET, "cpu", 7 * 4 * 32)
    loss = model(*batch(model))
    found = gradients(loss)
    loss.backward()
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.grad is not None}
    assert all(torch.allclose(found[p], p.grad, atol=1e-6) for p in found)


# --------------------------------------------------------------------------------------------------------------------
# Training.


@pytest.mark.parametrize("kind", KINDS)
def test_loss_in_parts_and_gradients(kind, monkeypatch):
    model = model_of(kind, grad_checkpointing=["head"] * (kind == "pairs")).train()
    monkeypatch.setitem(
        fast.TRAINING_BUDGET, "cuda", 13 * model.head.sequence_length * model.head.dim
    )
    with FakeCuda() as cuda:
        latents, labels, mask = batch(cuda.put(model), 2)
        with autocast(DEVICE, "bf16"):
            loss = model(cuda.tensor(latents), cuda.tensor(labels), mask)
        loss.backward()
        assert loss.device == DEVICE and loss.dtype == torch.float32
        assert {p.grad.device for p in model.parameters() if p.grad is not None} == {DEVICE}


@pytest.mark.parametrize(("precision", "images"), [("bf16", False), ("fp16", True)])
def test_an_epoch_waits_for_a_flag_a_step_and_for_figures_at_its_end(precision, images, tmp_path):
    with FakeCuda(*["read"] * 4) as cuda:  # HostCopy.read after each step, and Meter.read
        model = cuda.put(model_of("ar"))
        loader = [loaded(model, images) for _ in range(4)]
        encoder = tokenizer(cuda) if images else CachedMoments(0.5)
        options = {"accum_iter": 2, "lr_schedule": "constant", "output_dir": tmp_path}
        trainer = new_trainer(model, loader, encoder, precision=precision, **options)
        trainer.start_loading()
        metrics = engine.train_one_epoch(trainer, StopSignals(DEVICE))
        state = trainer.state
        assert state.epoch == 1 and metrics["train/loss"] == 1  # what comes from this device is 1
        moments = [x for slot in state.optimizer.state.values() for x in slot.values()]
        assert {x.device for x in [*moments, *state.ema_model.parameters()]} == {DEVICE}


@pytest.mark.parametrize("kind", ["ar", "masked"])
def test_held_out_likelihood_waits_once(kind):
    with FakeCuda("held_out_likelihood") as cuda:
        model = cuda.put(model_of(kind))
        loader, vae = [loaded(model, images=True) for _ in range(2)], tokenizer(cuda)
        assert evaluation.held_out_likelihood(model, vae, loader, DEVICE, "bf16")["images"] == 1


# --------------------------------------------------------------------------------------------------------------------
# Sampling.


def sampled(model: TokenBridge, **options) -> None:
    """Samples in two steps from labels and seeds on the host, under guidance and bf16."""
    options = {
        "cfg": 2.0,
        "labels": torch.arange(2),
        "seeds": [1, 2],
        "return_confidence": True,
        **options,
    }
    with autocast(DEVICE, "bf16"):
        found = model.sample_tokens(2, 2, **options)
    assert {x.device for x in found} == {DEVICE}


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_never_waits(kind):
    with FakeCuda() as cuda:
        sampled(cuda.put(model_of(kind).requires_grad_(False)), on_step=lambda *step: None)


OPTIONS = {
    "without seeds and labels": {"seeds": None, "labels": None},
    "most probable": {"temperature": 0.0, "first_place": "released", "cfg_schedule": "constant"},
    "raster": {"order": "raster"},
    "confidence": {"order": "confidence", "confidence_noise": 1.0},
    "orders": {"orders": torch.arange(16).expand(2, -1)},
    "known": {
        "known_latents": torch.ones(2, 4, 4, 4),
        "known_mask": torch.arange(16) < torch.tensor([[8], [5]]),
    },
}


@pytest.mark.parametrize("head_order", HEAD_ORDERS)
def test_sampling_by_a_masked_head_never_waits(head_order):
    with FakeCuda() as cuda:
        sampled(cuda.put(model_of("masked")), head_order=head_order, head_steps=3)


@pytest.mark.parametrize("option", OPTIONS)
def test_sampling_never_waits_whatever_is_asked_and_given(option):
    with FakeCuda() as cuda:
        sampled(cuda.put(model_of("ar")), **OPTIONS[option])


def test_known_tokens_on_the_device_are_counted_once():
    with FakeCuda("sample_tokens") as cuda:
        sampled(
            cuda.put(model_of("ar")),
            **{name: cuda.tensor(x) for name, x in OPTIONS["known"].items()},
        )


@pytest.mark.parametrize("kind", ["ar", "parallel", "masked"])
def test_recorded_sampling_never_waits(kind):
    with FakeCuda() as cuda:
        model = cuda.put(model_of(kind))
        recordings = model.head.recordings = Recordings(rerun)
        for _ in range(2):
            sampled(model)
        buffers = [
            x for inputs, _, outputs in recordings.kept.values() for x in (*inputs, *outputs)
        ]
        assert buffers and {x.device for x in buffers} == {DEVICE}


# --------------------------------------------------------------------------------------------------------------------
# Images.


def test_a_chunk_of_images_is_waited_for_at_its_end(monkeypatch):
    monkeypatch.setitem(
        models.tokenizer.PIXEL_BUDGET, "cuda", 2 * 16**2
    )  # three images in two parts
    options = {
        "num_iter": 2,
        "cfg": 2.0,
        "cfg_schedule": "linear",
        "temperature": 1.0,
        "gen_seed": 0,
    }
    settings = evaluation.SampleSettings(
        num_images=4, eval_bsz=3, precision="bf16", vae_precision="fp16", **options
    )
    # The check reads a number that is there: it was computed before the images, which the host has waited for.
    with FakeCuda("decode_images", "check_finite", "sample_chunk") as cuda:
        model, vae = cuda.put(model_of("ar")), tokenizer(cuda)
        images, confidence = evaluation.sample_chunk(model, vae, range(3), settings, DEVICE)
    assert (
        images.shape == (3, 3, 16, 16)
        and images.dtype == torch.uint8
        and confidence.shape == (3, 4, 4)
    )


def test_edited_pictures_are_waited_for_at_their_end():
    image, mask = Image.new("RGB", (20, 16)), Image.new("L", (20, 16))
    mask.paste(255, (0, 0, 9, 9))
    waits = (
        "decode_images",
        "check_finite",
        "generate_batch",
        "check_finite",
    )  # the checks read what is computed by then
    with FakeCuda(*waits) as cuda, mock.patch.object(TokenBridgePipeline, "to"):  # fakes stay
        model = cuda.put(model_of("ar", img_size=16, vae_stride=4))
        pipe = TokenBridgePipeline(model, tokenizer(cuda))
        made = pipe([0, 1], image=image, mask_image=mask, num_iter=2, cfg=2.0)
    assert pipe.device == DEVICE and [picture.size for picture in made.images] == [(16, 16)] * 2


def test_caching_waits_for_the_moments_of_each_view_and_once_to_count(tmp_path):
    with FakeCuda(*["cache_latents"] * 6) as cuda, mock.patch("numpy.savez"):
        hashes = torch.zeros(2, 32, dtype=torch.uint8)
        loader = [
            (torch.randn(2, 3, 16, 16).pin_memory(), None, [f"a/{n}", f"a/{n + 1}"], hashes)
            for n in (0, 2)
        ]
        engine.cache_latents(tokenizer(cuda), loader, tmp_path, DEVICE, "bf16")


# --------------------------------------------------------------------------------------------------------------------
# A device without float64, as Apple's GPUs. What else these lack does not show here.


class WithoutFloat64(FakeCuda):
    """A device that has no float64; the host may wait for it."""

    def __enter__(self) -> "WithoutFloat64":
        self.patches.enter_context(mock.patch("util.precision.NO_FLOAT64", {"cuda"}))
        return super().__enter__()

    def wait(self, what: str) -> None:
        pass

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = super().__torch_dispatch__(func, types, args, kwargs)
        made = [x for x in tree_leaves(found) if isinstance(x, FakeTensor)]
        if any(x.dtype in (torch.float64, torch.complex128) for x in made):
            raise TypeError(f"{func} in {site()} makes float64")
        return found


def test_float64_on_such_a_device_raises():
    with WithoutFloat64() as device, pytest.raises(TypeError, match="makes float64"):
        device.tensor(torch.ones(4)).double()


@pytest.mark.parametrize("kind", ["ar", "masked", "calibrated"])
def test_training_sampling_and_likelihood_without_float64(kind):
    with WithoutFloat64() as device:
        model, vae = device.put(model_of(kind)), tokenizer(device)
        batches = [loaded(model, images=True)]
        trainer = new_trainer(model.train(), batches, vae, precision="bf16")
        trainer.clip_and_step(trainer.backward(batches), 1e-3)
        trainer.finish_step()
        options = {"head_order": "frequency"} if kind == "masked" else {}
        evaluation.held_out_likelihood(model, vae, batches, DEVICE, "bf16", head_options=options)
        sampled(model)


def test_measures_of_images_and_latents_without_float64():
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with WithoutFloat64() as device:
        tokens, loader = (
            tokenizer(device),
            [(torch.randn(2, 3, 32, 32).pin_memory(), torch.arange(2))],
        )
        engine.channel_statistics(tokens, loader, 4, DEVICE, "bf16")
        main_vae.measure_reconstructions(tokens.vae, loader, DEVICE, "bf16")
        main_vae.measure_latents(tokens.vae, loader, 2, 8, DEVICE)
        x, real = device.tensor(torch.randn(2, 4, 8, 8)), device.tensor(images)
        stats = reconstruction.ReconstructionStats(
            reconstruction.QuantizerSetting(-1, 5.0), 4, DEVICE
        )
        stats.add(real, real, None, double(x), x > 1)
        assert stats.metrics(2)["images"] == 2
