"""Fixtures and helpers of several test files: small models and runs, images, scripts called in process, a Hub."""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from engine_tokenbridge import Trainer
from models.pipeline import TokenBridgePipeline
from models.published import to_published
from models.tokenbridge import TokenBridge, tokenbridge_tiny
from models.tokenizer import Tokenizer
from models.vae import AutoencoderKL
from tests import processes
from tests.fill import deterministic_fill
from tests.hub_server import serving
from tests.scripts.trace import Trace
from util import errors
from util.checkpoint.vae_files import save_vae
from util.precision import effective_precision
from util.training_settings import TrainingSettings
from util.training_state import TrainingState, add_weight_decay

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "reference"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests on fake CUDA tensors last: after them, a forked process cannot compute gradients.

    Each worker of pytest-xdist runs its tests in this order, too.
    """
    items.sort(key=lambda item: item.path.name == "test_fake_cuda.py")


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random state."""
    torch.manual_seed(0)
    np.random.seed(0)


def fixed_matmul_flops(device: torch.device, precision: str) -> float:
    """Return 1 GFLOP/s at once, instead of measuring for a second as :func:`util.devices.matmul_flops` does."""
    return 1e9


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Keep trainings in this process from measuring how fast the CPU multiplies matrices."""
    monkeypatch.setattr("engine_tokenbridge.matmul_flops", fixed_matmul_flops)


def reference(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the configuration and the vectors of a reference file."""
    path = REFERENCE / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config = {key: json.loads(value) for key, value in file.metadata().items()}
    return config, load_file(path)


def manifest(name: str) -> dict:
    """Return names, shapes and parameter order of a published model."""
    return json.loads((REFERENCE / f"state_dict_{name}.json").read_text())


def published_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return weights and buffers under their published names, in the order of files."""
    return to_published(model.state_dict())


def published_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters under their published names, in the order of files."""
    return to_published({name: value.detach() for name, value in model.named_parameters()})


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Give the model reproducible weights and return it in evaluation mode."""
    model.load_state_dict(deterministic_fill(published_state(model)))
    return model.eval()


#: A model of 16 tokens that a CPU steps through in milliseconds.
SMALL = {
    "img_size": 64,
    "encoder_embed_dim": 32,
    "encoder_depth": 1,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "channel_embed_dim": 32,
    "channel_depth": 2,
    "channel_heads": 2,
    "quant_levels": 16,
    "class_num": 4,
    "buffer_size": 4,
}
#: Heads and tokens of every kind.
HEADS = {
    "ar": {},
    "parallel": {"head": "parallel"},
    "masked": {"head": "masked"},
    "pairs": {"channels_per_group": 2, "quant_levels": 4},
    "parallel fours": {"head": "parallel", "channels_per_group": 4, "quant_levels": 4},
    "patches": {"vae_stride": 8, "patch_size": 2, "vae_embed_dim": 4},
}
NO_DROPOUT = {"attn_dropout": 0.0, "proj_dropout": 0.0, "label_drop_prob": 0.0}
#: So few channels and levels that all 81 tokens can be enumerated.
FEW = {"vae_embed_dim": 4, "quant_levels": 3}


def variant(**options) -> TokenBridge:
    """Return a small model with these arguments and reproducible weights, in evaluation mode."""
    return filled(TokenBridge(**{**SMALL, **options}))


def small(head: str, **options) -> TokenBridge:
    """Return a small model with one of :data:`HEADS`."""
    return variant(**{**HEADS[head], **options})


@pytest.fixture
def small_model() -> TokenBridge:
    """A small model with reproducible weights, in evaluation mode."""
    return variant()


def described(**options) -> TokenBridge:
    """Return a small model with metadata."""
    model = variant(**options)
    model.metadata = {"latent_factor": 0.5, "class_names": ["ant", "bee", "cat", "dog"]}
    return model


def batch(model: TokenBridge, size: int = 4) -> tuple[torch.Tensor, ...]:
    """Return latents, labels and masks (13 of 16 tokens) for a small model."""
    side = model.grid_size * model.patch_size
    mask = (torch.rand(size, 16).argsort(dim=1) < 13).float()
    return torch.randn(size, model.vae_embed_dim, side, side), torch.arange(size) % 4, mask


def same_states(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Return whether two models have the same names, in the same order, with equal values."""
    states = model.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(
        map(torch.equal, states[0].values(), states[1].values())
    )


def training_settings(**options) -> TrainingSettings:
    """Return settings of a training run; ``options`` are those other than these."""
    defaults = {"output_dir": "unused", "epochs": 1, "batch_size": 2, "lr": 1e-3, "ema_rate": 0.9}
    return TrainingSettings(**{**defaults, "precision": "fp32", **options})


def training_state(model: TokenBridge, steps_per_epoch: int = 4, **options) -> TrainingState:
    """Return the state of a training run; ``options`` are its settings."""
    return TrainingState(model, training_settings(**options), steps_per_epoch)


def new_trainer(model, loader=(None,) * 4, tokenizer=None, parts=None, **options) -> Trainer:
    """Return a training run; ``options`` are its settings."""
    return Trainer(model, training_settings(**options), loader, tokenizer, parts=parts)


@pytest.fixture(scope="session")
def kl16() -> AutoencoderKL:
    """A tokenizer of the published architecture with reproducible weights, in evaluation mode. Do not change it."""
    return filled(AutoencoderKL(16, (1, 1, 2, 2, 4)))


# --------------------------------------------------------------------------------------------------------------------
# Files.


def write_images(root: Path, classes: int = 4, each: int = 4, size: int = 20) -> Path:
    """Write ``root/train/<class>/<image>.png`` of random smooth colors; the first of each class is gray."""
    random = np.random.RandomState(0)
    for label in range(classes):
        folder = root / "train" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(each):
            pixels = random.randint(0, 255, (3, 3) if number == 0 else (3, 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((size, size + 4), Image.Resampling.BICUBIC).save(
                folder / f"{number}.png"
            )
    return root


def released(model: TokenBridge) -> dict:
    """Return a checkpoint of the release's training script, with the optimizer state after one step."""
    optimizer = torch.optim.AdamW(add_weight_decay(model, 0.02), lr=1e-3, betas=(0.9, 0.95))
    model(torch.randn(2, 16, 4, 4), torch.tensor([0, 1])).backward()
    optimizer.step()
    return {
        "model": published_state(model),
        "model_ema": {name: 2 * value for name, value in published_parameters(model).items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="tokenbridge_large", blr=5e-5, device="cuda"),
    }


def same(a, b) -> bool:
    """Return whether two nested values and their types are equal."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return (
            type(a) is type(b)
            and len(a) == len(b)
            and all(same(x, y) for x, y in zip(a, b, strict=True))
        )
    return type(a) is type(b) and a == b


def damaged(path) -> None:
    """Truncate a file to half of its size; a file named 3 to nothing."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if path.stem != "3" else 0])


def load(folder: Path, name: str = "checkpoint-last.pth") -> dict:
    """Load a checkpoint of a run."""
    return torch.load(folder / name, weights_only=True)


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """Return the values of a tag in a run's log by step."""
    return {
        event.step: event.value for event in EventAccumulator(str(folder)).Reload().Scalars(tag)
    }


def write_maps(root, maps: torch.Tensor) -> str:
    """Write a cache of means ``maps`` ``[N, C, h, w]`` and large variances; return the flags that use it."""
    moments = torch.cat([maps, torch.full_like(maps, 2.0)], dim=1).float().numpy()
    for number, each in enumerate(moments):
        path = root / str(number % 2) / f"{number}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, moments=each, moments_flip=0 * each)
    about = {
        "images": len(maps),
        "vae": {"embed_dim": maps.shape[1], "ch_mult": [1, 1, 2]},
        "latent_factor": 0.5,
    }
    (root / "cache.json").write_text(json.dumps(about))
    return f"--cached_path {root} --num_workers 0 --batch_size 4"


def run_script(monkeypatch, script: str, command: str) -> None:
    """Call a script's main as ``python <script>.py <command>`` does; user errors raise SystemExit."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *command.split()])
    errors.run(importlib.import_module(script).main)


@pytest.fixture
def run(monkeypatch):
    """``run("main_cache", "--flag value")``."""
    return lambda script, command: run_script(monkeypatch, script, command)


@pytest.fixture
def refused(monkeypatch, capsys):
    """``refused("main_cache", "--flag value")`` runs a script that must end with status 2; returns its error line."""

    def expect(script: str, command: str) -> str:
        with pytest.raises(SystemExit) as stop:
            run_script(monkeypatch, script, command)
        assert stop.value.code == 2
        lines = [
            line
            for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
            if line.startswith("error:")
        ]
        assert len(lines) == 1
        return lines[0]

    return expect


@pytest.fixture
def trace(monkeypatch) -> Trace:
    """Record what the scripts do that this test runs."""
    trace = Trace()
    trace.install(monkeypatch.setattr)
    return trace


@pytest.fixture
def run_two():
    """See :func:`tests.processes.run_two`."""
    return processes.run_two


def torchrun(command: str) -> subprocess.CompletedProcess:
    """Run ``python <command>`` on two ranks under torchrun. It takes ten seconds: prefer :func:`run_two`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# --------------------------------------------------------------------------------------------------------------------
# Small runs.

TINY = "--model tokenbridge_tiny --img_size 16 --class_num 4 --buffer_size 4 --quant_bits 3 --num_workers 0 --batch_size 4"
#: The same model's sizes, for its constructor.
TINY_SIZES = {
    "img_size": 16,
    "vae_stride": 4,
    "vae_embed_dim": 8,
    "class_num": 4,
    "buffer_size": 4,
    "quant_levels": 8,
}
SHORT = "--warmup_epochs 1 --save_last_freq 1 --lr 1e-3"


@pytest.fixture(scope="session")
def shared_files(tmp_path_factory) -> Path:
    """A folder with images ``data`` and a tokenizer ``vae.ckpt``. Tests get copies: ``images``, ``vae_path``."""
    folder = tmp_path_factory.mktemp("shared")
    write_images(folder / "data")
    save_vae(folder / "vae.ckpt", filled(AutoencoderKL(8, (1, 1, 2), ch=8, num_res_blocks=1)), 0.5)
    return folder


@pytest.fixture(scope="session")
def shared_cache(shared_files) -> Path:
    """The cache of these images by this tokenizer. Tests get a copy: ``cached``."""
    flags = f"--img_size 16 --vae_path {shared_files}/vae.ckpt --data_path {shared_files}/data --batch_size 3"
    with pytest.MonkeyPatch.context() as patch:
        run_script(
            patch, "main_cache", f"{flags} --cached_path {shared_files}/cache --num_workers 0"
        )
    return shared_files / "cache"


@pytest.fixture(scope="session")
def shared_run(shared_cache) -> Path:
    """A run of two epochs on this cache. Tests get a copy: ``trained``."""
    folder = shared_cache.with_name("run")
    flags = (
        f"{TINY} {SHORT} --epochs 2 --use_cached --cached_path {shared_cache} --output_dir {folder}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine_tokenbridge.matmul_flops", fixed_matmul_flops)
        run_script(patch, "main_tokenbridge", flags)
    return folder


@pytest.fixture
def images(shared_files, tmp_path) -> Path:
    """A data path of 4 classes with 4 images each."""
    return shutil.copytree(shared_files / "data", tmp_path / "data")


@pytest.fixture
def vae_path(shared_files, tmp_path) -> Path:
    """A small tokenizer's file: stride 4, 8 channels, factor 0.5."""
    return shutil.copy(shared_files / "vae.ckpt", tmp_path / "vae.ckpt")


@pytest.fixture
def cached(shared_cache, images, vae_path, tmp_path) -> Path:
    """The cache of ``images`` by the tokenizer at ``vae_path``."""
    return shutil.copytree(shared_cache, tmp_path / "cache")


@pytest.fixture
def trained(shared_run, cached, tmp_path) -> Path:
    """A run of two epochs on ``cached``."""
    return shutil.copytree(shared_run, tmp_path / "run")


def tiny_pipeline() -> TokenBridgePipeline:
    """Return a tiny model of 16 tokens, 4 pixels wide, with the names of its classes and its tokenizer."""
    model = filled(tokenbridge_tiny(**TINY_SIZES))
    model.metadata = {"latent_factor": 0.5, "class_names": ["ant", "bee", "cat", "dog"]}
    vae = filled(AutoencoderKL(8, (1, 1, 2), ch=8, num_res_blocks=1))
    return TokenBridgePipeline(model, Tokenizer(vae, 0.5), "fp32")


@pytest.fixture
def weights(tmp_path, vae_path):
    """Flags that name a checkpoint of the tiny model, whose average is 1.1 times the weights, and its tokenizer."""
    model = filled(tokenbridge_tiny(**TINY_SIZES))
    config = {**model.config, "latent_factor": 0.5}
    averages = {name: 1.1 * value for name, value in published_parameters(model).items()}
    content = {"model": published_state(model), "model_ema": averages, "config": config}
    (tmp_path / "weights").mkdir()
    torch.save(content, tmp_path / "weights" / "checkpoint-last.pth")
    return f"{TINY} --vae_path {vae_path} --resume {tmp_path}/weights --device cpu"


def processes_of(folder) -> list[int]:
    """Return the sorted ids of the processes that write to ``folder``, without torchrun itself."""
    commands = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may have ended
            commands[int(path.parent.name)] = path.read_bytes().decode(errors="replace")
    return sorted(
        pid
        for pid, line in commands.items()
        if str(folder) in line and "torch.distributed" not in line
    )


@pytest.fixture
def instructions(monkeypatch):
    """``instructions("bf16")`` makes the CPU report hardware matrix products for these precisions only."""

    def pretend(*precisions: str) -> None:
        monkeypatch.setattr(
            "util.precision.cpu_multiplies", lambda precision: precision in precisions
        )
        effective_precision.cache_clear()

    yield pretend
    effective_precision.cache_clear()


# --------------------------------------------------------------------------------------------------------------------
# Metrics.

#: Names of metrics.
FID, IS = "frechet_inception_distance", "inception_score_mean"
URL = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random Inception weights, scaled so that features differ between images."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"), mock.patch(URL):
        model = FeatureExtractorInceptionV3("inception", ["2048"])
    for parameter in model.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    torch.nn.init.normal_(model.fc.weight, std=0.1)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Two folders: 20 blurred crops of photographs, and 10 of these crops sharp. Inception takes 0.2 s for each."""
    root = tmp_path_factory.mktemp("photographs")
    random = np.random.RandomState(0)
    for name in ("sharp", "blurred"):
        (root / name).mkdir()
    for number in range(20):
        photograph = load_sample_images().images[number % 2]
        top, left = (random.randint(0, side - 80) for side in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + 80, left : left + 80])
        crop.filter(ImageFilter.GaussianBlur(1.5)).save(root / "blurred" / f"{number:02d}.png")
        if number < 10:
            crop.save(root / "sharp" / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def stats(tmp_path_factory, inception, photographs):
    """Statistics of the sharp photographs, as main_metrics.py writes them."""
    path = tmp_path_factory.mktemp("stats") / "stats.npz"
    flags = f"--images {photographs}/sharp --save_stats {path} --inception_weights {inception} --num_workers 0"
    with pytest.MonkeyPatch.context() as patch:
        run_script(patch, "main_metrics", f"{flags} --device cpu")
    return path


# --------------------------------------------------------------------------------------------------------------------
# The Hub.

OWN = "owner/repo"


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A Hub server of this test, with an empty cache and no token."""
    with serving() as server:
        point_to(monkeypatch, server.endpoint, tmp_path / "hf")
        yield server


def point_to(monkeypatch, endpoint: str, home: Path) -> None:
    """Direct the Hub's client to this server and its cache to ``home``."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 1000
    )  # what less has arrived is lost with the connection
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
