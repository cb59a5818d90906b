"""On a GPU: the published model's numbers, the CPU's samples, and a training that is interrupted."""

import pytest
import torch

from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.conftest import HEADS, filled, load, reference, scalars, small
from util.precision import autocast, exact_convolutions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def in_float32():
    with exact_convolutions():
        yield


def on_gpu(vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in vectors.items()}


@torch.no_grad()
def test_tokens_features_and_loss_are_the_published_models():
    config, vectors = reference("forward")
    model, v = filled(TokenBridge(**config)).cuda(), on_gpu(vectors)
    indices, dequantized = model.quantize(model.patchify(v["latents"]))
    assert torch.equal(indices, v["indices"])
    encoded = model.forward_mae_encoder(dequantized, v["mask"], model.class_emb(v["labels"]))
    assert torch.allclose(model.forward_mae_decoder(encoded, v["mask"]), v["features"], atol=1e-4)
    assert torch.allclose(model(v["latents"], v["labels"], v["mask"]), v["loss"], atol=1e-4)


@pytest.mark.parametrize("name", ["cfg1_linear", "cfg2_constant", "cfg3_linear"])
def test_the_releases_way_gives_the_published_latents(name):
    config, vectors = reference(f"sample_{name}")
    how = {key: config.pop(key) for key in ("cfg", "cfg_schedule", "num_iter", "temperature")}
    model, v = filled(TokenBridge(**config)).cuda(), on_gpu(vectors)
    latents = model.sample_tokens(
        2, labels=v["labels"], orders=v["orders"], **how, first_place="released"
    )
    assert torch.allclose(latents, v["latents"], atol=1e-5)


@torch.no_grad()
def test_moments_and_reconstruction_are_the_published_tokenizers():
    v = on_gpu(reference("vae")[1])
    vae = filled(AutoencoderKL(16, (1, 1, 2, 2, 4))).cuda()
    posterior = vae.encode(v["image"])
    assert torch.allclose(posterior.parameters, v["moments"], atol=1e-4)
    assert torch.allclose(vae.decode(posterior.mode()), v["reconstruction"], atol=1e-4)


@torch.no_grad()
def test_convolutions_of_fp32_are_as_exact_as_the_cpus():
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    x, weight = torch.randn(8, 256, 32, 32), torch.randn(256, 256, 3, 3) / 48
    expected = torch.nn.functional.conv2d(x.double(), weight.double())
    with autocast(torch.device("cuda"), "fp32"):
        found = torch.nn.functional.conv2d(x.cuda(), weight.cuda()).cpu()
    assert (found - expected).abs().max() < 1e-5  # TF32: about 1e-3


@pytest.mark.parametrize("head", HEADS)
def test_seeds_give_the_cpus_samples(head):
    model = small(head)
    options = {"num_iter": 4, "cfg": 2.0, "labels": torch.arange(4), "seeds": range(4)}
    expected = model.sample_tokens(4, **options)
    model.cuda()
    found = model.sample_tokens(4, **{**options, "labels": torch.arange(4).cuda()}).cpu()
    assert (found - expected).abs().gt(
        1e-3
    ).float().mean() < 0.05  # where a draw lies on a border, another level


@pytest.mark.parametrize("head", ["ar", "masked"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trainings_learn_go_on_and_sample(train, run, vae_path, tmp_path, head, precision):
    flags = f"--head {head} --device cuda --precision {precision} --lr 3e-3 --lr_schedule constant --save_last_freq 1"
    whole = train("whole", f"{flags} --epochs 20")
    train("parts", f"{flags} --epochs 12")
    parts = train("parts", f"{flags} --epochs 20 --resume {tmp_path}/parts")
    losses = list(scalars(parts, "train/loss").values())
    assert losses[-1] < losses[0] - 0.03
    # Sums of gradients round anew in each run on a GPU.
    ends = [load(folder)["model_ema"] for folder in (whole, parts)]
    assert all((value - ends[1][name]).abs().mean() < 0.01 for name, value in ends[0].items())
    flags = f"--evaluate --resume {parts} --vae_path {vae_path} --device cuda --precision {precision} --no_metrics"
    run(
        "main_tokenbridge",
        f"{flags} --num_images 8 --num_iter 4 --cfg 2 --output_dir {tmp_path}/samples",
    )
    assert len(list((tmp_path / "samples" / "samples").glob("*.png"))) == 8
