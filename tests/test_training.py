"""What training does to a model: gradients over processes, and learning."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.parallel import DistributedDataParallel

from engine_tokenbridge import backward
from models import fast
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from reconstruction import post_training_quantize
from tests.conftest import ROOT, SMALL, filled, training_state
from tests.fill import deterministic_fill
from util import checkpoint
from util.loader import CachedFolder

NO_DROPOUT = {**SMALL, "attn_dropout": 0.0, "proj_dropout": 0.0, "label_drop_prob": 0.0}


class GivenMasks(torch.nn.Module):
    """A model whose masks come with the labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latents, labels_and_mask):
        return self.model(latents, labels_and_mask[:, 0].long(), labels_and_mask[:, 1:])


def whole_batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 16, 4, 4, generator=random)
    mask = (torch.rand(8, 16, generator=random).argsort(dim=1) < 12).float()
    return latents, torch.cat([torch.arange(8)[:, None] % 4, mask], dim=1)


def gradients_of_half(rank: int, port: int, results: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = filled(TokenBridge(**NO_DROPOUT)).train()
    wrapped = DistributedDataParallel(GivenMasks(model))
    fast.TRAINING_BUDGET["cpu"] = 20 * 16 * 32  # 48 tokens in three parts
    latents, labels = whole_batch()
    half = slice(4 * rank, 4 * rank + 4)
    wrapped(latents[half], labels[half]).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_half_the_batch_give_the_gradients_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(gradients_of_half, args=(port, str(tmp_path)), nprocs=2)
    model = filled(TokenBridge(**NO_DROPOUT)).train()
    GivenMasks(model)(*whole_batch()).backward()
    for rank in range(2):
        halves = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, p in model.named_parameters():
            assert torch.allclose(halves[name], p.grad, atol=1e-5), name


def test_accumulated_gradients_are_those_of_the_whole_batch():
    latents, labels = torch.randn(8, 16, 4, 4), torch.arange(8) % 4
    # All tokens masked, so that the drawn masks are the same for every part.
    model = TokenBridge(**NO_DROPOUT, mask_ratio_min=1.0)
    model.load_state_dict(deterministic_fill(model.state_dict()))
    state = training_state(model)
    moments = torch.cat([latents, torch.full_like(latents, -30.0)], dim=1)  # whose samples are their means
    results = []
    for parts in (1, 4):
        model.zero_grad()
        batches = list(zip(moments.chunk(parts), labels.chunk(parts), strict=True))
        loss = backward(state, batches, None, 1.0, "fp32")
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0][1], results[1][1], strict=True))


def photographs(root, classes: int, each: int, size: int):
    """Crops of the two photographs that scikit-learn brings, every fifth grey: ``root/train/<class>/<image>.jpg``."""
    crops = np.random.RandomState(0)
    for label in range(classes):
        folder = root / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(each):
            photograph = load_sample_images().images[(label + number) % 2]
            top, left = (crops.randint(0, side - size) for side in photograph.shape[:2])
            image = Image.fromarray(photograph[top : top + size, left : left + size + 30])
            image = image.convert("L") if (label * each + number) % 5 == 4 else image
            image.save(folder / f"{number}.JPEG", quality=95)
    return root


def test_loss_falls_when_a_small_model_overfits_eight_photographs(run, tmp_path):
    data = photographs(tmp_path / "data", classes=8, each=1, size=96)
    vae = AutoencoderKL(16, (1, 1, 2, 2, 4), use_variational=False, ch=8)  # without noise that cannot be learned
    checkpoint.save_vae(tmp_path / "vae.ckpt", filled(vae), 0.5)
    common = "--img_size 64 --num_workers 0"
    run("main_cache", f"{common} --vae_path {tmp_path}/vae.ckpt --data_path {data} --cached_path {tmp_path}/cache")
    run(
        "main_tokenbridge",
        f"{common} --model tokenbridge_tiny --class_num 8 --buffer_size 4 --quant_bits 4 --use_cached --no_mirror "
        f"--cached_path {tmp_path}/cache --output_dir {tmp_path}/run --batch_size 8 --epochs 120 --warmup_epochs 10 "
        "--lr 3e-3 --attn_dropout 0 --proj_dropout 0 --label_drop_prob 0 --save_last_freq 1000",
    )
    losses = [event.value for event in EventAccumulator(str(tmp_path / "run")).Reload().Scalars("train/loss")]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_photographs_through_full_size_kl16_and_base(run, tmp_path):
    data = photographs(tmp_path / "data", classes=4, each=2, size=280)
    vae = AutoencoderKL(16, (1, 1, 2, 2, 4))
    torch.save({"model": vae.state_dict()}, tmp_path / "kl16.ckpt")
    run(
        "main_cache",
        f"--img_size 256 --vae_path {tmp_path}/kl16.ckpt --vae_embed_dim 16 --batch_size 4 --num_workers 2 "
        f"--data_path {data} --cached_path {tmp_path}/cache",
    )
    run(
        "main_tokenbridge",
        f"--model tokenbridge_base --class_num 4 --use_cached --cached_path {tmp_path}/cache --batch_size 4 --epochs 1 "
        f"--num_workers 2 --output_dir {tmp_path}/run",
    )
    content = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)
    assert {int(state["step"]) for state in content["optimizer"]["state"].values()} == {2}
    assert content["config"]["latent_factor"] == 0.2325 and content["config"]["quant_levels"] == 64


# --------------------------------------------------------------------------------------------------------------------
# The demo, run once.


@pytest.fixture(scope="module")
def demo():
    """The folder that ``make demo`` writes."""
    subprocess.run([sys.executable, "demo/demo.py"], cwd=ROOT, check=True)
    return ROOT / "output" / "demo"


@pytest.mark.slow
def test_the_demo_makes_digits(demo):
    results = json.loads((demo / "results.json").read_text())
    assert results["recognized_samples"] >= 0.9 and results["recognized_val"] > 0.95
    for name in ("reconstruction.png", "samples.png", "loss.png"):
        with Image.open(demo / name) as picture:
            assert min(picture.size) > 100
    names = [f"{number:05d}.png" for number in range(100)]
    assert sorted(path.name for path in (demo / "samples").iterdir()) == names
    # The enlarged digits reduce to the originals.
    digits = load_digits()
    paths = sorted((demo / "data").glob("*/*/*.png"), key=lambda path: path.name)
    for path, original, digit in zip(paths, digits.images, digits.target, strict=True):
        with Image.open(path) as image:
            reduced = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert path.parent.name == str(digit) and np.array_equal(np.round(reduced * 16 / 255), original)


def lloyd_max_error(values: torch.Tensor, levels: int) -> float:
    """Mean squared error of the best scalar quantizer of ``values``, by Lloyd's iteration."""
    values = values.double().sort().values
    centres = values[torch.linspace(0, len(values) - 1, levels + 2).long()[1:-1]].clone()
    for _ in range(1000):
        nearest = torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)
        sums, counts = (
            torch.zeros(levels).double().index_add(0, nearest, v) for v in (values, torch.ones_like(values))
        )
        centres = torch.where(counts > 0, sums / counts, centres)
    return (values - centres[nearest]).square().mean().item()


@pytest.mark.slow
def test_quantizing_a_trained_tokenizers_latents(demo, run, tmp_path):
    run(
        "reconstruction",
        f"--sweep --no_metrics --img_size 16 --num_workers 0 --vae_path {demo}/vae.ckpt --image_dir {demo}/data/train "
        f"--output_dir {tmp_path} --images_per_class 100",
    )
    rows = json.loads((tmp_path / "sweep_n100" / "table1.json").read_text())["rows"]
    errors = {(row["bits"], row["range"]): row["latent_mse"] for row in rows}
    for worse, better in (((3, 5.0), (4, 5.0)), ((4, 5.0), (5, 5.0)), ((5, 5.0), (6, 5.0))):
        assert errors[worse] > errors[better]
    for worse, better in (((6, 2.0), (6, 3.0)), ((6, 3.0), (6, 4.0)), ((6, 4.0), (6, 5.0))):
        assert errors[worse] > errors[better]

    cache = CachedFolder(demo / "cache", mirror=False)
    moments = torch.stack([moments for moments, _ in cache])
    latents = DiagonalGaussianDistribution(moments).sample() * cache.metadata["latent_factor"]
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    error = (post_training_quantize(latents, 6, -5.0, 5.0)[1] - latents).square().mean().item()
    best = lloyd_max_error(latents.flatten(), 64)
    assert best < error < 1.05 * best
